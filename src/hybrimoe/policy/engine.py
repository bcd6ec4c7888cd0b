"""One layer step: plan, observe, admit, run, prefetch. The same for a real model and a replay."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numba import njit

from hybrimoe.policy.cache import Cache, Move
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.forecaster import Markov, Trust
from hybrimoe.policy.prefetcher import Prefetcher
from hybrimoe.policy.ranking import Ranking
from hybrimoe.policy.routing import Forecast, Load
from hybrimoe.policy.scheduler import Plan, Scheduler, validate
from hybrimoe.policy.timeline import Array, Lane, Timeline

LINK = int(Lane.LINK)


class Executor(Protocol):
    """Carries plans out, and writes onto the timeline when each lane will be free.

    `run` starts a layer and returns; `copy` may follow while it runs; `join` ends it and moves the
    clock. So prefetching is decided while the experts already compute.
    """

    def run(
        self, load: Load, plan: Plan, ready: Array, moves: list[Move], timeline: Timeline
    ) -> None:
        """Start the copies the plan waits for, in order, then its experts."""

    def copy(self, move: Move, timeline: Timeline) -> float:
        """Start one copy behind all others and return when it will have arrived."""

    def join(self, timeline: Timeline) -> None:
        """Wait for the layer that runs, and set `timeline.now` to its end."""


@dataclass(frozen=True)
class Policies:
    """The three decisions a run is made of."""

    scheduler: Scheduler
    ranking: Ranking
    prefetcher: Prefetcher


class Engine:
    """Takes one layer after another through its policies and an executor.

    forecaster: makes the forecasts of layers for which the caller has none.
    piece_s: background copies go in runs of shards of about this long, so that a copy the next
        layer waits for is never held up for longer.
    backlog: with so many copies unfinished, a divided expert passes through instead of staying.
    """

    def __init__(
        self,
        policies: Policies,
        cache: Cache,
        cost: CostModel,
        executor: Executor,
        *,
        timeline: Timeline | None = None,
        forecaster: Markov | None = None,
        piece_s: float = 150e-6,
        backlog: int = 2,
    ) -> None:
        self.policies, self.cache, self.cost, self.executor = policies, cache, cost, executor
        self.timeline = Timeline() if timeline is None else timeline
        self.depth = policies.prefetcher.depth
        self.forecaster = forecaster if self.depth else None
        self.trust = Trust(max(self.depth, 1))
        self.hits = self.misses = self.late = 0
        shard_s = cost.link(cost.expert_bytes) / cost.shards
        self.piece = min(max(round(piece_s / shard_s), 1), cost.shards)
        self.backlog = backlog
        self._pending: list[Move] = []  # slots claimed in the background, and what they still lack
        self._period = 0.0  # seconds from one layer's start to the next, as last seen
        self._started = 0.0

    def step(self, load: Load, forecasts: Sequence[Forecast] = ()) -> Plan:
        """Run one layer that starts at `timeline.now`."""
        timeline, cache, cost = self.timeline, self.cache, self.cost
        now = timeline.now
        ready = cache.ready(load.layer, load.experts, now)
        self._count(load.layer, ready, now)
        cache.observe(load)
        scheduler = self.policies.scheduler
        plan = scheduler.plan(load, ready, timeline, cost)
        validate(plan, load, ready, cost.shards, type(scheduler).__name__)
        moves = self._place(load, plan) if plan.copies.size else []
        held = cache.hold(load.layer, plan.gpu)
        self.executor.run(load, plan, ready, moves, timeline)
        self._background(load, plan, forecasts)
        self.executor.join(timeline)
        cache.release(held)
        return plan

    def _count(self, layer: int, ready: Array, now: float) -> None:
        here, absent = _tally(ready)
        self.hits += here
        self.misses += absent
        self.late += ready.size - here - absent
        if layer == 1:
            self._period = now - self._started
        elif layer == 0:
            self._started = now

    def _place(self, load: Load, plan: Plan) -> list[Move]:
        """A slot for each expert the plan copies: one that stays, or one to pass through."""
        moves, cache, shards = [], self.cache, self.cost.shards
        layer, now = load.layer, self.timeline.now
        share = dict(zip(load.experts.tolist(), plan.shards.tolist()))
        copies = wanted = plan.copies
        if len(self._pending) >= self.backlog:  # a slot that waits for its rest serves nobody
            whole = [e for e in copies.tolist() if share[e] == shards]
            wanted = np.array(whole, np.int32)
        staying = {
            move.expert: move
            for move in cache.admit_each(layer, wanted, load.experts, now, wanted.size)
        }
        for expert in copies.tolist():
            move = staying.get(expert) or self._claimed(layer, expert)
            part = share[expert]
            if move is None:
                move = cache.stage(layer, expert)
            elif part < shards:  # what is left follows, as the expert is to stay
                cache.arrival[move.slot] = np.inf
                rest = Move(layer, expert, move.slot, move.generation, part, shards, move.victim)
                self._pending.insert(0, rest)
            else:
                cache.arrival[move.slot] = now
            moves.append(Move(layer, expert, move.slot, move.generation, 0, part, move.victim))
        return moves

    def _claimed(self, layer: int, expert: int) -> Move | None:
        """Take an expert off the background copies, which are too late for it."""
        for i, move in enumerate(self._pending):
            if move.expert == expert and move.layer == layer:
                return self._pending.pop(i)
        return None

    def _background(self, load: Load, plan: Plan, forecasts: Sequence[Forecast]) -> None:
        """Use the link for as long as nothing that a layer waits for does."""
        timeline = self.timeline
        idle = timeline.now + plan.makespan
        following = max(idle, timeline.now + self._period)
        seen = self._forecasts(load, forecasts, following) if self.depth else []
        self._send(idle)
        if self.cache.ranking.backfill and plan.cpu.size and timeline.free[LINK] < idle:
            self._backfill(load, plan, idle)
        if seen and timeline.free[LINK] < idle:
            self._prefetch(seen, idle)

    def _send(self, idle: float) -> None:
        """Copy what is pending, piece by piece, as far as it starts before `idle` ends."""
        pending, timeline, shards = self._pending, self.timeline, self.cost.shards
        while pending and timeline.free[LINK] < idle:
            move = pending[0]
            layer, expert, slot, generation, first, _, victim = move
            if self.cache.generation[slot] != generation:
                pending.pop(0)  # the slot was given up meanwhile
                continue
            last = min(first + self.piece, shards)
            piece = Move(layer, expert, slot, generation, first, last, victim)
            arrival = self.executor.copy(piece, timeline)
            if last == shards:
                self.cache.arrival[slot] = arrival
                pending.pop(0)
            else:
                pending[0] = Move(layer, expert, slot, generation, last, shards, victim)

    def _enqueue(self, move: Move, idle: float) -> None:
        self.cache.arrival[move.slot] = np.inf
        self._pending.append(move)
        self._send(idle)

    def _backfill(self, load: Load, plan: Plan, idle: float) -> None:
        """Copy experts that missed and ran on the CPU, the worthiest first."""
        cache, timeline = self.cache, self.timeline
        while timeline.free[LINK] < idle:
            moves = cache.admit_each(load.layer, plan.cpu, load.experts, timeline.now, 1)
            if not moves:
                return
            self._enqueue(moves[0], idle)

    def _prefetch(self, seen: list[Forecast], idle: float) -> None:
        timeline, cache, policies = self.timeline, self.cache, self.policies
        ahead = timeline.fork()
        ahead.now = seen[0].start
        wanted = policies.prefetcher.wanted(seen, cache, policies.scheduler, ahead, self.cost)
        for layer, expert in wanted:
            keep = next(f.experts for f in seen if f.layer == layer)
            move = cache.admit(layer, expert, keep, timeline.now, force=True)
            if move is not None:
                self._enqueue(move, idle)
            if timeline.free[LINK] >= idle:
                return

    def _forecasts(self, load: Load, given: Sequence[Forecast], following: float) -> list[Forecast]:
        """Forecasts as far as they can be trusted, with the time their layers will start."""
        trust, forecaster = self.trust, self.forecaster
        trust.settle(load)
        if forecaster is not None:
            forecaster.observe(load)
            if not (given or self.cache.crowded):  # ids of single tokens say little of a prompt
                given = forecaster.forecast(load.layer)
        seen = list(given[: self.depth])
        trust.expect(load.layer, seen)
        return [
            Forecast(
                forecast.layer,
                forecast.experts,
                forecast.tokens,
                forecast.probability * min(trust.factor(d), 1.0),  # a share is never above one
                following + d * self._period,
            )
            for d, forecast in enumerate(seen)
        ]


@njit(cache=True)
def _tally(ready: Array) -> tuple[int, int]:
    here = absent = 0
    for r in ready:
        here += r == 0.0
        absent += r == np.inf
    return here, absent
