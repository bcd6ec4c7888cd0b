"""Policies from outside: every kind of nonsense has an error that names the policy and the rule."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from policy_cases import make_cost, make_load

from hybrimoe.errors import ConfigError, PlanError, PolicyError
from hybrimoe.policy.cache import Cache
from hybrimoe.policy.checked import (
    CheckedRanking,
    checked_prefetcher,
    checked_ranking,
    checked_scheduler,
)
from hybrimoe.policy.engine import Engine, Policies
from hybrimoe.policy.forecasts import Markov
from hybrimoe.policy.plan import Plan
from hybrimoe.policy.prediction import SimExecutor
from hybrimoe.policy.prefetchers import Impact, Never, Prefetcher
from hybrimoe.policy.presets import PRESETS, preset
from hybrimoe.policy.rankings import LRU, MRS, Ranking
from hybrimoe.policy.routing import Forecast, Load
from hybrimoe.policy.schedulers import Scheduler, Split, Static
from hybrimoe.policy.timeline import Timeline

LOAD, READY = make_load([1, 1, 1], experts=8), np.array([0.0, math.inf, 0.0])
GOOD = Static().plan(LOAD, READY, Timeline(), make_cost())


class Says(Scheduler):
    """Returns or raises what it was made with."""

    def __init__(self, plan: Any = GOOD, gains: Any = None) -> None:
        self.answer, self.saved = plan, gains

    def plan(self, load, ready, timeline, cost):
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer

    def gains(self, load, ready, timeline, cost, arrival=0.0):
        return self.saved


def plan_of(answer: Any) -> Plan:
    return checked_scheduler(Says(answer)).plan(LOAD, READY, Timeline(), make_cost())


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (ZeroDivisionError("by zero"), "raised ZeroDivisionError: by zero"),
        (PolicyError("mine"), "raised PolicyError: mine"),
        (StopIteration(), "raised StopIteration"),
        (None, "plan must return a Plan, got NoneType None"),
        ((1, 2, 3), "plan must return a Plan, got tuple"),
        (GOOD._replace(gpu=[0, 2]), "gpu must be a one-dimensional array of integers, got list"),
        (GOOD._replace(cpu=np.ones(1)), "cpu must be a one-dimensional array of integers, got nd"),
        (GOOD._replace(shards=np.ones((3, 1), int)), r"shards must be .* int64 \(3, 1\)"),
        (GOOD._replace(gpu=np.array([0, 2 + 2**32])), "gpu must fit int32"),
        (GOOD._replace(gpu=np.array([0, 0, 2])), "in layer 0: an expert .* exactly once in gpu"),
        (GOOD._replace(gpu=np.array([0, 2, 99])), "in layer 0: .* exactly once in gpu"),
        (GOOD._replace(cpu=GOOD.cpu[:0]), "in layer 0: .* exactly once in cpu"),
        (GOOD._replace(copies=np.array([0])), "in layer 0: copies are not exactly the absent"),
        (GOOD._replace(shards=np.array([9, 0, 4])), "in layer 0: shards lie outside"),
        (GOOD._replace(shards=np.array([4])), "in layer 0: a result has the wrong length"),
        (GOOD._replace(makespan=math.nan), "makespan of layer 0 must be finite .*, got float nan"),
        (GOOD._replace(makespan=-1.0), "makespan of layer 0 must be finite .*, got float -1.0"),
        (GOOD._replace(makespan="soon"), "makespan of layer 0 must be finite .*, got str 'soon'"),
    ],
)
def test_a_plan_that_is_none_is_refused_by_name_rule_and_value(answer, message) -> None:
    with pytest.raises(PolicyError, match=f"^Says.* broke its contract.*{message}") as caught:
        plan_of(answer)
    assert caught.value.kind == "scheduler"
    assert isinstance(caught.value, PlanError) == (not isinstance(answer, BaseException))


def test_a_sound_plan_passes_as_a_copy_whatever_its_integers_are() -> None:
    mine = GOOD._replace(gpu=GOOD.gpu.astype(np.uint8), makespan=1)
    plan = plan_of(mine)
    assert plan.gpu.tolist() == GOOD.gpu.tolist()
    assert plan.gpu.dtype == plan.shards.dtype == np.int32
    assert plan.cpu is not mine.cpu


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_is_no_fault_of_a_policy(error) -> None:
    with pytest.raises(error):
        plan_of(error())


@pytest.mark.parametrize(
    ("gains", "message"),
    [
        (None, "gains must be an array of shape"),
        ([0.0, 0.0, 0.0], "gains must be an array of shape"),
        (np.zeros(2), r"gains must be an array of shape \(3,\)"),
        (np.zeros(3, np.float32), "gains must be float64"),
        (np.array([0.0, -1.0, 0.0]), "gains must be finite and not negative"),
        (np.array([0.0, math.inf, 0.0]), "gains must be finite and not negative"),
        (np.array([0.0, math.nan, 0.0]), "gains must be finite and not negative"),
    ],
)
def test_gains_that_are_none_are_refused(gains, message) -> None:
    with pytest.raises(PolicyError, match=f"Says.*{message}") as caught:
        checked_scheduler(Says(gains=gains)).gains(LOAD, READY, Timeline(), make_cost())
    assert caught.value.kind == "scheduler"


def test_gains_that_follow_from_plans_may_be_negative() -> None:
    class Mine(Scheduler):
        def plan(self, load, ready, timeline, cost):
            plan = Static().plan(load, ready, timeline, cost)
            return plan._replace(makespan=float(np.isfinite(ready).sum()))

    gains = checked_scheduler(Mine()).gains(LOAD, READY, Timeline(), make_cost())
    assert gains.tolist() == [0.0, -1.0, 0.0]


class Worth(Ranking):
    """Says that all experts are worth what its class was given; may break the books."""

    answer: Any = None
    broken: Any = None

    def observe(self, books, load):
        load.experts[:] = 0
        books.rate[:] = math.nan
        if self.broken is not None:
            books.score = self.broken

    def worth(self, books):
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, r"worth must be an array of shape \(2, 8\), got NoneType"),
        (np.zeros(8), r"worth must be an array of shape \(2, 8\)"),
        (np.zeros((2, 8), np.float32), "worth must be float64"),
        (np.full((2, 8), math.nan), "worth must not be NaN, it is for expert 0 of layer 0"),
    ],
)
def test_worth_that_is_none_is_refused_before_any_slot_changes(answer, message) -> None:
    kind = type("Mine", (Worth,), {"answer": answer})
    cache = Cache(checked_ranking(kind()), 4, 2, 8)
    with pytest.raises(PolicyError, match=f"Mine, given as cache, .*{message}") as caught:
        cache.admit(0, 1)
    assert caught.value.kind == "ranking"
    assert (cache.slot < 0).all()
    assert (cache.generation == 0).all()


def test_a_ranking_owns_nothing_but_the_score() -> None:
    cache = Cache(checked_ranking(Worth()), 4, 2, 8)
    load = make_load([1, 2], experts=8)
    cache.observe(load)
    assert np.isfinite(cache.books.rate).all()
    assert load.experts.tolist() == [0, 1]
    broken = type("Broken", (Worth,), {"broken": np.zeros(3)})
    with pytest.raises(PolicyError, match=r"Broken.*books.score must be an array of shape"):
        Cache(checked_ranking(broken()), 4, 2, 8).observe(load)


@dataclasses.dataclass(frozen=True)
class Wants(Prefetcher):
    answer: Any = None

    def wanted(self, forecasts, cache, scheduler, timeline, cost):
        cache.admit(1, 5)
        cache.books.rate[:] = math.nan
        forecasts[0].experts[:] = 0
        timeline.free[:] = math.inf
        return self.answer


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (None, "wanted must return a list of"),
        (iter([(1, 0)]), "wanted must return a list of"),
        ([3], "wanted must return pairs of integers, got int 3"),
        ([(1, 2.0)], "wanted must return pairs of integers"),
        ([(0, 1)], r"wanted must name layers of \[1\] and experts in \[0, 8\), got layer 0, exp"),
        ([(1, 8)], r"wanted must name .*, got layer 1, expert 8"),
        ([(1, -1)], r"wanted must name .*, got layer 1, expert -1"),
        ([(1, 2), (1, 2)], "wanted must name an expert once"),
    ],
)
def test_wishes_that_are_none_are_refused(answer, message) -> None:
    with pytest.raises(PolicyError, match=f"Wants, given as prefetcher, .*{message}") as caught:
        wishes(answer)
    assert caught.value.kind == "prefetcher"


def test_a_prefetcher_cannot_change_what_it_is_shown() -> None:
    found, cache, seen, timeline = wishes([(1, np.int64(3))])
    assert found == [(1, 3)]
    assert (cache.slot < 0).all()
    assert np.isfinite(cache.books.rate).all()
    assert seen.experts.tolist() == [4, 2]
    assert np.isfinite(timeline.free).all()


def wishes(answer: Any) -> tuple[list[tuple[int, int]], Cache, Forecast, Timeline]:
    ids = np.array([4, 2], np.int32)
    seen = Forecast(1, ids, np.ones(2, np.int32), np.array([0.9, 0.5]), 10.0)
    cache, timeline = Cache(LRU(), 4, 2, 8), Timeline()
    policy = checked_prefetcher(Wants(answer=answer))
    return policy.wanted([seen], cache, Split(), timeline, make_cost()), cache, seen, timeline


@pytest.mark.parametrize("name", PRESETS)
def test_the_librarys_own_policies_run_as_they_are(name) -> None:
    policies = preset(name)
    assert checked_scheduler(policies.scheduler) is policies.scheduler
    assert checked_ranking(policies.ranking) is policies.ranking
    assert checked_prefetcher(policies.prefetcher) is policies.prefetcher


def test_settings_that_no_policy_can_have_are_refused_at_the_start() -> None:
    with pytest.raises(ConfigError, match=r"Mine\.frozen must be a bool, got 'yes'"):
        checked_ranking(type("Mine", (Worth,), {})(frozen="yes"))
    with pytest.raises(ConfigError, match="depth must lie in"):
        checked_prefetcher(type("Mine", (Wants,), {"__post_init__": lambda self: None})(depth=9))
    with pytest.raises(ConfigError, match=r"Mine\.timely must be a bool, got 'no'"):
        checked_prefetcher(type("Mine", (Wants,), {})(timely="no"))
    theirs = checked_prefetcher(Wants(depth=3, window="layer", timely=False))
    assert (theirs.depth, theirs.window, theirs.timely) == (3, "layer", False)
    settings = checked_ranking(Worth(scope="model", backfill=True))
    assert isinstance(settings, CheckedRanking)
    assert (settings.scope, settings.backfill) == ("model", True)


def engine_of(fallback: Policies | None = None, **given: Any) -> Engine:
    policies = dataclasses.replace(Policies(Split(), MRS(backfill=True), Impact()), **given)
    cost = make_cost(link_bandwidth=300.0, link_bandwidth_contended=300.0)
    cache = Cache(policies.ranking, 6, 2, 8, 2)
    cache.fill()
    markov = Markov(2, 8, 2, depth=max(policies.prefetcher.depth, 1))
    executor = SimExecutor(cost)
    return Engine(policies, cache, cost, executor, forecaster=markov, fallback=fallback)


def steps(engine: Engine, count: int = 40) -> None:
    rng = np.random.default_rng(0)
    for step in range(count):
        experts = rng.choice(8, 2, replace=False).astype(np.int32)
        scores = np.zeros(8, np.float32)
        scores[experts] = 0.5
        engine.step(Load(step % 2, experts, np.ones(2, np.int32), scores))


FAULTY = {
    "scheduler": Says(None),
    "ranking": Worth(backfill=True),
    "prefetcher": Wants(),
}


@pytest.mark.parametrize("kind", FAULTY)
def test_one_that_fails_is_an_error_where_nobody_stands_in(kind) -> None:
    with pytest.raises(PolicyError, match=f"{type(FAULTY[kind]).__name__}.* broke its contract"):
        steps(engine_of(**{kind: FAULTY[kind]}))


@pytest.mark.parametrize("kind", FAULTY)
def test_one_that_fails_is_replaced_with_one_warning(kind) -> None:
    engine = engine_of(preset("hybrimoe"), **{kind: FAULTY[kind]})
    with pytest.warns(RuntimeWarning, match="broke its contract.* takes its place") as caught:
        steps(engine)
    assert len(caught) == 1
    assert list(engine.replaced) == [kind]
    assert getattr(engine.policies, kind) == getattr(preset("hybrimoe"), kind)
    assert engine.cache.ranking is engine.policies.ranking
    assert (engine.cache.references == 0).all()


def test_all_three_may_fail_in_one_run() -> None:
    engine = engine_of(preset("hybrimoe"), **FAULTY)
    with pytest.warns(RuntimeWarning, match="takes its place") as caught:
        steps(engine)
    assert len(caught) == 3
    assert engine.policies == preset("hybrimoe")


def test_the_layer_is_planned_again_by_the_one_that_stands_in() -> None:
    one, other = engine_of(preset("hybrimoe"), scheduler=Says(None)), engine_of()
    load = make_load([1, 1, 1, 1], experts=8)
    with pytest.warns(RuntimeWarning):
        plan = one.step(load)
    expected = other.step(load)
    assert [np.asarray(a).tolist() for a in plan] == [np.asarray(b).tolist() for b in expected]


def test_a_replaced_ranking_starts_with_new_books_and_the_same_residents() -> None:
    engine = engine_of(preset("hybrimoe"), ranking=Worth(backfill=True))
    before = engine.cache.slot.copy()
    engine.cache.rank_by(MRS(scope="model"))
    assert (engine.cache.slot == before).all()
    assert engine.cache.books.tick == 0
    assert engine.cache.resize(4)


def test_resizing_survives_a_ranking_that_fails() -> None:
    engine = engine_of(preset("hybrimoe"), ranking=Worth())
    with pytest.warns(RuntimeWarning, match="Worth"):
        moves = engine.resize(4)
    assert len(moves) == 4


def test_slots_are_let_go_where_a_policy_ends_the_program() -> None:
    class Ends(Prefetcher):
        def wanted(self, forecasts, cache, scheduler, timeline, cost):
            raise KeyboardInterrupt

    engine = engine_of(preset("hybrimoe"), prefetcher=Ends())
    with pytest.raises(KeyboardInterrupt):
        steps(engine)
    assert (engine.cache.references == 0).all()
    assert isinstance(engine.policies.prefetcher.policy, Ends)  # type: ignore[attr-defined]
    assert Never().depth == 0
