"""What a trace says about its model: how skewed, how repetitive, how predictable routing is."""

from typing import NamedTuple

import numpy as np

from hybrimoe.policy.forecasts import Markov
from hybrimoe.policy.timeline import Array
from hybrimoe.simulation.trace import RoutingTrace, sequences


class Statistics(NamedTuple):
    """Facts of one trace's decode steps; prefill steps count for `frequency` alone."""

    steps: int
    frequency: Array  # [L, E] share of a layer's tokens at each expert
    skew: float  # share of the tokens at the busiest quarter of the experts, mean over layers
    overlap: float  # experts of top_k that a layer shares with its previous token
    overlap_by_chance: float  # the same if experts were drawn uniformly
    reuse: Array  # [K] probability that the expert of a rank is used again by the next token
    recall: Array  # [D] share of top_k that ids alone forecast 1, 2, ... layers ahead


def statistics(trace: RoutingTrace, depth: int = 1) -> Statistics:
    """Measure a trace; `depth` layers of look-ahead are tried."""
    shared, count = np.zeros(trace.top_k), 0
    for steps in sequences(trace):
        rows = trace.offsets[steps[_single(trace, steps)]]
        ids = trace.ids[rows, :, : trace.top_k]
        if len(ids) > 1:
            again = (ids[:-1, :, :, None] == ids[1:, :, None, :]).any(axis=3)
            shared += again.sum(axis=(0, 1))
            count += again.shape[0] * again.shape[1]
    reuse = shared / max(count, 1)
    frequency = trace.frequencies()
    busiest = -np.sort(-frequency, axis=1)[:, : max(trace.experts // 4, 1)]
    return Statistics(
        trace.steps,
        frequency,
        float(busiest.sum(axis=1).mean()),
        float(reuse.sum()),
        trace.top_k**2 / trace.experts,
        reuse,
        _recall(trace, depth),
    )


def _single(trace: RoutingTrace, steps: Array) -> Array:
    """Decode steps of one token whose ids are known."""
    alone = np.diff(trace.offsets)[steps] == 1
    found: Array = alone & ~trace.prefill[steps]
    return found


def _recall(trace: RoutingTrace, depth: int) -> Array:
    """Share of the activated experts that a Markov table learnt on the way names in advance."""
    depth = min(depth, trace.layers - 1)
    if depth < 1:
        return np.zeros(0)
    table = Markov(trace.layers, trace.experts, trace.top_k, depth=depth)
    found, asked = np.zeros(depth), np.zeros(depth)
    for step in np.flatnonzero(_single(trace, np.arange(trace.steps))):
        named: dict[int, list[tuple[int, Array]]] = {}
        for load in trace.loads(int(step)):
            for d, experts in named.pop(load.layer, []):
                found[d] += np.isin(load.experts, experts).sum()
                asked[d] += load.experts.size
            table.observe(load)
            for d, forecast in enumerate(table.forecast(load.layer)):
                named.setdefault(forecast.layer, []).append((d, forecast.experts))
    return found / np.maximum(asked, 1)
