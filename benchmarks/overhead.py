"""Host time of a wrapped MoE layer in decode beyond its kernels, and of the policies alone.

    python benchmarks/overhead.py [--rounds 400] [--only layer|policy|hybrid|first]

A decode step alternates attention-like torch operations with the layer, as a model does: both thread
pools wake in turn and the caches are as cold as in life. `layer` is the module's whole forward,
`kernel` the compiled call inside it; the difference is the overhead. `alone` repeats the layer with
nothing in between.

`policy` is `Engine.step` in decode with an executor that only moves the timeline, and `books` what the
simulator's executor, which keeps them for a real one too, adds. `hybrid` is the module's forward with an
emulated accelerator beyond the kernels on both sides and the emulated copies. Of both, the median over
steps of the mean over a step's layers: what a token pays; and the tenth percentile, which a busy machine
disturbs least. A last line times the first call of a kernel, cold and from numba's cache.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from torch import nn

from hybrimoe.calibration.pool_cost import cost_of
from hybrimoe.config import Config
from hybrimoe.kernels.cpu import run_layer as moe
from hybrimoe.models.adapters import FoundExperts
from hybrimoe.modules.lora import LayerAdapters
from hybrimoe.modules.pooled_experts import PooledExperts
from hybrimoe.policy.cache import Cache
from hybrimoe.policy.engine import Engine
from hybrimoe.policy.forecasts import Markov
from hybrimoe.policy.prediction import SimExecutor
from hybrimoe.policy.presets import preset
from hybrimoe.policy.profiles import Shape, profile
from hybrimoe.policy.timeline import Lane
from hybrimoe.runtime import executor as shared
from hybrimoe.runtime.coordinator import Hybrid
from hybrimoe.runtime.counters import Stats
from hybrimoe.runtime.devices.emulated import EmulatedAccelerator
from hybrimoe.runtime.pool import ExpertPool
from hybrimoe.simulation.synthesis import synthesise
from machine import describe, finish, random_layer

D, F, E, K = 2048, 768, 64, 8
LAYERS = 16
LINK = int(Lane.LINK)


class Timed:
    """Wraps the compiled entry point and remembers how long each call took."""

    def __init__(self, function) -> None:
        self.function, self.seconds = function, []

    def __call__(self, *arguments, **named) -> None:
        start = time.perf_counter()
        self.function(*arguments, **named)
        self.seconds.append(time.perf_counter() - start)


class MovesTime:
    """An executor that computes nothing, copies nothing and keeps no books."""

    def __init__(self, cost) -> None:
        self.shard_s, self.shards, self.end = cost.load_s / cost.shards, cost.shards, 0.0

    def run(self, load, plan, ready, moves, timeline) -> None:
        self.end = timeline.now + plan.makespan
        for move in moves:
            self.copy(move, timeline)

    def copy(self, move, timeline) -> float:
        last = self.shards if move.last < 0 else move.last
        end = max(timeline.free.item(LINK), timeline.now) + self.shard_s * (last - move.first)
        timeline.free[LINK] = end
        return end

    def join(self, timeline) -> None:
        timeline.join(self.end)


class TimedAccelerator(EmulatedAccelerator):
    """Remembers how long the emulated copies and kernels took."""

    def __init__(self) -> None:
        super().__init__(1 << 40)
        self.seconds = 0.0

    def _submit(self, stream, work, *arguments):
        def timed() -> None:
            start = time.perf_counter()
            work()
            self.seconds += time.perf_counter() - start

        return super()._submit(stream, timed, *arguments)


def layer_of(packed, pool: ExpertPool | None = None) -> PooledExperts:
    """A pooled layer made of random blobs, without a model around it."""
    layer = PooledExperts.__new__(PooledExperts)
    nn.Module.__init__(layer)
    layer.pool, layer.stats, layer.threads, layer.post_norm = (
        pool or ExpertPool(),
        Stats(),
        None,
        None,
    )
    layer.name, layer.hybrid, layer.early = "layer", None, None
    layer.folding = layer.lookahead = None
    layer.index = layer.pool.add(packed)
    holder = nn.Module()
    holder.experts = layer
    found = FoundExperts("layer", holder, "experts", layer, lambda module: module)
    layer.__dict__["found"] = found
    layer.adapters = LayerAdapters(layer, found)
    return layer


def decode_trace(steps: int):
    """Routing of 64 experts, top 8, whose residents change as those of real models do."""
    return synthesise(LAYERS, E, K, tokens=steps, seed=0)


def per_step(seconds: list[float], warm: int) -> dict:
    """Microseconds per layer: the median step, and the tenth percentile of steps."""
    steps = np.array(seconds).reshape(-1, LAYERS)[warm:].mean(axis=1) * 1e6
    return {"us": float(np.median(steps)), "best_us": float(np.percentile(steps, 10))}


def policy(name: str, machine: str, rounds: int, books: bool) -> dict:
    """`Engine.step` alone, at a quarter of the experts resident."""
    trace, policies = decode_trace(rounds), preset(name)
    # The shape of Qwen3-30B-A3B in int4, with the shards its layout has.
    cost = profile(machine).cost(Shape(D, F, D * D, 0.5625))
    cost = dataclasses.replace(cost, shards=random_layer("int4", 1, D, F).layout.shards)
    cache = Cache(policies.ranking, LAYERS * E // 4, LAYERS, E, K)
    cache.fill(trace.frequencies())
    table = Markov(LAYERS, E, K, depth=max(policies.prefetcher.depth, 1))
    executor = SimExecutor(cost) if books else MovesTime(cost)
    engine, seconds = Engine(policies, cache, cost, executor, forecaster=table), []
    for step in range(trace.steps):
        for load in trace.loads(step):
            start = time.perf_counter()
            engine.step(load)
            seconds.append(time.perf_counter() - start)
    row = {"policy": name, "machine": machine, "executor": "books" if books else "none"}
    return row | per_step(seconds, warm=rounds // 5)


def hybrid(name: str, rounds: int) -> dict:
    """A layer of small experts shared with an emulated accelerator: its kernels take little."""
    pool, accelerator, trace = ExpertPool(), TimedAccelerator(), decode_trace(rounds)
    layers = [layer_of(random_layer("int4", E, 256, 128), pool) for _ in range(LAYERS)]
    config = Config(device="emulated", vram=0.25, preset=name)
    engine = Hybrid(pool, config, accelerator, cost_of(pool, accelerator, None), K)
    timed, seconds = Timed(shared.run_layer), []
    shared.run_layer = timed
    hidden, weights = torch.randn(1, 256).bfloat16(), torch.full((1, K), 1 / K)
    try:
        with torch.no_grad():
            for step in range(trace.steps):
                for layer, load in zip(layers, trace.loads(step)):
                    layer.hybrid = engine
                    ids = torch.from_numpy(load.experts[None].astype(np.int64))
                    accelerator.seconds, timed.seconds[:] = 0.0, []
                    start = time.perf_counter()
                    layer(hidden, ids, weights)
                    whole = time.perf_counter() - start
                    seconds.append(whole - accelerator.seconds - sum(timed.seconds))
    finally:
        shared.run_layer = timed.function
        engine.close()
    return {"hybrid": name} | per_step(seconds, warm=rounds // 5)


def measure(fmt: str, rounds: int, between: bool) -> dict:
    """Medians in microseconds over `rounds` decode steps."""
    layer, rng = layer_of(random_layer(fmt, E, D, F)), np.random.default_rng(0)
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
from hybrimoe.kernels.cpu.run_layer import run_layer
from hybrimoe.kernels.cpu.workspace import Workspace
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


def show_layers(rounds: int) -> list[dict]:
    print("format     between torch ops  layer us  kernel us  overhead us")
    rows = [measure(fmt, rounds, b) for fmt in ("int4", "int8", "bfloat16") for b in (True, False)]
    for row in rows:
        print(
            f"{row['format']:9} {row['between_torch_ops']!s:>18} {row['layer_us']:9.0f} "
            f"{row['kernel_us']:10.0f} {row['overhead_us']:12.0f}"
        )
    return rows


def show_policies(rounds: int) -> list[dict]:
    print("\npolicies         machine   executor  us per layer  best tenth")
    rows = []
    for name, machine in (
        *(("hybrimoe", machine) for machine in ("desktop", "laptop", "a6000")),
        *(("hybrimoe-paper", "desktop"), ("ktransformers", "desktop")),
    ):
        for books in (False, True):
            rows.append(row := policy(name, machine, rounds, books))
            print(
                f"{name:16} {machine:9} {row['executor']:9} {row['us']:12.1f} {row['best_us']:11.1f}"
            )
    return rows


def show_hybrid(rounds: int) -> list[dict]:
    print("\nhybrid layer, emulated   us beyond kernels and copies  best tenth")
    rows = [hybrid(name, rounds) for name in ("hybrimoe", "ktransformers", "ondemand")]
    for row in rows:
        print(f"{row['hybrid']:24} {row['us']:28.0f} {row['best_us']:11.0f}")
    return rows


def show_first_call(rounds: int) -> list[dict]:
    with tempfile.TemporaryDirectory() as cache:
        cold, warm = first_call(cache), first_call(cache)
    print(f"\nfirst call of a kernel: {cold:.1f} s compiled, {warm:.2f} s from the cache")
    return [{"first_call_cold_s": cold, "first_call_warm_s": warm}]


PARTS = {
    "layer": show_layers,
    "policy": show_policies,
    "hybrid": show_hybrid,
    "first": show_first_call,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--only", choices=PARTS, action="append")
    options = parser.parse_args()
    print(f"{describe()}\n")
    results = [row for name in options.only or PARTS for row in PARTS[name](options.rounds)]
    finish("overhead", results, describe())


if __name__ == "__main__":
    main()
