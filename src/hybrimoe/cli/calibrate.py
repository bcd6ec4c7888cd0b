"""`hybrimoe calibrate`: measure this machine, and write it down for the simulator."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.choices import SHAPES
from hybrimoe.cli.values import ensure_writable, positive, weights

if TYPE_CHECKING:
    from hybrimoe.policy.cost import CostModel
    from hybrimoe.policy.profiles import Shape


NAME = "this machine"


def add_calibrate(commands: Any) -> None:
    """The arguments of `hybrimoe calibrate`."""
    parser = commands.add_parser("calibrate", help="measure this machine for an expert shape, 5 s")
    parser.add_argument(
        "--shape",
        choices=SHAPES,
        default="qwen3-30b-a3b",
        metavar="MODEL",
        help=f"whose experts: {', '.join(SHAPES)}",
    )
    parser.add_argument("--weights", type=weights, metavar="FORMAT", help="(the smallest)")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any"
    )
    parser.add_argument("--threads", type=positive, help="of the CPU's experts")
    parser.add_argument("--force", action="store_true", help="measure even what is known")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="write a profile for `hybrimoe simulate --profile FILE`",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    parser.set_defaults(run=run_calibrate)


def run_calibrate(options: argparse.Namespace) -> dict[str, Any]:
    """Measure or look up what experts cost here, say it, and write it down if asked to."""
    ensure_writable(options.output, "--output")
    import hybrimoe
    from hybrimoe.files import write_atomically
    from hybrimoe.formats.registry import rounded
    from hybrimoe.policy.profiles import rates_of
    from hybrimoe.policy.profiles import shape as shape_of

    options.weights = options.weights or rounded()[-1]
    cost = hybrimoe.calibrate(
        shape=options.shape,
        weights=options.weights,
        device=options.device,
        threads=options.threads,
        force=options.force,
    )
    like = shape_of(options.shape)
    profile = rates_of(cost, like, NAME)
    if options.output:
        write_atomically(options.output, json.dumps(profile.to_dict(), indent=2).encode())
    if not options.json:
        print(describe(cost, like, f"{options.shape} {options.weights}"))
    path = str(options.output) if options.output else None
    return {"cost": cost.to_dict(), "profile": profile.to_dict(), "path": path}


def describe(cost: CostModel, like: Shape, what: str) -> str:
    """The cost of one expert, lane by lane, and the rates behind it."""
    rows = [
        ("CPU", cost.cpu_first, cost.cpu_expert, cost.cpu_token),
        ("  while copying", cost.cpu_first, cost.cpu_expert_contended, cost.cpu_token),
        ("GPU", cost.gpu_first, cost.gpu_read + cost.gpu_launch, cost.gpu_token),
    ]
    lines = [f"{what}, {cost.expert_bytes / 2**20:.1f} MiB per expert; {cost.source}", ""]
    lines.append(f"{'us':16}{'start':>8}{'expert':>8}{'token':>8}{'GB/s':>8}{'GFLOP/s':>9}")
    for name, first, expert, token in rows:
        speed = cost.expert_bytes / expert / 1e9
        flops = f"{2 * like.weights / token / 1e9:9.0f}" if token else f"{'-':>9}"
        numbers = "".join(f"{seconds * 1e6:8.1f}" for seconds in (first, expert, token))
        lines.append(f"{name:16}{numbers}{speed:8.1f}{flops}")
    copies = ((cost.link_bandwidth, "link"), (cost.link_bandwidth_contended, "  beside experts"))
    for bandwidth, name in copies:
        copy_s = cost.link_latency + cost.expert_bytes / bandwidth
        numbers = f"{cost.link_latency * 1e6:8.1f}{copy_s * 1e6:8.1f}{'':8}{bandwidth / 1e9:8.1f}"
        lines.append(f"{name:16}{numbers}")
    return "\n".join(lines)
