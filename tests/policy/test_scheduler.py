"""What every scheduler must do, and what makes each one itself."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import examples, make_cost, make_load

from hybrimoe.errors import PlanError
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.plan import Plan, by_tokens, makespan, place, validate
from hybrimoe.policy.routing import Load
from hybrimoe.policy.schedulers import (
    DALI,
    CpuOnly,
    Fiddler,
    Hybrid,
    LayerWise,
    OnDemand,
    Scheduler,
    Split,
    Static,
)
from hybrimoe.policy.timeline import Array, Lane, Timeline

seconds = st.floats(0.01, 4.0)


@st.composite
def layers(draw: st.DrawFn, most: int = 8) -> tuple[Load, Array, Timeline, CostModel]:
    """A layer with residents, absent experts and some on the wire, on a random machine."""
    tokens = draw(st.lists(st.integers(1, 40), min_size=1, max_size=most))
    places = [draw(st.sampled_from([0.0, 0.0, math.inf, math.inf, 0.7, 1.9])) for _ in tokens]
    alone, bandwidth = draw(seconds), draw(st.floats(5.0, 200.0))
    cost = make_cost(
        cpu_first=draw(seconds),
        cpu_expert=alone,
        cpu_token=draw(seconds) / 10,
        gpu_read=draw(seconds) / 4,
        gpu_token=draw(seconds) / 40,
        gpu_launch=draw(seconds) / 40,
        link_latency=draw(seconds) / 40,
        link_bandwidth=bandwidth,
        cpu_expert_contended=alone * draw(st.floats(1.0, 2.0)),
        link_bandwidth_contended=bandwidth * draw(st.floats(0.5, 1.0)),
    )
    timeline = Timeline()
    timeline.free[Lane.LINK] = draw(st.sampled_from([0.0, 1.0]))
    return make_load(tokens), np.array(places), timeline, cost


def price(on_gpu: Array, load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> float:
    return place(load, ready, np.asarray(on_gpu, bool), timeline, cost).makespan


def pure(load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> float:
    modes = (np.isfinite(ready), np.ones(ready.size), np.zeros(ready.size))
    return min(price(mode, load, ready, timeline, cost) for mode in modes)


def optimum(load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> float:
    """The best of all 2^A placements."""
    sides = itertools.product((False, True), repeat=ready.size)
    return min(price(np.array(s), load, ready, timeline, cost) for s in sides)


def shard_optimum(load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> float:
    """The best of all placements of shards of absent experts, and of whole residents."""
    lanes, order = np.maximum(timeline.free - timeline.now, 0), by_tokens(load.tokens)
    ways = [(0, cost.shards) if r < math.inf else range(cost.shards + 1) for r in ready]
    return min(
        makespan(load.tokens, ready, lanes, cost.vector, np.array(share, np.int32), order)
        for share in itertools.product(*ways)
    )


class SchedulerContract:
    """What every scheduler must do. Subclass it and set `make`."""

    make: type[Scheduler]

    @given(layers())
    @examples(60)
    def test_runs_every_activated_expert_exactly_once(self, case) -> None:
        load, ready, timeline, cost = case
        plan = self.make().plan(load, ready, timeline, cost)
        validate(plan, load, ready, cost.shards, self.make.__name__)
        assert plan.makespan > 0

    @given(layers())
    @examples(30)
    def test_plans_the_same_twice_and_leaves_its_arguments_alone(self, case) -> None:
        load, ready, timeline, cost = case
        before = load.tokens.copy(), ready.copy(), timeline.free.copy()
        first = self.make().plan(load, ready, timeline, cost)
        second = self.make().plan(load, ready, timeline, cost)
        assert [np.asarray(a).tolist() for a in first] == [np.asarray(b).tolist() for b in second]
        for old, new in zip(before, (load.tokens, ready, timeline.free)):
            assert old.tolist() == new.tolist()

    @given(layers(most=5))
    @examples(30)
    def test_gains_are_makespans_without_minus_with(self, case) -> None:
        load, ready, timeline, cost = case
        scheduler = self.make()
        gains = scheduler.gains(load, ready, timeline, cost)
        before = scheduler.plan(load, ready, timeline, cost).makespan
        for i in range(ready.size):
            moved = ready.copy()
            moved[i] = 0.0
            after = scheduler.plan(load, moved, timeline, cost).makespan
            assert gains[i] == pytest.approx(before - after if ready[i] > 0 else 0.0, abs=1e-9)

    def test_plans_an_idle_layer(self) -> None:
        plan = self.make().plan(make_load([]), np.zeros(0), Timeline(), make_cost())
        assert plan.gpu.size == plan.cpu.size == plan.copies.size == 0

    def test_shifting_the_clock_changes_nothing(self) -> None:
        load, ready = make_load([3, 1, 2]), np.array([0.0, math.inf, math.inf])
        late = Timeline(now=1024.0)
        here = self.make().plan(load, ready, Timeline(), make_cost())
        there = self.make().plan(load, ready, late, make_cost())
        assert here.gpu.tolist() == there.gpu.tolist()
        assert here.makespan == there.makespan


class TestHybrid(SchedulerContract):
    make = Hybrid

    @given(layers())
    @examples(200)
    def test_never_slower_than_a_pure_mode(self, case) -> None:
        assert Hybrid().plan(*case).makespan <= pure(*case) * (1 + 1e-12)

    @given(layers())
    @examples(100)
    def test_no_single_expert_is_better_off_on_the_other_side(self, case) -> None:
        plan = Hybrid().plan(*case)
        for i in range(plan.shards.size):
            on_gpu = plan.shards > 0
            on_gpu[i] = not on_gpu[i]
            assert price(on_gpu, *case) >= plan.makespan * (1 - 1e-8)

    def test_the_papers_example_steals_a_resident_and_copies_an_absent_expert(self) -> None:
        # Fig. 5: the GPU takes 1 unit per expert, the CPU one per token, a copy 3 units.
        cost = make_cost(
            cpu_first=0.0,
            cpu_expert=1e-9,
            cpu_expert_contended=1e-9,
            gpu_token=0.0,
            link_bandwidth=100 / 3,
            link_bandwidth_contended=100 / 3,
        )
        load = make_load([1, 1, 4, 1, 1, 1])
        ready = np.array([math.inf, math.inf, math.inf, 0.0, 0.0, 0.0])
        plan = Hybrid().plan(load, ready, Timeline(), cost)
        assert 2 in plan.gpu
        assert plan.copies.tolist() == [2]
        assert plan.makespan == pytest.approx(4.0, abs=1e-6)

    def test_refuses_a_copy_that_comes_too_late(self) -> None:
        load, ready = make_load([1, 1]), np.array([0.0, math.inf])
        plan = Hybrid().plan(load, ready, Timeline(), make_cost())
        assert plan.copies.size == 0
        assert plan.cpu.tolist() == [1]

    def test_an_expert_on_the_wire_is_waited_for_only_if_that_is_sooner(self) -> None:
        load = make_load([2, 2])
        soon = Hybrid().plan(load, np.array([0.0, 1.0]), Timeline(), make_cost())
        late = Hybrid().plan(load, np.array([0.0, 9.0]), Timeline(), make_cost())
        assert soon.gpu.tolist() == [0, 1]
        assert soon.copies.size == 0
        assert late.cpu.tolist() == [1]

    def test_is_within_ten_percent_of_the_optimum_on_average(self) -> None:
        excess = _excess(Hybrid(), optimum, cases=400, most=8)
        print("hybrid over the optimum:", _distribution(excess))
        assert excess.mean() < 0.10


class TestSplit(SchedulerContract):
    make = Split

    @given(layers())
    @examples(200)
    def test_never_slower_than_a_pure_mode(self, case) -> None:
        load, ready, timeline, cost = case
        residents = price(np.isfinite(ready), load, ready, timeline, cost)
        everything = price(np.ones(ready.size), load, ready, timeline, cost)
        cpu = price(np.zeros(ready.size), load, ready, timeline, cost)
        plan = Split().plan(*case)
        assert plan.makespan <= min(residents, everything, cpu) * (1 + 1e-9)

    def test_divides_one_absent_expert_so_that_both_sides_end_together(self) -> None:
        cost = make_cost(cpu_first=0.0, cpu_expert=4.0, cpu_expert_contended=4.0, cpu_token=1e-9)
        plan = Split().plan(make_load([1]), np.array([math.inf]), Timeline(), cost)
        assert plan.gpu.tolist() == plan.cpu.tolist() == plan.copies.tolist() == [0]
        assert 0 < plan.shards[0] < cost.shards
        assert plan.makespan < min(4.0, cost.link(100) + cost.gpu(1))

    def test_approaches_the_fluid_optimum_as_shards_get_smaller(self) -> None:
        # x of the expert over the link: 4 x + x on the GPU = 4 (1 - x) on the CPU, so x = 4 / 9.
        fluid, spans = 4 * (1 - 4 / 9), []
        for shards in (1, 4, 16, 64):
            cost = make_cost(
                cpu_first=0.0,
                cpu_expert=4.0,
                cpu_expert_contended=4.0,
                cpu_token=1e-12,
                shards=shards,
            )
            load = make_load([1])
            spans.append(Split().plan(load, np.array([math.inf]), Timeline(), cost).makespan)
        assert spans == sorted(spans, reverse=True)
        assert fluid <= spans[-1] <= fluid * 1.03

    def test_is_within_ten_percent_of_the_shard_optimum_on_average(self) -> None:
        excess = _excess(Split(), shard_optimum, cases=120, most=5)
        print("split over the optimum of shards:", _distribution(excess))
        assert excess.mean() < 0.10

    def test_beats_whole_experts_on_average(self) -> None:
        whole, parts = [], []
        for case in _cases(300, 8):
            whole.append(Hybrid().plan(*case).makespan)
            parts.append(Split().plan(*case).makespan)
        assert sum(parts) < 0.98 * sum(whole)


class TestStatic(SchedulerContract):
    make = Static

    def test_residents_on_the_gpu_and_the_rest_on_the_cpu(self) -> None:
        ready = np.array([0.0, math.inf, 0.0])
        plan = Static().plan(make_load([1, 2, 3]), ready, Timeline(), make_cost())
        assert plan.gpu.tolist() == [2, 0]
        assert plan.cpu.tolist() == [1]

    def test_spills_what_has_many_tokens(self) -> None:
        ready = np.array([math.inf, math.inf])
        plan = Static(spill=10).plan(make_load([10, 11]), ready, Timeline(), make_cost())
        assert plan.copies.tolist() == [1]


class TestLayerWise(SchedulerContract):
    make = LayerWise

    def test_keeps_a_layer_together(self) -> None:
        load = make_load([1, 1])
        part = LayerWise().plan(load, np.array([0.0, math.inf]), Timeline(), make_cost())
        whole = LayerWise().plan(load, np.zeros(2), Timeline(), make_cost())
        many = LayerWise().plan(make_load([1, 32]), np.full(2, math.inf), Timeline(), make_cost())
        assert part.cpu.size == 2
        assert whole.gpu.size == 2
        assert many.copies.size == 2


class TestOnDemand(SchedulerContract):
    make = OnDemand

    def test_fetches_every_miss(self) -> None:
        ready = np.array([0.0, math.inf])
        plan = OnDemand().plan(make_load([1, 1]), ready, Timeline(), make_cost())
        assert plan.copies.tolist() == [1]
        assert plan.cpu.size == 0


class TestCpuOnly(SchedulerContract):
    make = CpuOnly


class TestFiddler(SchedulerContract):
    make = Fiddler

    def test_takes_the_cheaper_side_for_each_miss(self) -> None:
        load, ready = make_load([1, 9]), np.full(2, math.inf)
        plan = Fiddler().plan(load, ready, Timeline(), make_cost())
        assert plan.copies.tolist() == [1]
        assert plan.cpu.tolist() == [0]


class TestDALI(SchedulerContract):
    make = DALI

    def test_is_near_the_optimum(self) -> None:
        excess = _excess(DALI(), optimum, cases=200, most=7)
        print("dali over the optimum:", _distribution(excess))
        assert np.median(excess) < 0.25


def test_a_plan_that_forgets_or_repeats_an_expert_is_refused() -> None:
    load, ready = make_load([1, 1, 1]), np.array([0.0, math.inf, 0.0])
    good = Static().plan(load, ready, Timeline(), make_cost())
    ids = np.array([0, 2, 1], np.int32)
    wrong = {
        "forgets": good._replace(cpu=good.cpu[:0]),
        "repeats": good._replace(gpu=np.array([0, 0, 2], np.int32)),
        "invents": good._replace(gpu=np.array([0, 2, 7], np.int32)),
        "no copy": good._replace(gpu=ids, cpu=ids[:0], shards=np.full(3, 4, np.int32)),
        "shards": good._replace(shards=np.array([9, 0, 4], np.int32)),
        "short": good._replace(shards=good.shards[:1]),
    }
    for plan in wrong.values():
        with pytest.raises(PlanError, match="Mine"):
            validate(plan, load, ready, 4, "Mine")
    with pytest.raises(PlanError, match="nan seconds"):
        validate(good._replace(makespan=math.nan), load, ready, 4, "Mine")
    with pytest.raises(PlanError, match="Mine returned no plan"):
        validate((1, 2, 3), load, ready, 4, "Mine")  # type: ignore[arg-type]


def test_a_scheduler_of_four_lines_gets_its_gains_from_the_base_class() -> None:
    class Mine(Scheduler):
        def plan(self, load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> Plan:
            return place(load, ready, np.isfinite(ready), timeline, cost)

    load, ready = make_load([1, 4]), np.full(2, math.inf)
    gains = Mine().gains(load, ready, Timeline(), make_cost())
    assert gains[1] > gains[0] > 0


def _cases(count: int, most: int) -> list[tuple[Load, Array, Timeline, CostModel]]:
    """Decode and small batches on random machines, the same every time."""
    rng, cases = np.random.default_rng(0), []
    for _ in range(count):
        size = int(rng.integers(2, most + 1))
        tokens = rng.integers(1, int(rng.choice([2, 4, 30])), size).tolist()
        ready = np.where(rng.random(size) < rng.uniform(0.1, 0.9), 0.0, math.inf)
        expert = rng.uniform(0.5, 4)
        cost = make_cost(
            cpu_first=rng.uniform(0, 0.5),
            cpu_expert=expert,
            cpu_token=rng.uniform(0.01, 1),
            gpu_read=rng.uniform(0.1, 1),
            gpu_token=rng.uniform(0.001, 0.1),
            link_bandwidth=100 / rng.uniform(0.5, 6),
            cpu_expert_contended=expert * rng.uniform(1, 1.5),
        )
        cases.append((make_load(tokens), ready, Timeline(), cost))
    return cases


def _excess(scheduler: Scheduler, best, cases: int, most: int) -> Array:
    found = [scheduler.plan(*c).makespan / best(*c) - 1 for c in _cases(cases, most)]
    assert min(found) > -1e-9
    return np.array(found)


def _distribution(excess: Array) -> str:
    shares = (50, 90, 99, 100)
    parts = [f"p{s} {np.percentile(excess, s):.1%}" for s in shares]
    return f"mean {excess.mean():.2%}, " + ", ".join(parts)
