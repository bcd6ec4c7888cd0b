"""What the numbers of a router say: a layer's `Load`, and a `Forecast` of a later one."""

import numpy as np

from hybrimoe.policy.jit import compiled, inner
from hybrimoe.policy.routing import Forecast, Load
from hybrimoe.policy.timeline import Array

SOFTMAX, SIGMOID, SQRT_SOFTPLUS, GIVEN = range(4)
"""How a model makes scores of its logits; GIVEN: its router returns the scores themselves."""
NO_LOGITS: Array = np.zeros((0, 0), np.float32)


def find_scoring(logits: Array, ids: Array, weights: Array) -> int:
    """Which scoring the weights of the activated experts come from.

    logits [T, E] float32, ids [T, K] int64, weights [T, K] float32. The shares within a token are
    compared, because models scale weights. The closest is taken, the plainest where it is a tie.
    """
    sums = logits.sum(axis=1)
    if logits.min(initial=0.0) >= 0 and np.allclose(sums, 1, atol=1e-2):
        return GIVEN
    errors = [_distance(logits, ids, weights, how) for how in (SOFTMAX, SIGMOID, SQRT_SOFTPLUS)]
    if not np.isfinite(errors).any():
        return SOFTMAX
    return int(np.nanargmin(np.round(errors, 3)))  # rounded: bfloat16 weights are no more exact


class Scorings:
    """How each layer's router makes scores of its logits, learnt from its first call."""

    def __init__(self, layers: int) -> None:
        self._found: list[int | None] = [None] * layers

    def of(self, layer: int, logits: Array, ids: Array, weights: Array) -> int:
        """The scoring of a layer that is called with these; the plainest until there are some."""
        how = self._found[layer]
        if how is None and logits.size and ids.size:
            how = self._found[layer] = find_scoring(logits, ids, weights)
        return SOFTMAX if how is None else how


def read_load(
    layer: int,
    ids: Array,
    weights: Array,
    experts: int,
    logits: Array = NO_LOGITS,
    scoring: int = SOFTMAX,
) -> Load:
    """One layer's `Load` from its routing: ids [T, K] int64, weights [T, K] float32.

    Scores are the weights of the activated experts, and with logits [T, E] float32 also what the
    router said of all others, on the same scale. What is not finite counts as zero.
    """
    counts, scores = _totals(ids, weights, experts, logits, scoring)
    activated, tokens = _activated(counts)
    return Load(layer, activated, tokens, scores)


def read_forecast(layer: int, ids: Array, logits: Array, scoring: int = SOFTMAX) -> Forecast:
    """What a later layer will ask for, from what its router says early, most tokens first.

    ids [T, K] int64, the choice; logits [T, E] float32. A choice that beats the best expert left
    out by much is surer than one that beats it by little. An expert's probability is that any of
    the tokens comes; its tokens are those expected if one does.
    """
    expected, none = _expect(ids, logits, scoring == GIVEN)
    experts, tokens, probability = _ranked(expected, none)
    return Forecast(layer, experts, tokens, probability)


@inner
def _score(logits: Array, scoring: int, out: Array) -> None:
    """out [E] = the scores of one token, none below zero."""
    top = logits[0]
    for value in logits:
        top = max(top, value)
    for e in range(logits.size):
        x = logits[e]
        if scoring == SOFTMAX:
            score = np.exp(x - top)
        elif scoring == SIGMOID:
            score = 1.0 / (1.0 + np.exp(-x))
        elif scoring == SQRT_SOFTPLUS:
            score = np.sqrt(np.log1p(np.exp(-abs(x))) + max(x, 0.0))
        else:
            score = max(x, 0.0)
        out[e] = score if np.isfinite(score) else 0.0


@compiled
def _distance(logits: Array, ids: Array, weights: Array, scoring: int) -> float:
    """Mean difference between the shares of the weights and those of the scores."""
    scores = np.empty(logits.shape[1])
    total = 0.0
    for t in range(ids.shape[0]):
        _score(logits[t], scoring, scores)
        weighed = scored = 0.0
        for k in range(ids.shape[1]):
            weighed += weights[t, k]
            scored += scores[ids[t, k]]
        for k in range(ids.shape[1]):
            if weighed != 0.0 and scored != 0.0:
                total += abs(weights[t, k] / weighed - scores[ids[t, k]] / scored)
    return total / max(ids.size, 1)


@compiled
def _totals(
    ids: Array, weights: Array, experts: int, logits: Array, scoring: int
) -> tuple[Array, Array]:
    """[E] tokens per expert and [E] scores, summed over tokens."""
    counts, total = np.zeros(experts, np.int32), np.zeros(experts, np.float32)
    scores, chosen = np.empty(logits.shape[1]), np.zeros(experts, np.bool_)
    for t in range(ids.shape[0]):
        weighed = 0.0
        for k in range(ids.shape[1]):
            e, weight = ids[t, k], weights[t, k]
            counts[e] += 1
            if np.isfinite(weight):
                total[e] += weight
                weighed += weight
        if logits.shape[1] == 0:
            continue
        _score(logits[t], scoring, scores)
        scored = 0.0
        for k in range(ids.shape[1]):
            scored += scores[ids[t, k]]
            chosen[ids[t, k]] = True
        scale = weighed / scored if scored > 0.0 else 0.0
        for e in range(scores.size):
            if not chosen[e]:
                total[e] += scores[e] * scale
        for k in range(ids.shape[1]):
            chosen[ids[t, k]] = False
    return counts, total


@compiled
def _activated(counts: Array) -> tuple[Array, Array]:
    """The experts with tokens, and their tokens."""
    size = 0
    for count in counts:
        size += count > 0
    experts, tokens = np.empty(size, np.int32), np.empty(size, np.int32)
    i = 0
    for e in range(counts.size):
        if counts[e] > 0:
            experts[i], tokens[i] = e, counts[e]
            i += 1
    return experts, tokens


@compiled
def _ranked(expected: Array, none: Array) -> tuple[Array, Array, Array]:
    """Experts that are expected at all, with their tokens and probability."""
    size = 0
    for value in expected:
        size += value > 0.0
    experts, tokens = np.empty(size, np.int32), np.empty(size, np.int32)
    probability = np.empty(size)
    size = 0
    for e in range(expected.size):  # an insertion sort, because numba's argsort compiles for 2 s
        if expected[e] > 0.0:
            i = size
            while i > 0 and expected[experts[i - 1]] < expected[e]:
                experts[i] = experts[i - 1]
                i -= 1
            experts[i] = e
            size += 1
    for i in range(size):
        probability[i] = -np.expm1(none[experts[i]])
        tokens[i] = max(round(expected[experts[i]] / probability[i]), 1)
    return experts, tokens, probability


@compiled
def _expect(ids: Array, logits: Array, probabilities: bool) -> tuple[Array, Array]:
    """[E] expected tokens, and [E] the logarithm of the chance that there is none."""
    experts = logits.shape[1]
    expected, none = np.zeros(experts), np.zeros(experts)
    chosen, x = np.zeros(experts, np.bool_), np.empty(experts)
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            chosen[ids[t, k]] = True
        least, most = np.inf, -np.inf
        for e in range(experts):
            x[e] = np.log(max(logits[t, e], 1e-30)) if probabilities else logits[t, e]
            if chosen[e]:
                least = min(least, x[e])
            else:
                most = max(most, x[e])
        edge = 0.5 * (least + most)
        for e in range(experts):
            if chosen[e]:
                chosen[e] = False
                sure = 1.0 / (1.0 + np.exp(edge - x[e]))
                if sure > 0.0:  # not where a router says NaN
                    expected[e] += sure
                    none[e] += np.log1p(-min(sure, 1.0 - 1e-9))
    return expected, none
