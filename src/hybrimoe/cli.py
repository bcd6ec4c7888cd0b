"""The `hybrimoe` command. Exit codes: 0 done, 1 failed with a message, 2 wrong usage."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from hybrimoe.cache_commands import add_cache
from hybrimoe.calibration_commands import add_calibrate
from hybrimoe.config import WEIGHTS
from hybrimoe.errors import HybriMoEError
from hybrimoe.model_commands import add_bench, add_doctor, add_generate, add_plan
from hybrimoe.simulation_commands import add_simulate, add_trace
from hybrimoe.warmup_commands import add_warmup

BUNDLED = Path(__file__).resolve().parents[2] / "tests" / "assets" / "tiny-moe"


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse the command line and run one command."""
    options = _parser().parse_args(arguments)
    from hybrimoe import commands  # torch and transformers load only when a command runs

    run = getattr(options, "run", None) or getattr(commands, options.command)
    try:
        result = run(options)
    except (HybriMoEError, OSError) as error:
        print(f"hybrimoe {options.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"hybrimoe {options.command}: interrupted", file=sys.stderr)
        return 1
    if options.json:
        print(json.dumps(result))
    return int(getattr(options, "failed", False))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "hybrimoe", description="Run Mixture-of-Experts models that do not fit on your GPU."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser("demo", help="wrap the bundled model, write some text, explain it")
    demo.add_argument("--model", type=Path, default=BUNDLED, help="a transformers MoE checkpoint")
    demo.add_argument("--weights", choices=WEIGHTS, default="int4", help="how experts are kept")
    demo.add_argument("--prompt", default="def main(arguments):\n", help="text to continue")
    demo.add_argument("--tokens", type=_positive, default=96, help="how many tokens to write")
    demo.add_argument("--json", action="store_true", help="end with one JSON object")
    for add in (add_plan, add_generate, add_bench, add_doctor):
        add(commands)
    add_trace(commands)
    add_simulate(commands)
    add_calibrate(commands)
    add_cache(commands)
    add_warmup(commands)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value
