"""The bounds: forecasts that come true, and schedules that no other beats."""

import numpy as np
import pytest
from policy_cases import make_cost

from hybrimoe.errors import ConfigError
from hybrimoe.policy.plan import validate
from hybrimoe.policy.routing import Load
from hybrimoe.policy.schedulers import DALI, Hybrid, Scheduler, Split
from hybrimoe.policy.timeline import Timeline
from hybrimoe.simulation.synthesis import synthesise
from hybrimoe.simulation.trace import RoutingTrace
from oracle import Exact, perfect_forecasts


def test_perfect_forecasts_name_what_is_activated(cut: RoutingTrace) -> None:
    trace = perfect_forecasts(cut.select(range(3)), depth=2)
    for step in range(3):
        loads = trace.loads(step)
        assert trace.forecasts(step, trace.layers - 1) == []
        for forecast in trace.forecasts(step, 4):
            assert set(forecast.experts) == set(loads[forecast.layer].experts)
            assert forecast.probability.tolist() == [1.0] * 4


def test_perfect_forecasts_are_of_decode_alone() -> None:
    with pytest.raises(ConfigError, match="the trace has 1 of prefill"):
        perfect_forecasts(synthesise(2, 8, 2, prompt=4, tokens=2))


@pytest.mark.parametrize("rival", [Hybrid(), Split(), DALI()])
@pytest.mark.parametrize("shards", [1, 4])
def test_no_schedule_beats_the_exact_one(rival: Scheduler, shards: int) -> None:
    rng, ties = np.random.default_rng(shards), 0
    for _ in range(60):
        count = int(rng.integers(1, 6))
        cost = make_cost(
            shards=shards,
            cpu_expert=float(rng.uniform(0.2, 3)),
            cpu_expert_contended=3.0,
            cpu_first=float(rng.uniform(0, 1)),
            link_bandwidth=100.0,
        )
        tokens = rng.integers(1, 5, count).astype(np.int32)
        load = Load(0, np.arange(count, dtype=np.int32), tokens, np.zeros(8, np.float32))
        ready = rng.choice([0.0, 0.7, np.inf], count)
        plan = Exact().plan(load, ready, Timeline(), cost)
        validate(plan, load, ready, cost.shards)
        other = rival.plan(load, ready, Timeline(), cost).makespan
        assert plan.makespan <= other * (1 + 1e-12)
        ties += plan.makespan == pytest.approx(other)
    assert ties > 0


def test_whole_experts_are_not_divided_and_large_loads_are_refused() -> None:
    cost = make_cost(shards=4)
    experts = np.arange(5, dtype=np.int32)
    load = Load(0, experts, np.ones(5, np.int32), np.zeros(16, np.float32))
    plan = Exact(whole=True).plan(load, np.full(5, np.inf), Timeline(), cost)
    assert set(plan.shards.tolist()) <= {0, 4}
    many = Load(0, np.arange(16, dtype=np.int32), np.ones(16, np.int32), np.zeros(16, np.float32))
    with pytest.raises(ConfigError, match="5 ways for each of 16 experts"):
        Exact().plan(many, np.zeros(16), Timeline(), cost)
