"""One layer step: plan, observe, admit, run, prefetch. The same for a real model and a replay."""

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from hybrimoe.errors import PolicyError
from hybrimoe.policy.cache import Cache, Move
from hybrimoe.policy.checked import checked_prefetcher, checked_ranking, checked_scheduler
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.forecasts import Markov, Trust
from hybrimoe.policy.plan import Plan, validate
from hybrimoe.policy.prefetchers import Prefetcher
from hybrimoe.policy.rankings import Ranking
from hybrimoe.policy.routing import Forecast, Load
from hybrimoe.policy.schedulers import Scheduler
from hybrimoe.policy.slots import tally
from hybrimoe.policy.timeline import Array, Lane, Timeline
from hybrimoe.policy.transitions import by_worth

LINK = int(Lane.LINK)
RECENT = 8  # layers whose absent experts are candidates for the link's idle time
SPARE = 0.05  # weight of the newest layer in how much idle time a layer leaves the link


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

    cost: of the model's experts; `cost.of(layer)` is what plans of a layer are made and checked by.
    forecaster: makes the forecasts of layers for which the caller has none.
    fallback: whose policy takes over from one that fails; without it a failure is an error.
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
        fallback: Policies | None = None,
        piece_s: float = 150e-6,
        backlog: int = 2,
    ) -> None:
        self.policies, self.fallback = _checked(policies), fallback
        self.cache, self.cost, self.executor = cache, cost, executor
        cache.ranking = self.policies.ranking
        self.replaced: dict[str, str] = {}  # kind of a policy that failed, and how it did
        self.timeline = Timeline() if timeline is None else timeline
        self.depth = policies.prefetcher.depth
        self.forecaster = forecaster if self.depth else None
        self.trust = Trust(max(self.depth, 1))
        self.hits = self.misses = self.late = 0
        self.prefetched = self.prefetches_used = 0
        self._unused: dict[int, int] = {}  # slot and stamp of prefetched experts not yet asked for
        # Shards of one layer say nothing of another's.
        self.pieces = [_piece(cost.of(layer), piece_s) for layer in range(cache.layers)]
        self.backlog = backlog
        self._pending: list[Move] = []  # slots claimed in the background, and what they still lack
        self._period = 0.0  # seconds from one layer's start to the next, as last seen
        self._started = 0.0
        self._spare = 0.0  # seconds that the link is idle per layer, of late
        self._gap = 0.0  # seconds from the end of a layer's experts to the start of the next one's
        self._ended = 0.0
        self._half_piece_s = max(
            piece * _shard_s(cost.of(layer)) / 2 for layer, piece in enumerate(self.pieces)
        )

    def step(self, load: Load, forecasts: Sequence[Forecast] = ()) -> Plan:
        """Run one layer that starts at `timeline.now`."""
        cache, now = self.cache, self.timeline.now
        ready = cache.ready(load.layer, load.experts, now)
        self._count(load.layer, ready, now)
        if self._unused:
            self._count_used(load, ready)
        try:
            load = self._observe(load, ready)
        except PolicyError as error:
            self._replace(error)
            load = self._observe(load, ready)
        return self._carry_out(load, ready, forecasts)

    def _observe(self, load: Load, ready: Array) -> Load:
        """Learn from a load; where not every copy stays, put its worthiest experts first."""
        cache = self.cache
        cache.observe(load)
        if not cache.ranking.admission or cache.crowded or load.experts.size < 2:
            return load
        worth = cache.ranking.worth(cache.books)
        experts, tokens = by_worth(worth, load.layer, load.experts, load.tokens, ready)
        return Load(load.layer, experts, tokens, load.scores)

    def again(self, load: Load) -> Plan:
        """Plan and run a load once more that `step` observed but could not run to its end."""
        ready = self.cache.ready(load.layer, load.experts, self.timeline.now)
        return self._carry_out(load, ready, ())

    def abandon(self) -> None:
        """After a failure: nothing is pending any more, and no lane is busy."""
        self._pending.clear()
        self.timeline.free[:] = self.timeline.now

    def resize(self, slots: int) -> list[Move]:
        """`Cache.resize`, whose order of residents is a policy's to say."""
        try:
            return self.cache.resize(slots)
        except PolicyError as error:
            self._replace(error)
            return self.cache.resize(slots)

    def _carry_out(self, load: Load, ready: Array, forecasts: Sequence[Forecast]) -> Plan:
        timeline, cache = self.timeline, self.cache
        plan = self._plan(load, ready)
        moves = self._place(load, plan) if plan.copies.size else []
        held = cache.hold(load.layer, plan.gpu)
        try:
            self.executor.run(load, plan, ready, moves, timeline)
            self._background(load, plan, forecasts)
            self.executor.join(timeline)
        finally:
            cache.release(held)
        self._ended = timeline.now
        return plan

    def _plan(self, load: Load, ready: Array) -> Plan:
        scheduler, cost = self.policies.scheduler, self.cost.of(load.layer)
        try:
            plan = scheduler.plan(load, ready, self.timeline, cost)
        except PolicyError as error:
            self._replace(error)
            return self._plan(load, ready)
        validate(plan, load, ready, cost.shards, type(scheduler).__name__)
        return plan

    def _replace(self, error: PolicyError) -> None:
        """Let the fallback's policy take over from the one that failed; raise if there is none."""
        kind = error.kind
        if self.fallback is None or not kind or kind in self.replaced:
            raise error
        successor = getattr(self.fallback, kind)
        self.policies = dataclasses.replace(self.policies, **{kind: successor})
        self.replaced[kind] = str(error)
        if kind == "ranking":
            self.cache.rank_by(self.policies.ranking)
        elif kind == "prefetcher":
            self.depth = self.policies.prefetcher.depth
            self.trust = Trust(max(self.depth, 1))
        warnings.warn(
            f"{error}; {type(successor).__name__} takes its place", RuntimeWarning, stacklevel=4
        )

    def _count(self, layer: int, ready: Array, now: float) -> None:
        here, absent = tally(ready)
        self.hits += here
        self.misses += absent
        self.late += ready.size - here - absent
        if layer:
            self._gap = now - self._ended
        if layer == 1:
            self._period = now - self._started
        elif layer == 0:
            self._started = now

    def _count_used(self, load: Load, ready: Array) -> None:
        """Count prefetched experts that are asked for while they are there or on the wire."""
        cache = self.cache
        for expert in load.experts[ready < np.inf].tolist():
            slot = cache.slot.item(load.layer, expert)
            stamp = self._unused.pop(slot, None)
            self.prefetches_used += stamp == cache.generation.item(slot)

    def _place(self, load: Load, plan: Plan) -> list[Move]:
        """A slot for each expert the plan copies: one that stays, or one to pass through."""
        cache, layer, now, pending = self.cache, load.layer, self.timeline.now, self._pending
        shards = self.cost.of(layer).shards
        # A slot that waits for its rest serves nobody.
        least = shards if len(pending) >= self.backlog else 0
        wanted = (load, plan.copies, plan.shards, shards, now, least)
        try:
            rows = cache.admit_copies(*wanted)
        except PolicyError as error:  # of its ranking, before any slot has changed
            self._replace(error)
            rows = cache.admit_copies(*wanted)
        moves = []
        for expert, part, slot, generation, layer_before, before in rows:
            victim = layer_before, before
            if slot < 0 and pending and (claimed := self._claimed(layer, expert)):
                slot, generation, victim = claimed.slot, claimed.generation, claimed.victim
                cache.arrival[slot] = now if part == shards else np.inf
            elif slot < 0:
                slot, generation = cache.stage(layer, expert)[2:4]
            if part < shards and slot < cache.slots:  # what is left follows, as it is to stay
                rest = Move(layer, expert, slot, generation, part, shards, victim)
                pending.insert(0, rest)
            moves.append(Move(layer, expert, slot, generation, 0, part, victim))
        return moves

    def _claimed(self, layer: int, expert: int) -> Move | None:
        """Take an expert off the background copies, which are too late for it."""
        for i, move in enumerate(self._pending):
            if move.expert == expert and move.layer == layer:
                return self._pending.pop(i)
        return None

    def _background(self, load: Load, plan: Plan, forecasts: Sequence[Forecast]) -> None:
        """Use the link for as long as nothing that a layer waits for does."""
        idle = self.timeline.now + plan.makespan
        if self.policies.prefetcher.window == "gap":  # half a piece may run over
            idle += max(self._gap - self._half_piece_s, 0.0)
        left = self._left(idle)
        self._spare += SPARE * (left - self._spare)
        seen = self._look_ahead(load, forecasts, left > 0.0) if self.depth else ()
        self._fill_link(load, plan, seen, idle)

    def _left(self, idle: float) -> float:
        """Seconds for which the link may still start copies; the last may run over a little."""
        busy = max(self.timeline.free.item(LINK), self.timeline.now)
        return idle + self._half_piece_s - busy if busy < idle else 0.0

    def _fill_link(self, load: Load, plan: Plan, seen: Sequence[Forecast], idle: float) -> None:
        """What waits for its rest, then what will probably be asked for, then what missed."""
        free = self.timeline.free
        try:
            if self._pending:
                self._send(idle)
            if seen and free.item(LINK) < idle:
                self._prefetch(seen, idle)
            if self.cache.ranking.backfill and free.item(LINK) < idle:
                self._backfill(load, plan, idle)
        except PolicyError as error:
            self._replace(error)
            self._fill_link(load, plan, seen[: self.depth], idle)

    def _send(self, idle: float) -> None:
        """Copy what is pending, piece by piece, as far as it starts before `idle` ends."""
        pending, timeline = self._pending, self.timeline
        while pending and timeline.free.item(LINK) < idle:
            move = pending[0]
            layer, expert, slot, generation, first, _, victim = move
            if self.cache.generation[slot] != generation:
                pending.pop(0)  # the slot was given up meanwhile
                continue
            shards = self.cost.of(layer).shards
            last = min(first + self.pieces[layer], shards)
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
        """Copy absent experts that are worth more than residents, the best swap first.

        A prompt is not followed by its like: of its experts those are copied that missed. Half a
        copy would hold up the prefetches of the next layer.
        """
        cache, timeline = self.cache, self.timeline
        while self._left(idle) >= self.cost.load_s:  # of the largest: any layer's may be the best
            if cache.crowded:
                moves = cache.admit_each(load.layer, plan.cpu, load.experts, timeline.now, 1)
                move = moves[0] if moves else None
            else:
                move = cache.admit_best(load.layer, RECENT, timeline.now)
            if move is None:
                return
            self._enqueue(move, idle)

    def _prefetch(self, seen: Sequence[Forecast], idle: float) -> None:
        timeline, cache, policies = self.timeline, self.cache, self.policies
        prefetcher, first, left = policies.prefetcher, seen[0].layer, self._left(idle)

        def in_time(layer: int, left: float) -> bool:
            needed = self.cost.of(layer).load_s if prefetcher.timely else 0.0
            return left + (layer - first) * self._spare >= needed

        if not any(in_time(forecast.layer, left) for forecast in seen):
            return
        told, ahead = self._trusted(seen, idle), timeline.fork()
        ahead.now = told[0].start
        told = [forecast for forecast in told if in_time(forecast.layer, left)]
        wanted = prefetcher.wanted(told, cache, policies.scheduler, ahead, self.cost)
        for layer, expert in wanted:
            if not in_time(layer, self._left(idle)):
                continue
            keep = next(f.experts for f in told if f.layer == layer)
            move = cache.admit(layer, expert, keep, timeline.now, force=True)
            if move is not None:
                self.prefetched += 1
                self._unused[move.slot] = move.generation
                self._enqueue(move, idle)
            if timeline.free.item(LINK) >= idle:
                return

    def _look_ahead(self, load: Load, given: Sequence[Forecast], room: bool) -> Sequence[Forecast]:
        """What later layers will ask for, and the books of how far that comes true."""
        trust, forecaster = self.trust, self.forecaster
        trust.settle(load)
        if forecaster is not None:
            forecaster.observe(load)
            # Ids of single tokens say little of a prompt; without room nobody needs to know.
            if room and not (given or self.cache.crowded):
                given = forecaster.forecast(load.layer)
        seen = given[: self.depth]
        trust.expect(load.layer, seen)
        return seen

    def _trusted(self, seen: Sequence[Forecast], idle: float) -> list[Forecast]:
        """Forecasts as far as they can be trusted, with the time their layers will start."""
        trust, period = self.trust, self._period
        following = max(idle, self.timeline.now + period)
        return [
            Forecast(
                forecast.layer,
                forecast.experts,
                forecast.tokens,
                forecast.probability * min(trust.factor(d), 1.0),  # a share is never above one
                following + d * period,
            )
            for d, forecast in enumerate(seen)
        ]


def _shard_s(cost: CostModel) -> float:
    return cost.link(cost.expert_bytes) / cost.shards


def _piece(cost: CostModel, piece_s: float) -> int:
    """Shards of a copy that takes about so many seconds."""
    return min(max(round(piece_s / _shard_s(cost)), 1), cost.shards)


def _checked(policies: Policies) -> Policies:
    """The same policies, those that are not the library's own behind checks."""
    return Policies(
        checked_scheduler(policies.scheduler),
        checked_ranking(policies.ranking),
        checked_prefetcher(policies.prefetcher),
    )
