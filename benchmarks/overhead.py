"""Host time of a wrapped MoE layer in decode beyond its kernel, between real torch operations.

    python benchmarks/overhead.py [--rounds 400]

A decode step alternates attention-like torch operations with the layer, as a model does: both thread
pools wake in turn and the caches are as cold as in life. `layer` is the module's whole forward,
`kernel` the compiled call inside it; the difference is the overhead. `alone` repeats the layer with
nothing in between. A last line times the first call of a kernel, cold and from numba's cache.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from torch import nn

from hybrimoe.kernels import moe
from hybrimoe.runtime.experts import PooledExperts
from hybrimoe.runtime.pool import ExpertPool
from hybrimoe.runtime.stats import Stats
from machine import describe, finish, random_layer

D, F, E, K = 2048, 768, 64, 8


class Timed:
    """Wraps the compiled entry point and remembers how long each call took."""

    def __init__(self, function) -> None:
        self.function, self.seconds = function, []

    def __call__(self, *arguments) -> None:
        start = time.perf_counter()
        self.function(*arguments)
        self.seconds.append(time.perf_counter() - start)


def layer_of(fmt: str) -> PooledExperts:
    """A pooled layer made of random blobs, without a model around it."""
    layer = PooledExperts.__new__(PooledExperts)
    nn.Module.__init__(layer)
    layer.pool, layer.stats, layer.threads, layer.post_norm = ExpertPool(), Stats(), None, None
    layer.name, layer.hybrid = "layer", None
    layer.index = layer.pool.add(random_layer(fmt, E, D, F))
    return layer


def measure(fmt: str, rounds: int, between: bool) -> dict:
    """Medians in microseconds over `rounds` decode steps."""
    layer, rng = layer_of(fmt), np.random.default_rng(0)
    hidden, weights = torch.randn(1, D).bfloat16(), torch.full((1, K), 1 / K)
    projection = nn.Linear(D, D, dtype=torch.bfloat16)
    timed, whole = Timed(moe.run_experts), []
    moe.run_experts = timed
    try:
        with torch.no_grad():
            for _ in range(rounds):
                ids = torch.from_numpy(rng.permutation(E)[:K][None].copy())
                x = projection(hidden).softmax(-1) if between else hidden
                start = time.perf_counter()
                layer(x, ids, weights)
                whole.append(time.perf_counter() - start)
    finally:
        moe.run_experts = timed.function
    beyond = np.median(np.array(whole) - np.array(timed.seconds))
    return {
        "format": fmt,
        "between_torch_ops": between,
        "layer_us": float(np.median(whole)) * 1e6,
        "kernel_us": float(np.median(timed.seconds)) * 1e6,
        "overhead_us": float(beyond) * 1e6,
    }


FIRST_CALL = """
import time, sys
sys.path.insert(0, {folder!r})
import numpy as np, torch
from machine import random_layer
from hybrimoe.kernels.moe import Workspace, run_layer
layer = random_layer("int4", 8, 256, 256)
x = np.zeros((1, 256), np.float32)
start = time.perf_counter()
run_layer(layer, x, np.zeros((1, 2), np.int64), np.ones((1, 2), np.float32), x.copy(), Workspace())
print(time.perf_counter() - start)
"""


def first_call(cache: str) -> float:
    """Seconds of the first call of the int4 kernel in a new process."""
    code = FIRST_CALL.format(folder=os.path.dirname(os.path.abspath(__file__)))
    environment = os.environ | {"NUMBA_CACHE_DIR": cache}
    done = subprocess.run([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=400)
    options = parser.parse_args()
    print(f"{describe()}\n")
    print(
        f"{'format':9} {'between torch ops':>18} {'layer us':>9} {'kernel us':>10} {'overhead us':>12}"
    )
    results = []
    for fmt in ("int4", "int8", "bfloat16"):
        for between in (True, False):
            row = measure(fmt, options.rounds, between)
            results.append(row)
            print(
                f"{fmt:9} {between!s:>18} {row['layer_us']:9.0f} {row['kernel_us']:10.0f} "
                f"{row['overhead_us']:12.0f}"
            )
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = first_call(cache), first_call(cache)
    print(f"\nfirst call of a kernel: {cold:.1f} s compiled, {warm:.2f} s from the cache")
    results.append({"first_call_cold_s": cold, "first_call_warm_s": warm})
    finish("overhead", results, describe())


if __name__ == "__main__":
    main()
