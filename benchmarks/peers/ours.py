"""Time hybrimoe's experts of a Qwen3-30B-A3B layer stack, as the peers' scripts time theirs.

    python benchmarks/peers/ours.py [--layers 6] [--threads 2] [--tokens 1,32,512] [--format int4]

Ends with {"name": "hybrimoe int4", "tokens": {"1": seconds per layer, ...}}.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import shape

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from hybrimoe.kernels.cpu.run_layer import run_layer
from hybrimoe.kernels.cpu.workspace import Workspace
from machine import random_layer, routing


def seconds_per_layer(layers: list, tokens: int, threads: int) -> float:
    """Median over repeats of a pass through all layers, fresh routes each time."""
    rng, workspace = np.random.default_rng(tokens), Workspace()
    x = rng.standard_normal((tokens, shape.D), np.float32)
    weights = np.full((tokens, shape.K), 1 / shape.K, np.float32)
    out, seconds = np.empty_like(x), []
    for _ in range(40 if tokens == 1 else 5):
        ids = [routing(rng, tokens, shape.E, shape.K) for _ in layers]
        start = time.perf_counter()
        for layer, route in zip(layers, ids):
            run_layer(layer, x, route, weights, out, workspace, threads=threads)
        seconds.append((time.perf_counter() - start) / len(layers))
    return float(np.median(seconds[1:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tokens", default="1,32,512")
    parser.add_argument("--format", default="int4", help="int4, q4_k or any other blob format")
    options = parser.parse_args()
    fmt = options.format
    layers = [random_layer(fmt, shape.E, shape.D, shape.F) for _ in range(options.layers)]
    tokens = [int(t) for t in options.tokens.split(",")]
    timed = {str(t): seconds_per_layer(layers, t, options.threads) for t in tokens}
    print(json.dumps({"name": f"hybrimoe {fmt}", "tokens": timed}))


if __name__ == "__main__":
    main()
