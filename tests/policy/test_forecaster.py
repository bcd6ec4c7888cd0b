"""Forecasts from expert ids, and how far they are trusted."""

import numpy as np
import pytest
from policy_cases import make_load

from hybrimoe.errors import ConfigError
from hybrimoe.policy.forecasts import Markov, Trust
from hybrimoe.policy.routing import Forecast, Load


def load(layer: int, experts: list[int]) -> Load:
    ids = np.array(experts, np.int32)
    return Load(layer, ids, np.ones(ids.size, np.int32), np.zeros(8, np.float32))


def test_learns_which_experts_follow_which() -> None:
    table, rng = Markov(3, 8, 2, depth=2), np.random.default_rng(0)
    for _ in range(300):
        first = rng.choice(8, 2, replace=False)
        for layer in range(3):
            table.observe(load(layer, ((first + layer) % 8).tolist()))
    table.observe(load(0, [2, 5]))
    near, far = table.forecast(0)
    assert (near.layer, sorted(near.experts.tolist())) == (1, [3, 6])
    assert (far.layer, sorted(far.experts.tolist())) == (2, [4, 7])
    assert (near.probability > 0.5).all()


def test_learns_what_a_layer_repeats_from_token_to_token() -> None:
    table = Markov(2, 8, 1, across=0.0)
    for token in range(300):
        for layer in range(2):
            table.observe(load(layer, [(token + layer) % 8]))
    table.observe(load(0, [4]))
    assert table.forecast(0)[0].experts.tolist() == [(300 - 1 + 1 + 1) % 8]


def test_probabilities_are_sorted_and_sum_to_at_most_the_activated() -> None:
    table, rng = Markov(2, 8, 2, width=8), np.random.default_rng(1)
    for _ in range(100):
        for layer in range(2):
            table.observe(load(layer, rng.choice(8, 2, replace=False).tolist()))
    [forecast] = table.forecast(0)
    assert (np.diff(forecast.probability) <= 0).all()
    assert 0 < forecast.probability.sum() <= 2.0 + 1e-9
    assert sorted(forecast.experts.tolist()) == list(range(8))
    assert table.forecast(1) == []


def test_trust_falls_to_the_share_of_forecasts_that_come_true() -> None:
    trust = Trust(1)
    for token in range(400):
        named = np.array([0, 1], np.int32)
        trust.expect(0, [Forecast(1, named, np.ones(2, np.int32), np.ones(2))])
        trust.settle(make_load([1] * (1 + token % 2), layer=1))
    assert trust.factor(0) == pytest.approx(0.75, abs=0.02)


def test_impossible_parameters_are_refused() -> None:
    with pytest.raises(ConfigError, match="depth must be positive"):
        Markov(2, 8, 2, depth=0)
