"""Everything that needs a GPU, in one command: first what must hold, then how fast it is.

    python benchmarks/gpu.py [--minutes 8.5] [--out benchmarks/results/gpu.json]
    python benchmarks/gpu.py --emulated --tiny     # the same code on any machine, within a minute

Checks: kernels of every format, every preset at every residency, racing streams, leaks. Measures:
random-weight models of the shapes of Qwen3-30B-A3B and DeepSeek-V2-Lite with fewer layers, all
presets at 25, 50 and 75 % residency, beside transformers with everything on the GPU, accelerate's
CPU offload and the bandwidth bound; predicted against measured spans. Results are written as they
come, so a run cut short keeps what it has. Exits with 1 if a check failed.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).parent))

import torch
import transformers
from transformers.utils import logging

import gpu_checks
import gpu_speed
from gpu_models import SHAPES
from gpu_sections import Section, Sections
from hybrimoe.kernels.gpu import triton_experts
from machine import describe, finish

RESULTS = Path(__file__).parent / "results" / "gpu.json"
# Shares of the whole time; what a section leaves is the next ones', up to their own share.
SHARES = {"rates": 0.03, "kernels": 0.16, "models": 0.14, "races": 0.07, "leaks": 0.06}
SPEED_SHARE = 0.26  # of each model


def main() -> int:
    """Run all sections and print what failed."""
    options = parse()
    device = "emulated" if options.emulated else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        print("torch finds no CUDA device; try --emulated --tiny", file=sys.stderr)
        return 2
    logging.disable_progress_bar()
    run = Sections(options.out, environment(device), options.minutes)
    print(run.results["machine"])
    tiny, sizes = options.tiny, gpu_speed.TINY if options.tiny else gpu_speed.Sizes()
    rates: list[gpu_speed.Rates] = []  # none where the first section fails

    def measure_rates(section: Section) -> None:
        rates.append(gpu_speed.measure_rates(section, device, sizes))

    bodies = {
        "rates": measure_rates,
        "kernels": lambda s: gpu_checks.check_kernels(
            s, device, gpu_checks.TOKENS[: 3 if tiny else None]
        ),
        "models": lambda s: gpu_checks.check_models(
            s, device, gpu_checks.RESIDENCIES[: 2 if tiny else None]
        ),
        "races": lambda s: gpu_checks.check_races(s, device, seeds=2 if tiny else 12),
        "leaks": lambda s: gpu_checks.check_leaks(s, device, cycles=3 if tiny else 50),
    }
    for name, body in bodies.items():
        run.run(name, SHARES[name], body)
    for name in SHAPES:
        arguments = (name, device, tiny, sizes, rates[0] if rates else None)
        run.run(name, SPEED_SHARE, lambda s, a=arguments: gpu_speed.measure_model(s, *a))
    finish("gpu", [{"failed": run.failed, "file": options.out.name}], run.results["machine"])
    return 1 if run.failed else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.5)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--emulated", action="store_true", help="on the emulated accelerator")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    options = parser.parse_args()
    if options.emulated and not options.tiny:
        parser.error("--emulated proves results, not speed, and needs --tiny")
    options.out = options.out or RESULTS.with_stem("gpu-emulated" if options.emulated else "gpu")
    return options


def environment(device: str) -> dict:
    """What the numbers were measured on."""
    found = describe() | {"transformers": transformers.__version__, "device": device}
    if triton_experts.triton is not None:
        found["triton"] = triton_experts.triton.__version__
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {
            "gpu": properties.name,
            "gpu_gib": round(properties.total_memory / 2**30),
            "cuda": torch.version.cuda,
            "compute_capability": f"{properties.major}.{properties.minor}",
        }
    return found


if __name__ == "__main__":
    sys.exit(main())
