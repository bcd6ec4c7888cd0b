"""How fast `wrap` packs: bytes of bfloat16 weights per second, one layer of experts at a time.

python benchmarks/packing.py [--experts 32]
"""

import argparse
import time

import numpy as np
import torch

from hybrimoe.kernels.activations import Gate
from hybrimoe.kernels.layout import expert_layout
from hybrimoe.runtime.adapters import ExpertWeights
from hybrimoe.runtime.formats import pack, unpack
from hybrimoe.runtime.pool import allocate_blobs
from machine import describe, finish

D, F = 2048, 768


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
    finish("packing", results, describe())


if __name__ == "__main__":
    main()
