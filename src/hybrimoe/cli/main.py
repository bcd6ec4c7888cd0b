"""The `hybrimoe` command.

Exit codes: 0 done, 1 failed with a message, 2 wrong usage, or a name that no model has. Parsing and
help import none of torch, transformers and numba: each command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence

from hybrimoe.cli.cache import add_cache
from hybrimoe.cli.calibrate import add_calibrate
from hybrimoe.cli.demo import add_demo
from hybrimoe.cli.models import add_bench, add_doctor, add_generate, add_plan
from hybrimoe.cli.traces import add_simulate, add_trace
from hybrimoe.cli.warmup import add_warmup
from hybrimoe.errors import CheckpointNotFoundError, ConfigError, HybriMoEError
from hybrimoe.version import VERSION

COMMANDS = (
    *(add_demo, add_plan, add_generate, add_bench, add_doctor),
    *(add_trace, add_simulate, add_calibrate, add_warmup, add_cache),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run one command."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help(sys.stderr)
        return 2
    try:
        result = options.run(options)
        if options.json:
            print(json.dumps(result), flush=True)
    except BrokenPipeError:  # who read the output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at exit
        return 1
    except (HybriMoEError, OSError) as error:
        print(f"hybrimoe {options.command}: {error}", file=sys.stderr)
        return 2 if isinstance(error, CheckpointNotFoundError | ConfigError) else 1
    except KeyboardInterrupt:
        print(f"hybrimoe {options.command}: interrupted", file=sys.stderr)
        return 1
    return int(getattr(options, "failed", False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "hybrimoe", description="Run Mixture-of-Experts models that do not fit on your GPU."
    )
    parser.add_argument("--version", action="version", version=f"hybrimoe {VERSION}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser
