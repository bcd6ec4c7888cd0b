"""Carries plans out: copies into slots, experts on the accelerator and on the CPU, one join per layer.

Decisions follow the predicted timeline alone, so placement is a pure function of routing and of the
cost table. Events keep the real order right however long things really take.
"""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import numpy as np

from hybrimoe.errors import PolicyError
from hybrimoe.kernels.moe import run_layer
from hybrimoe.policy.cache import Cache, Move
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.routing import Load
from hybrimoe.policy.scheduler import Plan
from hybrimoe.policy.simulator import SimExecutor
from hybrimoe.policy.timeline import Timeline
from hybrimoe.runtime.device import Accelerator
from hybrimoe.runtime.pool import ExpertPool


class Call(NamedTuple):
    """The inputs and the output of the layer that runs now."""

    x: np.ndarray  # [T, D] float32
    ids: np.ndarray  # [T, K] int64
    weights: np.ndarray  # [T, K] float32
    out: np.ndarray  # [T, D] float32


class Running(NamedTuple):
    """The layer between `run` and `join`."""

    layer: int
    on_gpu: np.ndarray  # [E] int32, shards of each expert that the accelerator computes
    launches: list[tuple[np.ndarray, Any]]  # partial sums and the events that complete them


class Content(NamedTuple):
    """What a slot holds, or will hold once its copies have arrived."""

    layer: int
    expert: int
    generation: int


NOTHING = Content(-1, -1, -1)


class TorchExecutor:
    """The `Executor` of a real model; its books are those of the simulator's."""

    def __init__(
        self,
        pool: ExpertPool,
        cache: Cache,
        cost: CostModel,
        accelerator: Accelerator,
        threads: int | None = None,
    ) -> None:
        self.pool, self.cache, self.accelerator, self.threads = pool, cache, accelerator, threads
        self.books = SimExecutor(cost)
        total = cache.slots + cache.staging
        slot_bytes = max(layer.layout.expert_bytes for layer in pool.layers if layer)
        accelerator.allocate(total, slot_bytes)
        self.content = [NOTHING] * total
        self.arrivals: list[list[Any]] = [[] for _ in range(total)]  # copies not yet waited for
        self.last_use: list[Any] = [None] * total  # the launch that last read the slot
        self.cpu_s = self.join_s = 0.0
        self.call: Call | None = None
        self._running: Running | None = None

    def run(
        self, load: Load, plan: Plan, ready: np.ndarray, moves: list[Move], timeline: Timeline
    ) -> None:
        """Order the copies of a plan and launch its experts on the accelerator."""
        self.books.run(load, plan, ready, moves, timeline)
        on_gpu = np.zeros(len(self.pool.layer(load.layer).blobs), np.int32)
        on_gpu[load.experts] = plan.shards
        moving = {move.expert for move in moves}
        slots = self.cache.slot[load.layer]
        wave = {expert: int(slots[expert]) for expert in plan.gpu.tolist() if expert not in moving}
        launches = []
        for move in moves:
            if move.slot in wave.values():  # a passing slot comes round again: use it first
                launches.append(self._launch(load.layer, wave, on_gpu))
                wave = {}
            self._order(move)
            wave[move.expert] = move.slot
        if wave:
            launches.append(self._launch(load.layer, wave, on_gpu))
        self._running = Running(load.layer, on_gpu, launches)

    def copy(self, move: Move, timeline: Timeline) -> float:
        """Order one background copy; its predicted arrival is what the policies see."""
        arrival = self.books.copy(move, timeline)
        self._order(move)
        return arrival

    def join(self, timeline: Timeline) -> None:
        """Compute the CPU's share, wait for the accelerator, and sum the two."""
        self.books.join(timeline)
        assert self._running is not None
        assert self.call is not None
        (index, on_gpu, launches), call = self._running, self.call
        layer = self.pool.layer(index)
        shards = np.empty((on_gpu.size, 2), np.int32)
        shards[:, 0], shards[:, 1] = on_gpu, layer.layout.shards
        started = time.perf_counter()
        arrays, workspace = (call.x, call.ids, call.weights, call.out), self.pool.workspace
        run_layer(layer, *arrays, workspace, threads=self.threads, shards=shards)
        computed = time.perf_counter()
        for partial, event in launches:
            self.accelerator.wait(
                event
            )  # sync: the layer's join; later launches imply earlier ones
            np.add(call.out, partial, out=call.out)
        self.cpu_s += computed - started
        self.join_s += time.perf_counter() - computed
        self._running = None

    def fill(self, moves: list[Move]) -> None:
        """Copy the initial residents and wait for them."""
        for move in moves:
            self._order(move)
        for events in self.arrivals:
            for event in events:
                self.accelerator.wait(event)

    def _order(self, move: Move) -> None:
        """Queue the copy of some shards of an expert into its slot."""
        passing = move.slot >= self.cache.slots  # used within the layer, and may come round again
        if not passing and self.cache.generation[move.slot] != move.generation:
            raise PolicyError(f"a copy into slot {move.slot} is stale: {move}")
        wanted = Content(move.layer, move.expert, move.generation)
        if self.content[move.slot] != wanted:
            self.content[move.slot], self.arrivals[move.slot] = wanted, []
        layer = self.pool.layer(move.layer)
        size = layer.layout.shard_bytes
        first, last = move.first, layer.layout.shards if move.last < 0 else move.last
        source = layer.blobs[move.expert, first * size : last * size]
        # Hazard: the launch that read the slot's former expert may still run.
        after = [self.last_use[move.slot]] if self.last_use[move.slot] is not None else []
        self.arrivals[move.slot].append(
            self.accelerator.copy(source, move.slot, first * size, after)
        )

    def _launch(self, index: int, wave: dict[int, int], on_gpu: np.ndarray) -> tuple[Any, Any]:
        """Start some experts on the accelerator: their partial sum, and the event completing it."""
        assert self.call is not None
        nowhere = len(self.content)
        table = np.full(on_gpu.size, nowhere, np.int64)
        shards = np.zeros((nowhere + 1, 2), np.int32)
        after = []
        for expert, slot in wave.items():
            if self.content[slot][:2] != (index, expert):
                raise PolicyError(
                    f"slot {slot} holds {self.content[slot]}, not expert {expert} of layer {index}"
                )
            table[expert], shards[slot, 1] = slot, on_gpu[expert]
            after += self.arrivals[slot]  # hazard: its weights may still be on the wire
        call, layer = self.call, self.pool.layer(index)
        partial = np.empty_like(call.out)
        event = self.accelerator.experts(
            layer, call.x, table[call.ids], call.weights, shards, partial, after
        )
        for slot in wave.values():
            self.last_use[slot] = event
        return partial, event
