"""The simulator: exact numbers, bounds that always hold, and input that is refused."""

import dataclasses
import itertools

import numpy as np
import pytest
from policy_cases import make_cost

from hybrimoe.errors import ConfigError, PlanError, ProfileError
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.plan import Plan
from hybrimoe.policy.prefetchers import Impact, Never
from hybrimoe.policy.presets import PRESETS, preset
from hybrimoe.policy.profiles import PROFILES
from hybrimoe.policy.rankings import LRU, MRS, NextToken
from hybrimoe.policy.routing import Load
from hybrimoe.policy.schedulers import CpuOnly, OnDemand, Scheduler, Static
from hybrimoe.policy.timeline import Array, Lane, Timeline
from hybrimoe.simulation.simulator import Result, simulate
from hybrimoe.simulation.synthesis import synthesise
from hybrimoe.simulation.trace import RoutingTrace
from hybrimoe.sizes import expert_budget
from oracle import perfect_forecasts
from shares import from_fractions

GOLDEN = {
    "hybrimoe": (0.012305140013137381, 0.6206597222222222, 20.683333333333334),
    "hybrimoe-paper": (0.014355953983122002, 0.6076388888888888, 12.75),
    "ktransformers": (0.01339629493745917, 0.6248263888888889, 0.0),
    "llamacpp": (0.022952283080973752, 0.25, 0.0),
    "adapmoe": (0.025280094557822288, 0.6107638888888889, 43.28333333333333),
    "fiddler": (0.01324922166556977, 0.6326388888888889, 0.0),
    "powerinfer": (0.01324922166556977, 0.6326388888888889, 0.0),
    "ondemand": (0.024385577991835772, 0.6255208333333333, 35.95),
    "cpu": (0.028812317577352267, 0.6248263888888889, 0.0),
}


def by_hand(steps: int = 3) -> RoutingTrace:
    """One layer, four experts, top-2; experts 0 and 1, then 0 and 2, then 0 and 3."""
    ids = np.array([[[0, n + 1]] for n in range(steps)], np.uint8)
    return RoutingTrace(
        4,
        2,
        ids,
        np.full(ids.shape, 0.5, np.float16),
        np.arange(steps + 1),
        np.zeros(steps, bool),
        np.zeros(steps, np.int32),
    )


def test_static_placement_by_hand() -> None:
    # Experts 0 and 1 are resident. Steps: both on the GPU (2 s), then one on each side (2.5 s).
    prior = np.array([[4.0, 3.0, 2.0, 1.0]])
    found = simulate(by_hand(), make_cost(), "ktransformers", vram=200, prior=prior)
    assert found.decode_s_per_token == (2.0 + 2.5 + 2.5) / 3
    assert found.hit_rate == 4 / 6
    assert found.uploads_per_token == 0
    assert found.lanes["GPU"] == 4 / 3
    assert found.lanes["CPU"] == 5 / 3
    assert found.idle["LINK"] == 1.0


def test_fetching_on_demand_by_hand() -> None:
    # The resident one takes 1 s; the other arrives after 4 s and takes 1 s more.
    prior = np.array([[4.0, 3.0, 2.0, 1.0]])
    found = simulate(by_hand(), make_cost(), "ondemand", vram=200, prior=prior)
    assert found.decode_s_per_token == (2.0 + 5.0 + 5.0) / 3
    assert found.uploads_per_token == 2 / 3
    assert found.link_bytes_per_token == 200 / 3


def test_everything_else_of_a_layer_and_the_policy_are_charged() -> None:
    cost = dataclasses.replace(make_cost(), dense_read=1.0, dense_launch=0.5, plan_s=0.25)
    prior = np.array([[4.0, 3.0, 2.0, 1.0]])
    found = simulate(by_hand(), cost, "ktransformers", vram=200, prior=prior)
    assert found.decode_s_per_token == pytest.approx(7 / 3 + 1.75)
    assert found.lanes["POLICY"] == 0.25


def test_nothing_resident_and_everything_resident() -> None:
    none = simulate(by_hand(), make_cost(), "ktransformers", vram=0)
    every = simulate(by_hand(), make_cost(), "ondemand", vram=1.0)
    assert none.hit_rate == 0.0
    assert none.decode_s_per_token == 4.5
    assert every.hit_rate == 1.0
    assert every.decode_s_per_token == 2.0


@pytest.mark.parametrize("name", PRESETS)
def test_golden_numbers_on_real_routing(cut: RoutingTrace, name: str) -> None:
    found = simulate(cut.select(range(60)), "desktop", name, vram=0.25)
    assert (found.decode_s_per_token, found.hit_rate, found.uploads_per_token) == GOLDEN[name]


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("vram", [0, 0.25, 1.0])
def test_presets_prefill_and_decode_at_every_residency(name: str, vram: float) -> None:
    trace = synthesise(3, 16, 2, tokens=12, prompt=40, sequences=2, recall=(0.8, 0.7), seed=3)
    first = simulate(trace, make_cost(), name, vram=vram)
    assert first == simulate(trace, make_cost(), name, vram=vram)
    assert first.prefill_s > 0
    assert 0 <= first.hit_rate + first.late_rate <= 1
    assert all(0 <= share <= 1 for share in first.idle.values())


@pytest.mark.parametrize("profile", PROFILES)
def test_the_default_is_not_beaten_by_a_preset_on_real_routing(
    cut: RoutingTrace, profile: str
) -> None:
    fit, held_back = cut.split(0.4)
    some, prior = held_back.select(range(150)), fit.frequencies()
    times = {n: simulate(some, profile, n, prior=prior).decode_s_per_token for n in PRESETS}
    print(profile, {name: round(1e3 * seconds, 2) for name, seconds in times.items()})
    assert times["hybrimoe"] <= min(times.values()) * 1.03
    assert times["hybrimoe"] * 1.05 < times["hybrimoe-paper"]


def test_prefill_from_prompt_fractions() -> None:
    rng = np.random.default_rng(0)
    trace = from_fractions(rng.dirichlet(np.full(8, 40), (2, 4)), 128)
    times = {n: simulate(trace, "a6000", n).prefill_s for n in PRESETS}
    assert times["hybrimoe"] <= min(times.values()) * 1.03
    assert simulate(trace, "a6000").decode_s_per_token is None


@pytest.mark.parametrize("prompt", [32, 512])
def test_the_default_is_not_beaten_in_prefill_at_any_residency(prompt: int) -> None:
    # Nearly flat loads of few experts: a slot that one layer takes from another is missed there.
    trace = from_fractions(np.random.default_rng(1).dirichlet(np.full(8, 30), (3, 16)), prompt)
    for vram in (0.25, 0.5, 0.75):
        times = {n: simulate(trace, "a6000", n, vram=vram).prefill_s for n in PRESETS}
        assert times["hybrimoe"] <= min(times.values()) * 1.03


def test_spans_fill_lanes_without_overlap(cut: RoutingTrace) -> None:
    found = simulate(cut.select(range(4)), "laptop", "hybrimoe", spans=True)
    for lane in Lane:
        mine = sorted((s.start, s.start + s.seconds) for s in found.spans if s.lane is lane)
        assert all(a[1] <= b[0] + 1e-12 for a, b in itertools.pairwise(mine))
    assert {s.lane for s in found.spans} == set(Lane)
    asked = {f"e{expert}" for expert in cut.loads(3)[23].experts.tolist()}
    start = max(s.start for s in found.spans if s.what == "plan")
    work = [s for s in found.spans if s.start >= start and s.lane in (Lane.CPU, Lane.GPU)]
    assert {s.what.split()[0] for s in work} == asked
    busy = sum(s.seconds for s in found.spans if s.lane is Lane.LINK)
    assert busy == pytest.approx(4 * found.lanes["LINK"])


def test_recorded_forecasts_are_used_unless_told_otherwise() -> None:
    trace = synthesise(4, 16, 2, tokens=80, recall=(0.95,), seed=1)
    cost = make_cost(link_bandwidth=300.0, link_bandwidth_contended=300.0)
    policies = {"preset": "hybrimoe-paper", "prefetcher": Impact(gated=False)}
    seen = simulate(trace, cost, **policies)
    learnt = simulate(trace, cost, look_ahead=False, **policies)
    never = simulate(trace, cost, "hybrimoe-paper", prefetcher=Never())
    assert seen.hit_rate > learnt.hit_rate
    assert seen.hit_rate > never.hit_rate


def test_prefetches_that_come_true_are_counted() -> None:
    trace = synthesise(6, 16, 2, tokens=60, seed=1)
    cost = make_cost(link_bandwidth=400.0, link_bandwidth_contended=400.0)
    sure = simulate(perfect_forecasts(trace), cost, "adapmoe")
    learnt = simulate(trace, cost, "adapmoe")
    assert sure.prefetch_precision == 1.0
    assert sure.prefetches_per_token > 1
    assert 0 < learnt.prefetch_precision < 0.9
    assert simulate(trace, cost, "ondemand").prefetch_precision is None


def test_own_policies_take_a_presets_place() -> None:
    found = simulate(
        by_hand(), make_cost(), vram=0.5, scheduler=CpuOnly(), cache=LRU(), prefetcher=Never()
    )
    assert found.lanes["GPU"] == 0.0
    assert isinstance(found, Result)
    assert "spans" not in found.to_dict()


def test_a_scheduler_that_breaks_its_contract_is_refused() -> None:
    class Forgetful(Scheduler):
        def plan(self, load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> Plan:
            plan = Static().plan(load, ready, timeline, cost)
            return plan._replace(cpu=plan.cpu[:0])

    with pytest.raises(PlanError, match="Forgetful"):
        simulate(by_hand(), make_cost(), vram=0.5, scheduler=Forgetful())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"vram": 100}, ConfigError, "holds 1 experts of 100 bytes, one layer's top-k needs 2"),
        ({"vram": -1}, ConfigError, "vram must be positive bytes"),
        ({"vram": "lots"}, ConfigError, "vram must be a size like '10GiB'"),
        ({"preset": "fastest"}, ConfigError, "preset must be one of"),
        ({"prior": np.ones((2, 2))}, ConfigError, r"prior must have shape \(1, 4\)"),
        ({"profile": "laptop"}, ProfileError, "the trace names no model"),
        ({"profile": "abacus"}, ProfileError, "profile must be one of"),
    ],
)
def test_bad_input_is_refused_with_the_numbers(arguments, error, message) -> None:
    with pytest.raises(error, match=message):
        simulate(by_hand(), **({"profile": make_cost(), "vram": 0.5} | arguments))


def test_budgets() -> None:
    assert expert_budget("6GiB", 1) == 6 * 2**30
    assert expert_budget("1.5 MB", 1) == 1.5e6
    assert expert_budget(4096, 1) == 4096
    assert round(expert_budget(0.25, 768 * 10)) == 1920
    assert round(expert_budget("0.5", 100)) == 50


def test_presets_are_the_named_systems() -> None:
    assert preset("ondemand").scheduler == OnDemand()
    assert preset("hybrimoe").ranking == NextToken(admission=True, backfill=True)
    assert preset("hybrimoe-paper").ranking == MRS(alpha=0.5)
