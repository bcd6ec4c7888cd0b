"""Carries plans out: copies into slots, experts on the accelerator and on the CPU, one join per layer.

Decisions follow the predicted timeline alone, so placement is a pure function of routing and of the
cost table. Events keep the real order right however long things really take.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybrimoe.errors import PolicyError
from hybrimoe.kernels.cpu.run_layer import run_layer
from hybrimoe.policy.cache import Cache, Move
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.plan import Plan, left_to_cpu
from hybrimoe.policy.prediction import SimExecutor
from hybrimoe.policy.routing import Forecast, Load
from hybrimoe.policy.slots import place_in_slots
from hybrimoe.policy.spans import label
from hybrimoe.policy.timeline import Lane, Span, Timeline
from hybrimoe.runtime.devices.base import Accelerator
from hybrimoe.runtime.disk.job import Job
from hybrimoe.runtime.inputs import Call
from hybrimoe.runtime.meter import Meter
from hybrimoe.runtime.pool import ExpertPool


class Running(NamedTuple):
    """The layer between `run` and `join`."""

    load: Load
    plan: Plan
    on_gpu: np.ndarray  # [E] int32, shards of each expert that the accelerator computes
    launches: list[tuple[Tensor, Any]]  # partial sums and the events that complete them


class Content(NamedTuple):
    """What a slot holds, or will hold once its copies have arrived."""

    layer: int
    expert: int
    generation: int


LAUNCH_S = 50e-6  # seconds of the host for one launch: less work is not worth one of its own
OUTSTANDING = 4  # partial sums [T, D] of one layer that exist at once
LONG = 16  # tokens per copied expert from which its computation is worth a launch of its own
WAVES = 6  # launches for the copied experts of a long prompt, so that one sixth is not overlapped
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
        trace: bool = False,
    ) -> None:
        self.pool, self.cache, self.accelerator, self.threads = pool, cache, accelerator, threads
        self.meter = Meter(accelerator, len(pool.layers), trace)
        self.books = SimExecutor(cost)
        self.slot_bytes = max(layer.layout.expert_bytes for layer in pool.layers if layer)
        self.content: list[Content] = []
        self.arrivals: list[list[Any]] = []  # copies not yet waited for
        self.last_use: list[Any] = []  # the launch that last read the slot
        self.call: Call | None = None
        self.out: Tensor | None = None  # [T, D] float32 on the compute device, after the join
        self.cpu_end = 0.0  # when the CPU had done its share, in the latest step
        self.launched: Any = None  # the event after the latest step's last launch
        self.spent_s = 0.0  # in this class, in the latest step
        self._running: Running | None = None
        self.forecasts: Sequence[Forecast] = ()  # of the layers after the one that runs
        self._lent: deque[tuple[Any, int]] = deque()  # copies from the tier, and its slots
        self._late: list[Move] = []  # background copies whose experts are still on disk
        if pool.tier is not None:
            pool.tier.make_room = self._give_back_oldest

    def run(
        self, load: Load, plan: Plan, ready: np.ndarray, moves: list[Move], timeline: Timeline
    ) -> None:
        """Order the copies of a plan and launch its experts on the accelerator."""
        started = self.meter.now()
        self.books.run(load, plan, ready, moves, timeline)
        if self.pool.tier is not None:
            self._give_back()
            self._order_late(())
            moved = [move.expert for move in moves]
            self.pool.tier.want(load.layer, dict.fromkeys(moved + plan.cpu.tolist()))
        on_gpu = np.zeros(len(self.pool.layer(load.layer).blobs), np.int32)
        on_gpu[load.experts] = plan.shards
        moving = {move.expert for move in moves}
        slots = self.cache.slot[load.layer]
        here = {expert: int(slots[expert]) for expert in plan.gpu.tolist() if expert not in moving}
        launches: list[tuple[Tensor, Any]] = []
        copied: dict[int, int] = {}
        most, read_s = wave_size(load, plan), self.books.cost.of(load.layer).gpu_read
        if most == len(moves) and len(here) * read_s < LAUNCH_S:
            here, copied = {}, here  # so little that they may wait for the copies

        def launch(wave: dict[int, int]) -> None:
            if wave:
                launches.append(self._launch(load, wave, on_gpu))
            if len(launches) > OUTSTANDING:
                self._merge(launches)

        for move in moves:
            if move.slot in copied.values():  # a passing slot comes round again: use it first
                launch(here)
                launch(upto(copied, move.slot))
                here = {}
            self._order(move)
            copied[move.expert] = move.slot
            if most < len(moves) and len(copied) == most:
                launch(here)
                launch(copied)
                here, copied = {}, {}
        launch(here)  # these do not wait for any copy
        launch(copied)
        if self.call is not None and self.call.early is not None:
            self.call.early()  # behind the experts, before the CPU is busy
        self._running = Running(load, plan, on_gpu, launches)
        self.spent_s = self.meter.now() - started

    def copy(self, move: Move, timeline: Timeline) -> float:
        """Order one background copy; its predicted arrival is what the policies see."""
        started = self.meter.now()
        arrival = self.books.copy(move, timeline)
        tier = self.pool.tier
        if tier is None or tier.is_here(move.layer, move.expert):
            self._order(move)
        else:  # the host must not wait for the disk now: the copy follows the read
            tier.expect(move.layer, move.expert)
            self._late.append(move)
        self.spent_s += self.meter.now() - started
        return arrival

    def join(self, timeline: Timeline) -> None:
        """Compute the CPU's share, and sum it with the accelerator's where the model computes."""
        self.books.join(timeline)
        assert self._running is not None
        assert self.call is not None
        running, call, meter = self._running, self.call, self.meter
        load, on_gpu = running.load, running.on_gpu
        layer = self.pool.layer(load.layer)
        started = meter.now()
        total = self._cpu_share(call, load.layer, on_gpu) if running.plan.cpu.size else None
        computed = meter.now()
        if running.plan.cpu.size:
            meter.ran(cpu_span(load, running.plan, layer.layout.shards, started, computed))
        for partial, event in running.launches:
            self.accelerator.make_current_stream_wait(event)
            total = partial if total is None else total.add_(partial)
        self.out = total
        self.cpu_end = computed
        self.launched = running.launches[-1][1] if running.launches else None
        self.spent_s += meter.now() - started
        self._running = None

    def _merge(self, launches: list[tuple[Tensor, Any]]) -> None:
        """Add the second oldest partial sum to the oldest, and let its memory go."""
        (total, first), (partial, second) = launches[:2]
        self.accelerator.make_current_stream_wait(first)
        self.accelerator.make_current_stream_wait(second)
        launches[:2] = [(total.add_(partial), second)]

    def rebuild(self, moves: list[Move]) -> None:
        """Slots for the cache as it is now, filled by `moves`; nothing may be under way.

        Takes a new slab only where the number of slots has changed. Raises InsufficientMemoryError.
        """
        total = self.cache.slots + self.cache.staging if self.cache.slots else 0
        if total != len(self.content):
            self.content = []  # no slab, should there be no room for another one
            self.accelerator.allocate(total, self.slot_bytes)
        self.content = [NOTHING] * total
        self.arrivals = [[] for _ in range(total)]
        self.last_use = [None] * total
        self._running = None
        while self._lent:
            self._give_back_oldest(wait=False)  # who calls has waited for all copies
        self._late.clear()
        self.fill(moves)

    def fill(self, moves: list[Move]) -> None:
        """Copy the initial residents and wait for them."""
        for move in moves:
            self._order(move)
        for events in self.arrivals:
            for event in events:
                self.accelerator.wait(event)
        self.meter.settle()

    def _cpu_share(self, call: Call, index: int, on_gpu: np.ndarray) -> Tensor:
        """What the accelerator leaves of a layer, on its way to the compute device."""
        layer, workspace = self.pool.layer(index), self.pool.workspace
        shards = np.empty((on_gpu.size, 2), np.int32)
        shards[:, 0], shards[:, 1] = on_gpu, layer.layout.shards
        out = self.accelerator.buffer(call.x.shape)
        arrays = call.x, call.ids, call.weights, out, workspace
        if self.pool.tier is None:
            run_layer(layer, *arrays, threads=self.threads, shards=shards)
        else:
            job = Job(index, layer, *arrays, threads=self.threads, shards=shards)
            self.pool.tier.run(job, lambda: self._absent(self.forecasts[:1]))
        return self.accelerator.upload(out)

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
        blob, slot = layer.blobs[move.expert], -1
        if self.pool.tier is not None:
            blob, slot = self.pool.tier.borrow(move.layer, move.expert)
        source = blob[first * size : last * size]
        # Hazard: the launch that read the slot's former expert may still run.
        after = [self.last_use[move.slot]] if self.last_use[move.slot] is not None else []
        arrival = self.accelerator.copy(source, move.slot, first * size, after)
        self.arrivals[move.slot].append(arrival)
        if slot >= 0:
            self._lent.append((arrival, slot))
        what = label(move.expert, last - first, layer.layout.shards)
        span = Span(Lane.LINK, 0.0, 0.0, what, move.layer, bytes=source.size)
        self.meter.ordered(arrival, span)

    def _absent(self, forecasts: Sequence[Forecast]) -> list[Forecast]:
        """Forecasts without the experts that the accelerator has."""
        found = []
        for forecast in forecasts:
            absent = self.cache.slot[forecast.layer, forecast.experts] < 0
            experts, tokens, chances = (array[absent] for array in forecast[1:4])
            found.append(Forecast(forecast.layer, experts, tokens, chances, forecast.start))
        return found

    def _order_late(self, slots: Collection[int]) -> None:
        """Order late copies whose experts have come; those into `slots` wait for theirs."""
        tier, late = self.pool.tier, self._late
        for move in late[:]:
            if self.cache.generation[move.slot] != move.generation:
                late.remove(move)  # the slot was given up meanwhile
            elif move.slot in slots or (tier and tier.is_here(move.layer, move.expert)):
                late.remove(move)
                self._order(move)

    def _give_back(self) -> None:
        """Let the tier have the slots again whose copies have happened."""
        while self._lent and self.accelerator.happened(self._lent[0][0]):
            self._give_back_oldest(wait=False)

    def _give_back_oldest(self, wait: bool = True) -> bool:
        if not self._lent or self.pool.tier is None:
            return False
        if wait:
            self.accelerator.wait(self._lent[0][0])
        self.pool.tier.release(self._lent.popleft()[1])
        return True

    def _launch(self, load: Load, wave: dict[int, int], on_gpu: np.ndarray) -> tuple[Tensor, Any]:
        """Start some experts on the accelerator: their partial sum, and the event completing it."""
        assert self.call is not None
        index, nowhere = load.layer, len(self.content)
        after, happened = [], self.accelerator.happened
        if self._late:
            self._order_late(wave.values())
        for expert, slot in wave.items():
            held = self.content[slot]
            if held.expert != expert or held.layer != index:
                raise PolicyError(f"slot {slot} holds {held}, not expert {expert} of layer {index}")
            if self.arrivals[slot]:
                waiting = [event for event in self.arrivals[slot] if not happened(event)]
                after += waiting  # hazard: its weights may still be on the wire
                self.arrivals[slot] = waiting
        call, layer = self.call, self.pool.layer(index)
        pairs = np.array(list(wave.items()), np.int64)
        ids, shards = place_in_slots(pairs, on_gpu, call.ids, nowhere)
        partial = torch.empty_like(call.hidden, dtype=torch.float32)
        event = self.accelerator.experts(
            layer, call.hidden, ids, call.weights, shards, partial, after
        )
        for slot in wave.values():
            self.last_use[slot] = event
        self.meter.ordered(event, gpu_span(load, wave, on_gpu, layer.layout.shards))
        return partial, event


def wave_size(load: Load, plan: Plan) -> int:
    """How many copied experts to launch together: all of them where each has little to compute.

    With many tokens the first ones compute while the others are still on the wire.
    """
    if not plan.copies.size or load.tokens.sum() < LONG * plan.copies.size:
        return plan.copies.size  # as in decode; looking further takes 15 us
    tokens = load.tokens[np.isin(load.experts, plan.copies)].sum()
    few = tokens < LONG * plan.copies.size
    return plan.copies.size if few else -(-plan.copies.size // WAVES)


def upto(wave: dict[int, int], slot: int) -> dict[int, int]:
    """Take a wave's experts off it, up to the one in this slot."""
    first = {}
    for expert in list(wave):
        first[expert] = wave.pop(expert)
        if first[expert] == slot:
            break
    return first


def cpu_span(load: Load, plan: Plan, shards: int, start: float, end: float) -> Span:
    """The CPU's share of a layer; an expert that is divided counts as a part of one."""
    experts, tokens = left_to_cpu(plan.shards, load.tokens, shards)
    what = f"layer {load.layer}: {plan.cpu.size} experts"
    return Span(Lane.CPU, start, end - start, what, load.layer, experts, tokens)


def gpu_span(load: Load, wave: dict[int, int], on_gpu: np.ndarray, shards: int) -> Span:
    """One launch on the accelerator; its times are read later."""
    tokens = dict(zip(load.experts.tolist(), load.tokens.tolist()))
    experts = computed = 0
    for expert in wave:  # a third of the time of arrays so short
        part = on_gpu.item(expert)
        experts += part
        computed += part * tokens[expert]
    what = f"layer {load.layer}: {len(wave)} experts"
    return Span(Lane.GPU, 0.0, 0.0, what, load.layer, experts / shards, computed / shards)
