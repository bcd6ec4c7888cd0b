"""Speed of the CPU expert kernels on real expert shapes.

    python benchmarks/kernels.py [--quick] [--shapes qwen3] [--formats int4] [--tokens 1,32]

Every row alternates the kernel, torch and a plain read of memory, and reports medians. `experts` is
how many distinct experts the tokens activate; `GB/s` counts each one's bytes once; `read` is the
share of the machine's own read bandwidth, measured in the same rounds. Torch runs the same pairs
expert by expert with `linear`, on the weights as float32 and as bfloat16.
"""

import argparse
import time

import numpy as np
import torch

from hybrimoe.kernels.cpu.run_layer import run_layer
from hybrimoe.kernels.cpu.workspace import Workspace
from hybrimoe.simd.threads import launch
from machine import ReadBandwidth, describe, finish, random_layer, routing

SHAPES = {  # name: (D, F, top-k, bias)
    "qwen3-30b-a3b": (2048, 768, 8, False),
    "deepseek-v2-lite": (2048, 1408, 6, False),
    "mixtral-8x7b": (4096, 14336, 2, False),
    "gpt-oss-20b": (2880, 2880, 4, True),
}
BYTES_WANTED = 320 << 20
"""Packed bytes to rotate through: ten times the last-level cache of the machines we use."""


def experts_for(expert_bytes: int, top_k: int) -> int:
    """As many experts as exceed the caches, at most 128, at least twice the top-k."""
    return int(max(2 * top_k, min(128, -(-BYTES_WANTED // expert_bytes))))


def measure(shape: str, fmt: str, tokens: int, rounds: int, read: ReadBandwidth) -> dict:
    """One row: medians over alternating rounds."""
    hidden, inner, top_k, bias = SHAPES[shape]
    probe = random_layer(fmt, 1, hidden, inner, bias)
    experts = experts_for(probe.layout.expert_bytes, top_k)
    layer = random_layer(fmt, experts, hidden, inner, bias)
    rng, workspace = np.random.default_rng(tokens), Workspace()
    x = rng.standard_normal((tokens, hidden), np.float32)
    weights = np.full((tokens, top_k), 1 / top_k, np.float32)
    out, seconds, distinct = np.empty_like(x), [], []
    for turn in range(rounds + 1):
        # Many tokens on few experts each, as in prefill of long prompts: 32 per expert and more.
        ids = routing(rng, tokens, experts, top_k)
        start = time.perf_counter()
        run_layer(layer, x, ids, weights, out, workspace)
        if turn:  # the first warms caches and compiles
            seconds.append(time.perf_counter() - start)
            distinct.append(np.unique(ids).size)
        # Not after every launch: a pass over memory also empties the caches of code and scratch.
        if turn % 8 == 7 or turn == rounds:
            read.sample()
    flops = 6 * hidden * inner * top_k * tokens
    median, active = float(np.median(seconds)), float(np.mean(distinct))
    gb_s = active * layer.layout.expert_bytes / median / 1e9
    return {
        "shape": shape,
        "format": fmt,
        "tokens": tokens,
        "experts": round(active, 1),
        "ms": median * 1e3,
        "gb_s": gb_s,
        "gflop_s": flops / median / 1e9,
        "read_gb_s": read.gb_s,
        "read_share": gb_s / read.gb_s,
    }


def measure_torch(shape: str, dtype: torch.dtype, tokens: int, rounds: int) -> float:
    """Seconds torch needs for the same pairs: three `linear` per expert, tokens spread evenly."""
    hidden, inner, top_k, _ = SHAPES[shape]
    pairs = tokens * top_k
    experts = min(pairs, experts_for(3 * hidden * inner * dtype.itemsize, top_k))
    count = max(experts, -(-BYTES_WANTED // (3 * hidden * inner * dtype.itemsize)))
    up = [torch.randn(2 * inner, hidden).to(dtype) for _ in range(min(count, 24))]
    down = [torch.randn(hidden, inner).to(dtype) for _ in up]
    each = [pairs // experts + (i < pairs % experts) for i in range(experts)]
    seconds, which = [], 0
    for _ in range(rounds + 1):
        xs = [torch.randn(n, hidden).to(dtype) for n in each]
        start = time.perf_counter()
        for x in xs:
            gate, value = torch.nn.functional.linear(x, up[which]).chunk(2, -1)
            torch.nn.functional.linear(torch.nn.functional.silu(gate) * value, down[which])
            which = (which + 1) % len(up)
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--formats", default="int4,int8,bfloat16")
    parser.add_argument("--tokens", default="1,2,4,8,32,128,512")
    parser.add_argument("--quick", action="store_true", help="fewer rounds and no torch")
    options = parser.parse_args()
    threads = launch.threads()
    read, results = ReadBandwidth(threads), []
    print(f"{describe()}\n")
    heads = ("shape", "format", "tokens", "experts", "ms", "GB/s", "read", "GFLOP/s", "f32", "bf16")
    print("{:17} {:9} {:>6} {:>7} {:>9} {:>6} {:>5} {:>8} {:>6} {:>6}".format(*heads))
    for shape in options.shapes.split(","):
        for tokens in (int(t) for t in options.tokens.split(",")):
            torch_s = {}
            if not options.quick:
                few = 5 if tokens < 128 else 3
                for name in ("float32", "bfloat16"):
                    torch_s[name] = measure_torch(shape, getattr(torch, name), tokens, few)
            for fmt in options.formats.split(","):
                rounds = (9 if options.quick else 25) if tokens <= 8 else 5 if tokens <= 32 else 3
                row = measure(shape, fmt, tokens, rounds, read)
                row |= {f"torch_{k}_ratio": s / (row["ms"] / 1e3) for k, s in torch_s.items()}
                results.append(row)
                show(row)
    finish("kernels", results, describe() | {"read_gb_s": read.gb_s})


def show(row: dict) -> None:
    """One line of the table; the last two columns say how many times faster than torch."""
    ratios = "".join(
        f" {row[key]:>5.1f}x"
        for key in ("torch_float32_ratio", "torch_bfloat16_ratio")
        if key in row
    )
    print(
        f"{row['shape']:17} {row['format']:9} {row['tokens']:6} {row['experts']:7.1f} {row['ms']:9.3f} "
        f"{row['gb_s']:6.1f} {row['read_share']:5.2f} {row['gflop_s']:8.1f}{ratios}"
    )


if __name__ == "__main__":
    main()
