"""How fast `wrap` packs: bytes of bfloat16 weights per second, one layer of experts at a time.

Then how fast blocks of GGUF files become blobs: bytes of the file per second, one matrix at a time.

python benchmarks/packing.py [--experts 32]
"""

import argparse
import time

import numpy as np
import torch

from hybrimoe.formats.gate import Gate
from hybrimoe.formats.layout import expert_layout
from hybrimoe.formats.registry import named
from hybrimoe.kernels.cpu.relay import Q4_0, Q8_0, relay_experts
from hybrimoe.kernels.cpu.relay_k import Q4_K, Q5_K, Q6_K, relay_k
from hybrimoe.models.weights import ExpertWeights, pack, unpack
from hybrimoe.runtime.pages import allocate_blobs
from hybrimoe.simd.threads import launch
from machine import describe, finish

D, F = 2048, 768
TYPES = (
    ("Q4_0", Q4_0, "int4", 8 * 18),
    ("Q8_0", Q8_0, "int8", 8 * 34),
    ("Q4_K", Q4_K, "q4_k", 144),
    ("Q5_K", Q5_K, "q5_k", 176),
    ("Q6_K", Q6_K, "q6_k", 210),
)
"""Name, number in the file, blob format, bytes of 256 numbers."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--experts", type=int, default=32)
    experts, results = parser.parse_args().experts, []
    up, down = torch.randn(experts, 2, F, D).bfloat16(), torch.randn(experts, D, F).bfloat16()
    weights, size = ExpertWeights(up, down, Gate(0)), 2 * (up.numel() + down.numel())
    print(f"{'format':9} {'pack GB/s':>10} {'unpack GB/s':>12}")
    for fmt in ("int4", "int8", "bfloat16"):
        layout = expert_layout(fmt, D, F, True, False)
        blobs = allocate_blobs(experts, layout)
        rates = []
        for convert in (
            lambda layout=layout, fmt=fmt, blobs=blobs: pack(fmt, layout, weights, blobs),
            lambda layout=layout, fmt=fmt, blobs=blobs: unpack(fmt, layout, blobs, weights),
        ):
            seconds = []
            for _ in range(6):
                start = time.perf_counter()
                convert()
                seconds.append(time.perf_counter() - start)
            rates.append(size / float(np.median(seconds[1:])) / 1e9)
        print(f"{fmt:9} {rates[0]:10.2f} {rates[1]:12.2f}")
        results.append({"format": fmt, "pack_gb_s": rates[0], "unpack_gb_s": rates[1]})
    print(f"\n{'type':9} {'relay GB/s':>10}")
    for name, kind, fmt, size in TYPES:
        rate = relay_speed(kind, fmt, size, min(experts, 32))
        print(f"{name:9} {rate:10.2f}")
        results.append({"type": name, "format": fmt, "relay_gb_s": rate})
    finish("packing", results, describe())


def relay_speed(kind: int, fmt: str, size: int, experts: int) -> float:
    """GB/s of a file's up matrices into blobs, without reading them."""
    layout, threads = expert_layout(fmt, D, F, True, False), launch.threads()
    blobs = allocate_blobs(experts, layout)
    raw = np.random.default_rng(0).integers(0, 128, experts * F * D // 256 * size, np.uint8)
    where, seconds = (threads, layout, 1, (F, D), raw, blobs), []
    scratch, sums = np.empty((threads, 32), np.float32), np.zeros((threads, 3))
    for _ in range(6):
        start = time.perf_counter()
        if named(fmt).pack is None:
            relay_k(kind, *where, np.zeros(8, np.int64))
        else:
            bits = 4 if fmt == "int4" else 8
            relay_experts(kind, bits, *where, scratch, sums, np.zeros(8, np.int64))
        seconds.append(time.perf_counter() - start)
    return raw.nbytes / float(np.median(seconds[1:])) / 1e9


if __name__ == "__main__":
    main()
