"""The engine against an executor that keeps track of what every slot really holds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import examples, make_cost

from hybrimoe.errors import PlanError
from hybrimoe.policy.cache import Cache, Move
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.engine import Engine, Policies
from hybrimoe.policy.forecasts import Markov
from hybrimoe.policy.plan import Plan
from hybrimoe.policy.prediction import SimExecutor
from hybrimoe.policy.prefetchers import Impact, Never, NextLayer
from hybrimoe.policy.presets import PRESETS
from hybrimoe.policy.rankings import LRU, MRS
from hybrimoe.policy.routing import Forecast, Load
from hybrimoe.policy.schedulers import Hybrid, OnDemand, Scheduler, Split, Static
from hybrimoe.policy.timeline import Array, Timeline


class Memory(SimExecutor):
    """Predicts like the simulator, and checks each use of a slot against what was copied there."""

    def __init__(self, cost: CostModel, cache: Cache) -> None:
        super().__init__(cost)
        self.cache = cache
        self.holds: dict[int, tuple[int, int, set[int]]] = {}
        self.running: set[int] = set()

    def write(self, move: Move) -> None:
        assert move.slot not in self.running or move.slot >= self.cache.slots
        assert move.slot >= self.cache.slots or (
            self.cache.generation[move.slot] == move.generation
            and self.cache.slot[move.layer, move.expert] == move.slot
        )
        shards = set(
            range(move.first, self.cost.of(move.layer).shards if move.last < 0 else move.last)
        )
        layer, expert, present = self.holds.get(move.slot, (-1, -1, set()))
        kept = present if (layer, expert) == (move.layer, move.expert) else set()
        self.holds[move.slot] = (move.layer, move.expert, kept | shards)

    def run(
        self, load: Load, plan: Plan, ready: Array, moves: list[Move], timeline: Timeline
    ) -> None:
        assert [m.expert for m in moves] == plan.copies.tolist()
        placed = {m.expert: m for m in moves}
        for i, expert in enumerate(load.experts.tolist()):
            if plan.shards[i] == 0:
                continue
            move = placed.get(expert)
            if move is not None:
                self.write(move)
            slot = move.slot if move else int(self.cache.slot[load.layer, expert])
            layer, held, shards = self.holds[slot]
            assert (layer, held) == (load.layer, expert)
            assert shards >= set(range(plan.shards[i]))
            if slot < self.cache.slots:
                self.running.add(slot)
        super().run(load, plan, ready, moves, timeline)

    def copy(self, move: Move, timeline: Timeline) -> float:
        rest = move.first > 0  # the other shards of one that runs may follow into its slot
        running = self.running
        if rest:
            self.running = running - {move.slot}
        self.write(move)
        self.running = running
        return super().copy(move, timeline)

    def join(self, timeline: Timeline) -> None:
        self.running = set()
        super().join(timeline)


def build(policies: Policies, cost: CostModel, slots: int = 7) -> tuple[Engine, Memory]:
    cache = Cache(policies.ranking, slots, 3, 8, 2)
    executor = Memory(cost, cache)
    for move in cache.fill(np.random.default_rng(0).random((3, 8))):
        executor.write(move)
    table = Markov(3, 8, 2, depth=max(policies.prefetcher.depth, 1))
    return Engine(policies, cache, cost, executor, forecaster=table), executor


def token(rng: np.random.Generator, layer: int, most: int = 1) -> Load:
    count = int(rng.integers(1, 5))
    experts = rng.choice(8, count, replace=False, p=np.arange(1, 9) / 36).astype(np.int32)
    tokens = rng.integers(1, most + 1, count).astype(np.int32)
    scores = np.zeros(8, np.float32)
    scores[experts] = rng.random(count)
    return Load(layer, experts, tokens, scores)


POLICIES = [
    *PRESETS.values(),
    Policies(Split(), MRS(admission=True, backfill=True), NextLayer(depth=2, timely=False)),
    Policies(Hybrid(), LRU(scope="model"), Impact(depth=2, gated=False, timely=False)),
]


@pytest.mark.parametrize("policies", POLICIES)
@given(st.integers(0, 10_000), st.sampled_from([0.2, 1.0, 5.0, 50.0]), st.sampled_from([1, 20]))
@examples(12)
def test_no_expert_ever_runs_from_a_slot_that_does_not_hold_it(
    policies: Policies, seed: int, link: float, most: int
) -> None:
    cost = make_cost(link_bandwidth=100 * link, link_bandwidth_contended=80 * link)
    engine, _ = build(policies, cost)
    rng = np.random.default_rng(seed)
    for step in range(60):
        before = engine.timeline.now
        engine.step(token(rng, step % 3, most))
        assert engine.timeline.now > before
        assert (engine.cache.references == 0).all()


def test_background_copies_never_start_once_the_layer_has_ended() -> None:
    policies = Policies(Static(), MRS(alpha=0.5, backfill=True), NextLayer(timely=False))
    cost = make_cost(link_bandwidth=20.0, link_bandwidth_contended=20.0)
    engine, executor = build(policies, cost)
    rng, late, started = np.random.default_rng(0), [], 0
    original = executor.copy

    def copy(move: Move, timeline: Timeline) -> float:
        late.append(max(timeline.free[2], timeline.now) - timeline.now)
        return original(move, timeline)

    executor.copy = copy  # type: ignore[method-assign]
    for step in range(60):
        late.clear()
        plan = engine.step(token(rng, step % 3))
        started += len(late)
        assert all(start < plan.makespan for start in late)
    assert started


def ahead(layer: int, experts: list[int]) -> Forecast:
    ids = np.array(experts, np.int32)
    return Forecast(layer, ids, np.ones(ids.size, np.int32), np.full(ids.size, 0.9))


def background(policies: Policies, bandwidth: float) -> list[Move]:
    """What is copied while layers 0 and 1 run, each with an expert that misses and a forecast."""
    cost = make_cost(link_bandwidth=bandwidth, link_bandwidth_contended=bandwidth)
    engine, executor = build(policies, cost)
    here = [np.flatnonzero(engine.cache.resident(layer)) for layer in range(3)]
    absent = [np.flatnonzero(~engine.cache.resident(layer)) for layer in range(3)]
    found: list[Move] = []
    original = executor.copy

    def copy(move: Move, timeline: Timeline) -> float:
        found.append(move)
        return original(move, timeline)

    executor.copy = copy  # type: ignore[method-assign]
    for layer in range(2):
        ids = np.array([here[layer][0], absent[layer][0]], np.int32)
        scores = np.isin(np.arange(8), ids).astype(np.float32)
        load = Load(layer, ids, np.full(2, 4, np.int32), scores)
        engine.step(load, [ahead(layer + 1, absent[layer + 1][:2].tolist())])
    return found


def test_what_is_forecast_is_copied_before_what_missed() -> None:
    policies = Policies(Static(), MRS(alpha=0.5, backfill=True), NextLayer())
    order = [move.layer for move in background(policies, 500.0)]
    assert order[0] == 1
    assert 0 in order


@pytest.mark.parametrize("timely", [True, False])
def test_a_timely_prefetcher_starts_no_copy_that_would_be_late(timely: bool) -> None:
    policies = Policies(Static(), MRS(alpha=0.5), NextLayer(timely=timely))
    assert bool(background(policies, 10.0)) is not timely
    assert background(policies, 500.0)


def test_a_swap_that_would_not_end_in_the_idle_time_is_not_begun() -> None:
    policies = Policies(Static(), MRS(alpha=0.5, backfill=True), Never())
    assert not background(policies, 10.0)
    assert background(policies, 500.0)


@pytest.mark.parametrize("window", ["layer", "gap"])
def test_the_window_says_whether_copies_go_on_after_the_layer(window: str) -> None:
    policies = Policies(Static(), LRU(), NextLayer(window=window, timely=False))
    cost = make_cost(link_bandwidth=10.0, link_bandwidth_contended=10.0)
    engine, executor = build(policies, cost)
    rng, over = np.random.default_rng(0), 0
    original = executor.copy

    def copy(move: Move, timeline: Timeline) -> float:
        starts.append(max(timeline.free[2], timeline.now))
        return original(move, timeline)

    executor.copy = copy  # type: ignore[method-assign]
    for step in range(30):
        starts: list[float] = []
        start = engine.timeline.now
        plan = engine.step(token(rng, step % 3))
        over += sum(s >= start + plan.makespan for s in starts)
        engine.timeline.now += 6.0  # attention
    assert bool(over) is (window == "gap")


def test_a_divided_expert_that_stays_becomes_resident() -> None:
    policies = Policies(Split(), LRU(), Never())
    cost = make_cost(cpu_first=0.0, cpu_expert=4.0, cpu_expert_contended=4.0, cpu_token=1e-9)
    engine, _ = build(policies, cost)
    absent = int(np.flatnonzero(~engine.cache.resident(0))[0])
    scores = np.zeros(8, np.float32)
    load = Load(0, np.array([absent], np.int32), np.ones(1, np.int32), scores)
    plan = engine.step(load)
    assert 0 < plan.shards[0] < cost.shards
    for _ in range(4):
        engine.step(token(np.random.default_rng(1), 1))
    again = engine.cache.ready(0, load.experts, engine.timeline.now)
    assert again.tolist() == [0.0]


@pytest.mark.parametrize("link", [0.2, 1.0, 5.0])
def test_a_busy_link_does_not_tie_up_slots_with_experts_that_never_arrive(link: float) -> None:
    policies = Policies(Split(), MRS(admission=True, backfill=True), Never())
    cost = make_cost(link_bandwidth=100 * link, link_bandwidth_contended=100 * link, shards=16)
    engine, _ = build(policies, cost)
    rng = np.random.default_rng(0)
    for step in range(200):
        engine.step(token(rng, step % 3))
        assert np.isinf(engine.cache.arrival).sum() <= engine.backlog + 1


def test_more_experts_than_slots_pass_through_staging() -> None:
    engine, executor = build(Policies(OnDemand(), LRU(), Never()), make_cost(), slots=2)
    everyone = np.arange(8, dtype=np.int32)
    load = Load(2, everyone, np.full(8, 3, np.int32), np.ones(8, np.float32))
    plan = engine.step(load)
    assert plan.gpu.size == 8
    assert executor.uploads >= 7


def test_a_background_copy_whose_slot_was_given_up_is_not_sent() -> None:
    policies = Policies(Static(), MRS(alpha=0.5), NextLayer(timely=False))
    cost = make_cost(link_bandwidth=10.0, link_bandwidth_contended=10.0)
    engine, executor = build(policies, cost)
    rng = np.random.default_rng(0)
    for step in range(60):
        engine.step(token(rng, step % 3))
        if np.isinf(engine.cache.arrival).any():
            break
    slot = int(np.flatnonzero(np.isinf(engine.cache.arrival))[0])
    layer, expert = engine.cache.owner[slot]
    given_up, sent = (slot, int(engine.cache.generation[slot])), []
    original = executor.copy

    def copy(move: Move, timeline: Timeline) -> float:
        sent.append((move.slot, move.generation))
        return original(move, timeline)

    executor.copy = copy  # type: ignore[method-assign]
    engine.cache.drop(layer, expert)
    for layer in (0, 1, 2, 0, 1, 2):
        engine.step(token(rng, layer))
    assert sent
    assert given_up not in sent


def test_a_policy_that_breaks_its_contract_is_named() -> None:
    class Broken(Scheduler):
        def plan(self, load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> Plan:
            none = np.zeros(0, np.int32)
            return Plan(none, none, none, np.zeros(ready.size, np.int32), 1.0)

    engine, _ = build(Policies(Broken(), LRU(), Never()), make_cost())
    with pytest.raises(PlanError, match="Broken broke its contract in layer 1"):
        engine.step(token(np.random.default_rng(0), 1))


def test_hits_and_misses_are_counted_by_what_was_resident() -> None:
    engine, _ = build(Policies(Static(), LRU(), Never()), make_cost())
    held = np.flatnonzero(engine.cache.resident(0)).astype(np.int32)
    load = Load(0, held, np.ones(held.size, np.int32), np.zeros(8, np.float32))
    engine.step(load)
    assert (engine.hits, engine.misses, engine.late) == (held.size, 0, 0)
    assert math.isfinite(engine.timeline.now)
