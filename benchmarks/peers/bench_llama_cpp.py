"""Time llama.cpp on a random Qwen3-30B-A3B with llama-bench, and derive its expert layers' time.

Run: python benchmarks/peers/bench_llama_cpp.py [--layers 6] [--threads 2] [--weights q4_0]
     [--no-repack] [--peers DIR]

llama-bench times whole models only. So each measurement runs two models that differ in nothing
but the expert width: F = 768, and a twin with the narrowest experts the format can hold (f = 32, or
256 in q4_k). The twin has the same attention, router, top-8 of 128 and output head. What the
experts take is then

    (whole - twin) / layers * 768 / (768 - f)

where the last factor gives back the twin's small experts, time being linear in F. Whatever
llama.cpp spends per expert operator whatever its size (launch, barrier, quantizing the input) is
in both models and cancels: the result is a lower bound on llama.cpp's time.

llama.cpp re-lays q4_0 and q4_k for decode when it loads them, and then runs prefill token by token
within each expert. --no-repack keeps the file's layout, which for q4_k means the tiled kernels.

Prints a table, then one line of JSON whose "tokens" holds the derived seconds per layer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path

import shape
from layout import Layout, add_root_option

GENERATED = 64  # decode is timed over this many tokens
REPEATS = 5

Seconds = dict[int, float]  # per layer, by tokens in a pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_root_option(parser)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--weights", choices=list(shape.BYTES_PER_WEIGHT), default="q4_0")
    parser.add_argument("--no-repack", action="store_true", help="keep the file's weight layout")
    arguments = parser.parse_args()

    weights, widths = arguments.weights, (shape.F, shape.TWIN_F[arguments.weights])
    layout = Layout(arguments.peers)
    whole, twin = (
        seconds_per_layer(layout, layout.model(arguments.layers, weights, width), arguments)
        for width in widths
    )
    scale = widths[0] / (widths[0] - widths[1])
    experts = {tokens: derive_experts(whole[tokens], twin[tokens], scale) for tokens in whole}
    print_model("whole model", whole, arguments, widths[0])
    print_model("twin", twin, arguments, widths[1])
    print_experts(experts, weights)
    name = f"llama.cpp {weights}" + ", no repack" * arguments.no_repack
    print(json.dumps({"name": name, "tokens": experts, "whole": whole, "twin": twin}))


def seconds_per_layer(layout: Layout, model: Path, arguments: argparse.Namespace) -> Seconds:
    """Median time of one forward pass of 1, 32 and 512 tokens, divided by the layers."""
    prompts = ",".join(str(tokens) for tokens in shape.TOKENS if tokens > 1)
    command = [layout.llama_bench, "-m", model, "-t", arguments.threads, "-r", REPEATS]
    command += ["-p", prompts, "-n", GENERATED, "--repack", int(not arguments.no_repack)]
    words = [str(word) for word in (*command, "-o", "json")]
    output = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True).stdout
    seconds = {}
    for test in json.loads(output):
        passes = test["n_gen"] or 1  # decode runs one token at a time, a prompt all at once
        repeats_s = [ns / 1e9 for ns in test["samples_ns"]]
        seconds[test["n_prompt"] or 1] = statistics.median(repeats_s) / passes / arguments.layers
    return dict(sorted(seconds.items()))


def derive_experts(whole: float, twin: float, scale: float) -> float:
    if not 0 < twin < whole:
        raise SystemExit(
            f"The twin's experts are smaller, yet it took {twin:.2e} s per layer and the whole "
            f"model {whole:.2e}: the machine is too busy to measure."
        )
    return (whole - twin) * scale


def print_model(name: str, seconds: Seconds, arguments: argparse.Namespace, width: int) -> None:
    gbps = shape.model_gbps(arguments.weights, seconds[1], width, arguments.layers)
    rates = [f"{shape.model_gflops(T, seconds[T], width):.0f} GFLOP/s" for T in seconds if T > 1]
    print_row(f"{name}, F = {width}", seconds, [f"{gbps:.1f} GB/s", *rates])


def print_experts(seconds: Seconds, weights: str) -> None:
    gbps = shape.experts_gbps(weights, seconds[1])
    rates = [f"{shape.experts_gflops(T, seconds[T]):.0f} GFLOP/s" for T in seconds if T > 1]
    print_row("experts, derived", seconds, [f"{gbps:.1f} GB/s", *rates])


def print_row(name: str, seconds: Seconds, rates: list[str]) -> None:
    cells = (
        f"{tokens:>6} tokens {s * 1e3:8.3f} ms {rate:>12}"
        for (tokens, s), rate in zip(seconds.items(), rates)
    )
    print(f"{name:<22}" + "".join(cells))


if __name__ == "__main__":
    main()
