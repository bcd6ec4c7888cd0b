"""Routing made up to measure, and the facts of real routing that it is measured by."""

import numpy as np
import pytest

from hybrimoe.errors import ConfigError
from hybrimoe.policy.rankings import LRU, MRS
from hybrimoe.simulation.belady import Belady
from hybrimoe.simulation.statistics import statistics
from hybrimoe.simulation.synthesis import hit_rate, synthesise
from hybrimoe.simulation.trace import RoutingTrace

# Model: experts, top-k and LRU's hit rate with a quarter of the experts (the paper's Fig. 9).
PAPER = {"mixtral": (8, 2, 0.302), "deepseek": (64, 6, 0.477), "qwen2": (64, 8, 0.450)}


@pytest.mark.parametrize("model", PAPER)
def test_meets_a_given_lru_hit_rate(model: str) -> None:
    experts, top_k, wanted = PAPER[model]
    trace = synthesise(
        6, experts, top_k, tokens=300, lru_hit_rate=wanted, skew=0.2, across=0.3, seed=5
    )
    found, _ = hit_rate(trace, LRU(), 6 * experts // 4)
    assert found == pytest.approx(wanted, abs=0.03)


def test_a_hit_rate_out_of_reach_is_refused() -> None:
    with pytest.raises(ConfigError, match="lru_hit_rate must lie in"):
        synthesise(2, 16, 2, lru_hit_rate=0.01)


def test_look_ahead_recalls_what_was_asked_for() -> None:
    trace = synthesise(5, 32, 4, tokens=200, recall=(0.8, 0.67), seed=2)
    for d, wanted in enumerate((0.8, 0.67)):
        found = [
            np.isin(trace.loads(s)[layer + 1 + d].experts, trace.forecast_ids[s, layer, d]).mean()
            for s in range(200)
            for layer in range(4 - d)
        ]
        assert np.mean(found) == pytest.approx(wanted, abs=0.04)
    chances = [trace.forecasts(s, 0)[0].probability.mean() for s in range(50)]
    assert np.mean(chances) == pytest.approx(0.8, abs=0.02)


def test_temporal_correlation_shows_as_overlap() -> None:
    loose = statistics(synthesise(3, 32, 4, tokens=200, temporal=0.0, skew=0.0))
    tight = statistics(synthesise(3, 32, 4, tokens=200, temporal=0.95, skew=0.0))
    assert loose.overlap == pytest.approx(loose.overlap_by_chance, abs=0.1)
    assert tight.overlap > 2.0


def test_the_same_seed_gives_the_same_trace() -> None:
    first, second = (synthesise(2, 16, 2, tokens=20, prompt=4, seed=9) for _ in range(2))
    assert np.array_equal(first.ids, second.ids)
    assert first.prefill.tolist() == [True] + [False] * 20
    assert first.tokens(0) == 4


def test_prefill_sums_over_its_tokens() -> None:
    trace = synthesise(2, 16, 2, tokens=1, prompt=30)
    assert trace.loads(0)[0].tokens.sum() == 60


@pytest.mark.parametrize("change", [{"top_k": 20}, {"temporal": 1.0}, {"across": -0.1}])
def test_impossible_parameters_are_refused(change) -> None:
    with pytest.raises(ConfigError):
        synthesise(**({"layers": 2, "experts": 16, "top_k": 2} | change))


def test_admission_beats_lru_on_real_routing_with_a_quarter_of_its_uploads(
    cut: RoutingTrace,
) -> None:
    slots = 24 * 8
    lru, lru_uploads = hit_rate(cut, LRU(), slots)
    admitted, uploads = hit_rate(cut, MRS(alpha=0.05, admission=True), slots)
    print(f"LRU {lru:.3f} at {lru_uploads:.1f} uploads, MRS {admitted:.3f} at {uploads:.1f}")
    assert admitted > lru
    assert uploads < 0.25 * lru_uploads


def test_a_small_alpha_beats_the_released_one_on_real_routing(cut: RoutingTrace) -> None:
    rates = {alpha: hit_rate(cut, MRS(alpha=alpha), 24 * 8)[0] for alpha in (0.1, 0.5)}
    assert rates[0.1] > rates[0.5] + 0.01


def test_belady_bounds_every_ranking_on_real_routing(cut: RoutingTrace) -> None:
    some = cut.select(range(250))
    bound, _ = hit_rate(some, Belady.of(some), 24 * 8)
    for ranking in (LRU(), MRS(alpha=0.05), MRS(alpha=0.1, admission=True)):
        assert hit_rate(some, ranking, 24 * 8)[0] < bound


def test_real_routing_repeats_and_ids_alone_forecast_it(cut: RoutingTrace) -> None:
    facts = statistics(cut)
    assert facts.overlap == pytest.approx(1.80, abs=0.15)
    assert facts.overlap_by_chance == 0.5
    assert (np.diff(facts.reuse) < 0).all()
    assert facts.recall[0] > 0.5
