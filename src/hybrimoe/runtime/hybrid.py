"""One engine per model: routing in, expert outputs out, policies in between."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np

from hybrimoe.errors import ConfigError
from hybrimoe.policy.cache import Cache
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.engine import Engine, Policies
from hybrimoe.policy.forecaster import Markov
from hybrimoe.policy.profiles import Shape, profile
from hybrimoe.policy.routing import Load
from hybrimoe.policy.simulator import expert_budget
from hybrimoe.policy.timeline import Lane
from hybrimoe.runtime.device import Accelerator
from hybrimoe.runtime.executor import Call, TorchExecutor
from hybrimoe.runtime.pool import ExpertPool


@dataclass
class LayerCounts:
    """What the policies did in one layer since the last reset."""

    hits: int = 0
    misses: int = 0
    gpu_experts: int = 0
    cpu_experts: int = 0


class Hybrid:
    """Takes each layer's routing through the engine; layers must come in the model's order."""

    def __init__(
        self,
        pool: ExpertPool,
        policies: Policies,
        accelerator: Accelerator,
        vram: int | float | str | None,
        top_k: int,
        threads: int | None = None,
    ) -> None:
        self.pool, self.accelerator, self.policies = pool, accelerator, policies
        layers = [layer for layer in pool.layers if layer]
        self.experts = max(len(layer.blobs) for layer in layers)
        self.cost = cost_of(pool)
        slots = slot_count(vram, pool, top_k, len(layers))
        self.cache = Cache(policies.ranking, slots, len(layers), self.experts, top_k)
        self.executor = TorchExecutor(pool, self.cache, self.cost, accelerator, threads)
        markov = Markov(len(layers), self.experts, top_k, depth=max(policies.prefetcher.depth, 1))
        self.engine = Engine(policies, self.cache, self.cost, self.executor, forecaster=markov)
        for layer in layers:
            accelerator.pin(layer.blobs)
        self.executor.fill(self.cache.fill())
        self.counts = [LayerCounts() for _ in layers]
        self.lock = threading.Lock()  # the engine's books are shared by all callers

    def forward(self, layer: int, call: Call) -> None:
        """Fill `call.out` with the layer's output."""
        with self.lock:
            self.executor.call = call
            try:
                load = load_of(layer, call.ids, call.weights, self.experts)
                before = self.engine.hits, self.engine.misses
                plan = self.engine.step(load)
                self._count(layer, before, plan.gpu.size, plan.cpu.size)
            finally:
                self.executor.call = None

    def to_dict(self) -> dict[str, Any]:
        """Totals for the report; seconds are measured, uploads and bytes are counted."""
        engine, books = self.engine, self.executor.books
        activated = engine.hits + engine.misses + engine.late
        return {
            "device": self.accelerator.name,
            "slots": self.cache.slots,
            "hit_rate": engine.hits / activated if activated else 0.0,
            "hits": engine.hits,
            "misses": engine.misses,
            "late": engine.late,
            "uploads": books.uploads,
            "link_bytes": int(books.link_bytes),
            "gpu_experts": sum(c.gpu_experts for c in self.counts),
            "cpu_experts": sum(c.cpu_experts for c in self.counts),
            "cpu_s": self.executor.cpu_s,
            "join_s": self.executor.join_s,
            "predicted_lane_s": {lane.name: float(books.busy[lane]) for lane in Lane},
        }

    def reset(self) -> None:
        """Start counting anew; the cache keeps what it has learnt."""
        engine, books = self.engine, self.executor.books
        engine.hits = engine.misses = engine.late = books.uploads = books.link_bytes = 0
        books.busy[:] = 0
        self.executor.cpu_s = self.executor.join_s = 0.0
        self.counts = [LayerCounts() for _ in self.counts]

    def close(self) -> None:
        """Let go of the host memory, which is about to be freed."""
        for layer in self.pool.layers:
            if layer is not None:
                self.accelerator.unpin(layer.blobs)

    def _count(self, layer: int, before: tuple[int, int], gpu: int, cpu: int) -> None:
        counts = self.counts[layer]
        counts.hits += self.engine.hits - before[0]
        counts.misses += self.engine.misses - before[1]
        counts.gpu_experts += gpu
        counts.cpu_experts += cpu


def load_of(layer: int, ids: np.ndarray, weights: np.ndarray, experts: int) -> Load:
    """One layer's `Load` from its routing; ids, weights [T, K]."""
    flat = ids.reshape(-1)
    tokens = np.bincount(flat, minlength=experts)
    activated = np.flatnonzero(tokens).astype(np.int32)
    scores = np.bincount(flat, weights=weights.reshape(-1), minlength=experts).astype(np.float32)
    return Load(layer, activated, tokens[activated].astype(np.int32), scores)


def cost_of(pool: ExpertPool, machine: str = "desktop") -> CostModel:
    """A cost table for the pool's largest expert on a shipped hardware profile."""
    largest = max((layer for layer in pool.layers if layer), key=lambda p: p.layout.expert_bytes)
    layout = largest.layout
    weights = 3 * layout.hidden * layout.inner
    shape = Shape(layout.hidden, layout.inner, layout.hidden**2, layout.expert_bytes / weights)
    numbers = profile(machine).cost(shape).to_dict()
    return CostModel.from_dict(numbers | {"shards": layout.shards})


def slot_count(vram: int | float | str | None, pool: ExpertPool, top_k: int, layers: int) -> int:
    """Expert slots that a budget holds; None means a quarter of all experts."""
    largest = max(layer.layout.expert_bytes for layer in pool.layers if layer)
    total = sum(len(layer.blobs) for layer in pool.layers if layer)
    slots = int(expert_budget(0.25 if vram is None else vram, total * largest) // largest)
    if slots < layers:
        raise ConfigError(
            f"vram must hold at least one expert of {largest} bytes per layer, that is "
            f"{layers * largest} bytes for {layers} layers, got {vram!r}, which holds {slots}"
        )
    return min(slots, total)
