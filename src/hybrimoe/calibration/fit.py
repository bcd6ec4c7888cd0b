"""From timed runs to the numbers of a `CostModel`.

Every fit minimizes the sum of relative errors, so a run that was interrupted counts as one wrong
point and not as the square of a huge one, and no number becomes negative.
"""

from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import numpy as np

from hybrimoe.policy.timeline import Array

LEAST_S = 1e-9
"""Instead of 0 where a cost model wants a positive number."""
ROUNDS = 20  # of reweighting; the laws have two or three numbers and settle sooner
CLOSE = 0.01  # errors below this share weigh the same


class Sample(NamedTuple):
    """One timed run: `experts` experts with `tokens` tokens each; for a copy its `bytes`."""

    experts: int
    tokens: int
    seconds: float
    bytes: int = 0


def fit_cpu(samples: Sequence[Sample]) -> dict[str, float]:
    """`cpu_first`, `cpu_expert` and `cpu_token` of runs without a copy in flight."""
    experts, tokens, seconds = _columns(samples)
    columns = np.stack([np.ones_like(seconds), experts, experts * tokens], 1)
    first, expert, token = fit(columns, seconds)
    return {
        "cpu_first": float(first),
        "cpu_expert": max(float(expert), LEAST_S),
        "cpu_token": float(token),
    }


def fit_contended(samples: Sequence[Sample], alone: dict[str, float]) -> float:
    """`cpu_expert_contended`: the runs with a copy in flight, all else being as it was alone."""
    experts, tokens, seconds = _columns(samples)
    rest = seconds - alone["cpu_first"] - alone["cpu_token"] * experts * tokens
    # With one number left, the least sum of relative errors is a weighted median.
    found = weighted_median(rest / experts, experts / seconds)
    return max(found, alone["cpu_expert"])


def fit_gpu(samples: Sequence[Sample]) -> dict[str, float]:
    """`gpu_first`, `gpu_read`, `gpu_token` and `gpu_launch`.

    Reading bounds few tokens and arithmetic many: every number of tokens is tried as the last of the
    few.
    """
    experts, tokens, seconds = _columns(samples)
    best, found = np.inf, np.zeros(4)
    for last in np.unique(tokens):
        few = tokens <= last
        columns = [np.ones_like(seconds), experts * few, experts * tokens * ~few, experts]
        first, read, token, launch = fit(np.stack(columns, 1), seconds)
        read = max(read, token * last, LEAST_S)
        each = np.maximum(read, token * tokens) + launch
        error = float(np.abs((first + experts * each) / seconds - 1).sum())
        if error < best:
            best, found = error, np.array([first, read, token, launch])
    return dict(zip(("gpu_first", "gpu_read", "gpu_token", "gpu_launch"), found.tolist()))


def fit_link(samples: Sequence[Sample]) -> dict[str, float]:
    """`link_latency` and `link_bandwidth` of copies of several sizes."""
    size = np.array([sample.bytes for sample in samples], np.float64)
    seconds = np.array([sample.seconds for sample in samples])
    latency, each = fit(np.stack([np.ones_like(size), size], 1), seconds)
    return {"link_latency": float(latency), "link_bandwidth": 1 / max(float(each), 1e-15)}


def misfit(samples: Sequence[Sample], cpu: dict[str, float]) -> float:
    """The median relative error of the CPU's law on the runs that it was fitted to."""
    experts, tokens, seconds = _columns(samples)
    each = cpu["cpu_expert"] + cpu["cpu_token"] * tokens
    return float(np.median(np.abs((cpu["cpu_first"] + experts * each) / seconds - 1)))


def fit(columns: Array, seconds: Array) -> Array:
    """Numbers [P] of at least 0 with the least sum of |columns @ numbers / seconds - 1|.

    columns [N, P], seconds [N]; by least squares, reweighted by what the last round got wrong.
    """
    relative = columns / seconds[:, None]
    weight = np.ones(len(seconds))
    found = np.zeros(columns.shape[1])
    for _ in range(ROUNDS):
        found = _not_negative(relative * weight[:, None], weight)
        weight = 1 / np.sqrt(np.maximum(np.abs(relative @ found - 1), CLOSE))
    return found


def weighted_median(values: Array, weights: Array) -> float:
    """The value with half of the weight on either side."""
    order = np.argsort(values)
    total = np.cumsum(weights[order])
    return float(values[order[np.searchsorted(total, total[-1] / 2)]])


def _not_negative(columns: Array, target: Array) -> Array:
    """Least squares with numbers of at least 0, by trying which of the few are 0."""
    best, found = np.inf, np.zeros(columns.shape[1])
    for used in product((True, False), repeat=columns.shape[1]):
        mask = np.array(used)
        if not mask.any():
            continue
        part = np.linalg.lstsq(columns[:, mask], target, rcond=None)[0]
        error = float(((columns[:, mask] @ part - target) ** 2).sum())
        if (part >= 0).all() and error < best:
            best, found = error, np.zeros(columns.shape[1])
            found[mask] = part
    return found


def _columns(samples: Sequence[Sample]) -> tuple[Array, Array, Array]:
    """Experts, tokens and seconds, [N] float64 each."""
    rows = np.array([sample[:3] for sample in samples], np.float64)
    return rows[:, 0], rows[:, 1], rows[:, 2]
