"""Loads and forecasts read from the numbers of a router."""

import numpy as np
import pytest

from hybrimoe.policy.router_output import (
    GIVEN,
    SIGMOID,
    SOFTMAX,
    SQRT_SOFTPLUS,
    find_scoring,
    read_forecast,
    read_load,
)

T, E, K = 6, 16, 4
SCORES = {
    SOFTMAX: lambda x: np.exp(x) / np.exp(x).sum(1, keepdims=True),
    SIGMOID: lambda x: 1 / (1 + np.exp(-x)),
    SQRT_SOFTPLUS: lambda x: np.sqrt(np.log1p(np.exp(x))),
    GIVEN: lambda x: x,
}


def routing(how: int, tokens: int = T, scale: float = 1.0, bias: float = 0.0):
    """Logits, ids and weights of a router that scores one way; bias moves its choice."""
    random = np.random.default_rng(how)
    logits = random.normal(size=(tokens, E)) * 2
    if how == GIVEN:
        logits = SCORES[SOFTMAX](logits)
    scores = SCORES[how](logits)
    ids = np.argsort(-(scores + bias * random.normal(size=E)), axis=1)[:, :K]
    weights = np.take_along_axis(scores, ids, 1)
    weights *= scale / weights.sum(1, keepdims=True)
    return logits.astype(np.float32), ids.astype(np.int64), weights.astype(np.float32)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("bias", [0.0, 0.3])
@pytest.mark.parametrize("how", SCORES)
def test_the_scoring_is_found_from_what_the_router_chose(how, scale, bias):
    assert find_scoring(*routing(how, scale=scale, bias=bias)) == how


def test_weights_that_no_scoring_explains_fall_back_to_the_plainest():
    logits, ids, _ = routing(SOFTMAX)
    assert find_scoring(logits * np.nan, ids, np.full((T, K), np.nan, np.float32)) == SOFTMAX
    assert find_scoring(logits, ids[:, :1], np.ones((T, 1), np.float32)) == SOFTMAX


@pytest.mark.parametrize("how", SCORES)
def test_scores_are_the_routers_on_the_scale_of_the_weights(how):
    logits, ids, weights = routing(how, scale=2.0)
    load = read_load(3, ids, weights, E, logits, how)

    scores = SCORES[how](logits.astype(np.float64))
    chosen = np.take_along_axis(scores, ids, 1).sum(1, keepdims=True)
    np.testing.assert_allclose(load.scores, (scores * 2 / chosen).sum(0), rtol=1e-4)
    counts = np.bincount(ids.ravel(), minlength=E)
    assert load.layer == 3
    assert load.experts.tolist() == np.flatnonzero(counts).tolist()
    assert load.tokens.tolist() == counts[counts > 0].tolist()
    assert (load.experts.dtype, load.tokens.dtype, load.scores.dtype) == ("i4", "i4", "f4")


def test_without_logits_the_weights_are_the_scores():
    _, ids, weights = routing(SOFTMAX)
    load = read_load(0, ids, weights, E)

    wanted = np.bincount(ids.ravel(), weights=weights.ravel(), minlength=E)
    np.testing.assert_allclose(load.scores, wanted, rtol=1e-6)


def test_a_nan_does_not_reach_the_scores():
    logits, ids, weights = routing(SOFTMAX)
    logits[2], weights[2] = np.nan, np.nan
    load = read_load(0, ids, weights, E, logits)

    assert np.isfinite(load.scores).all()
    assert load.scores.sum() > 0


def test_one_tokens_forecast_is_its_choice_the_surest_first():
    logits, ids, _ = routing(SOFTMAX, tokens=1)
    forecast = read_forecast(5, ids, logits)

    order = np.argsort(-logits[0])[:K]
    edge = logits[0][np.argsort(-logits[0])[K - 1 : K + 1]].mean()
    assert (forecast.layer, forecast.experts.tolist()) == (5, order.tolist())
    assert forecast.tokens.tolist() == [1] * K
    np.testing.assert_allclose(
        forecast.probability, 1 / (1 + np.exp(edge - logits[0][order])), rtol=1e-5
    )


def test_of_many_tokens_any_may_come_and_expected_tokens_are_kept():
    logits, ids, _ = routing(SOFTMAX, tokens=64)
    one = [read_forecast(0, ids[t : t + 1], logits[t : t + 1]) for t in range(64)]
    forecast = read_forecast(0, ids, logits)

    sure = {e: [] for e in forecast.experts.tolist()}
    for each in one:
        for e, p in zip(each.experts.tolist(), each.probability):
            sure[e].append(p)
    assert set(sure) == set(np.unique(ids))
    for e, tokens, probability in zip(*forecast[1:4]):
        assert probability == pytest.approx(1 - np.prod(1 - np.array(sure[e])))
        assert tokens == max(round(sum(sure[e]) / probability), 1)
    assert (forecast.probability <= 1).all()


def test_a_router_that_says_nan_forecasts_nothing():
    _, ids, _ = routing(SOFTMAX)
    forecast = read_forecast(0, ids, np.full((T, E), np.nan, np.float32))

    assert forecast.experts.size == 0
