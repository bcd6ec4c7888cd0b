"""Time the expert layers of Qwen3-30B-A3B in hybrimoe, kt-kernel and llama.cpp, side by side.

Run: python benchmarks/peers/compare.py [--layers 6] [--threads 2] [--rounds 3] [--peers DIR]

Rounds alternate (ours, kt-kernel, llama.cpp, ours, ...), each run in its own process and one at a
time, so that a machine that slows down or speeds up does so for all; the table shows medians.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from layout import HERE, Layout, add_root_option
from noise import read_cpu_time, share_of_others
from shape import TOKENS, TWIN_F, F, experts_gbps, experts_gflops

FORMATS = ("q4_0", "q4_k")  # both 4.5 bits per weight, as our int4
Seconds = dict[int, float]  # per layer, by tokens

QUIET = 0.05  # of the cores; a third busy process stalls every barrier of two-thread kernels


@dataclass(frozen=True)
class Run:
    """One process: the name it reports, seconds per layer by tokens, the cores' share of others."""

    name: str
    seconds: Seconds
    others: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_root_option(parser)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    layout = Layout(arguments.peers.expanduser().resolve())
    if layout.missing():
        setup = f"python {HERE / 'setup_peers.py'} --peers {layout.root}"
        print(f"The peers are not set up. Set them up with:\n  {setup}", file=sys.stderr)
        return 2

    for weights in FORMATS:  # written now, so that no round waits for the disk
        for expert_hidden in (F, TWIN_F[weights]):
            layout.model(arguments.layers, weights, expert_hidden)
    machine = describe_machine(arguments.threads)
    print(machine, flush=True)
    scripts = commands(layout, arguments)
    runs = [measure(script) for _ in range(arguments.rounds) for script in scripts]
    summary = {"machine": machine, "layers": arguments.layers, "rounds": arguments.rounds}
    print(json.dumps(summary | report(runs)))
    return 0


def commands(layout: Layout, arguments: argparse.Namespace) -> list[list[str]]:
    """Ours first, then each peer in the settings that may suit it best."""
    layers, threads = arguments.layers, arguments.threads
    ours = [sys.executable, HERE / "ours.py", "--tokens", ",".join(map(str, TOKENS))]
    kt_kernel = [layout.python, HERE / "bench_kt_kernel.py", "--peers", layout.root]
    llama_cpp = [sys.executable, HERE / "bench_llama_cpp.py", "--peers", layout.root]
    # kt-kernel's calling thread spins beside its workers, so one core less speeds up its decode.
    fewer = [(kt_kernel, threads - 1)] if threads > 1 else []
    # llama.cpp's q4_k as it lies in the file is slower than q4_0 in decode and faster in prefill.
    q4_k = [*llama_cpp, "--weights", "q4_k", "--no-repack"]
    same = [*ours, "--format", "q4_k"]  # what a file of that type becomes in the pool
    runs = [
        (ours, threads),
        (same, threads),
        (kt_kernel, threads),
        *fewer,
        (llama_cpp, threads),
        (q4_k, threads),
    ]
    return [
        [str(word) for word in (*script, "--layers", layers, "--threads", count)]
        for script, count in runs
    ]


def measure(command: list[str]) -> Run:
    """Run one script; its last line is {"name": ..., "tokens": {"1": seconds per layer, ...}}."""
    script = Path(command[1]).name
    before = read_cpu_time()
    done = subprocess.run(command, capture_output=True, text=True)
    others = share_of_others(before, read_cpu_time())
    if done.returncode:
        raise SystemExit(f"{script} failed ({done.returncode}):\n{done.stderr[-2000:]}")
    line = json.loads(done.stdout.splitlines()[-1])
    seconds = {tokens: line["tokens"][str(tokens)] for tokens in TOKENS}
    shown = ", ".join(f"{tokens}: {s * 1e3:.3f}" for tokens, s in seconds.items())
    print(f"{script}: ms/layer by tokens {shown}; others {others:.0%}", file=sys.stderr)
    return Run(line["name"], seconds, others)


def report(runs: list[Run]) -> dict:
    """Print the table; the first run is ours, and so are others of that project."""
    seconds = medians(runs)
    ours = seconds[runs[0].name]
    project = runs[0].name.split()[0]
    peers = [times for name, times in seconds.items() if name.split()[0] != project]
    ratios = {tokens: min(peer[tokens] for peer in peers) / ours[tokens] for tokens in TOKENS}
    print_table(seconds, ours, ratios)
    others = max(run.others for run in runs)
    print(f"Other processes took up to {others:.0%} of the cores meanwhile.")
    if others > QUIET:
        print("That is not a quiet machine: measure again before quoting these numbers.")
    return {"others": others, "seconds_per_layer": seconds, "ratio_to_better_peer": ratios}


def medians(runs: list[Run]) -> dict[str, Seconds]:
    by_name: dict[str, list[Run]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run)
    return {
        name: {tokens: statistics.median(run.seconds[tokens] for run in same) for tokens in TOKENS}
        for name, same in by_name.items()
    }


def print_table(seconds: dict[str, Seconds], ours: Seconds, ratios: Seconds) -> None:
    """For each row and tokens: milliseconds per layer, rate, and how many times ours it takes."""
    width = max(len(name) for name in seconds) + 1
    print(f"{'':<{width}}" + "".join(f"{f'T = {tokens}':>25}" for tokens in TOKENS))
    units = ["GB/s" if tokens == 1 else "GFLOP/s" for tokens in TOKENS]
    print(f"{'':<{width}}" + "".join(f"{'ms/layer':>10}{unit:>8}{'ours':>7}" for unit in units))
    for name, times in seconds.items():
        cells = (
            f"{s * 1e3:>10.3f}{rate(tokens, s):>8.1f}{f'{s / ours[tokens]:.2f}x':>7}"
            for tokens, s in times.items()
        )
        print(f"{name:<{width}}" + "".join(cells))
    best = "".join(f"{f'{ratio:.2f}x':>25}" for ratio in ratios.values())
    print(f"{'best of the peers':<{width}}{best}")


def rate(tokens: int, seconds: float) -> float:
    return experts_gbps(FORMATS[0], seconds) if tokens == 1 else experts_gflops(tokens, seconds)


def describe_machine(threads: int) -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")
    return f"{cpu}, {os.cpu_count()} cores, {threads} threads"


if __name__ == "__main__":
    sys.exit(main())
