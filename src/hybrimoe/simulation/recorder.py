"""Collect routing step by step, and join what was collected."""

from collections.abc import Sequence

import numpy as np

from hybrimoe.errors import TraceError
from hybrimoe.policy.routing import NO_EXPERT, Forecast
from hybrimoe.policy.timeline import Array
from hybrimoe.simulation.trace import ARRAYS, RoutingTrace


class TraceRecorder:
    """Collects the routing of a running model step by step into a `RoutingTrace`.

    ranks: how many experts per token are kept; more than `top_k` keeps scores for MRS.
    depth, width: forecasts kept per layer: layers ahead, and experts of each.
    """

    def __init__(
        self,
        layers: int,
        experts: int,
        top_k: int,
        *,
        ranks: int = 0,
        depth: int = 0,
        width: int = 0,
        model: str = "",
    ) -> None:
        self.layers, self.experts, self.top_k, self.model = layers, experts, top_k, model
        self.ranks = min(max(ranks, top_k), experts)
        self.depth, self.width = depth, width or top_k
        self._rows: list[Array] = []
        self._scores: list[Array] = []
        self._forecast: list[tuple[Array, Array]] = []
        self._prefill: list[bool] = []
        self._sequence: list[int] = []

    def step(self, prefill: bool, sequence: int, tokens: int) -> None:
        """Begin a step of `tokens` tokens; `record` fills its layers."""
        narrow = np.uint8 if self.experts <= 256 else np.uint16
        self._rows.append(np.zeros((tokens, self.layers, self.ranks), narrow))
        self._scores.append(np.zeros((tokens, self.layers, self.ranks), np.float16))
        shape = (self.layers, self.depth, self.width)
        empty = np.full(shape, NO_EXPERT, np.uint16), np.zeros(shape, np.float16)
        self._forecast.append(empty)
        self._prefill.append(prefill)
        self._sequence.append(sequence)

    def record(
        self, layer: int, ids: Array, scores: Array, forecasts: Sequence[Forecast] = ()
    ) -> None:
        """One layer of the step: ids and scores [T, R], best first, and what it expects ahead."""
        self._rows[-1][:, layer] = ids[:, : self.ranks]
        self._scores[-1][:, layer] = scores[:, : self.ranks]
        experts, tokens = self._forecast[-1]
        for forecast in forecasts[: self.depth]:
            ahead, kept = forecast.layer - layer - 1, slice(min(self.width, forecast.experts.size))
            experts[layer, ahead, kept] = forecast.experts[kept]
            expected = forecast.probability * forecast.tokens
            tokens[layer, ahead, kept] = expected[kept]

    def trace(self) -> RoutingTrace:
        """Everything recorded so far."""
        narrow = np.uint8 if self.experts <= 256 else np.uint16
        none = np.zeros((0, self.layers, self.ranks), narrow)
        shape = (0, self.layers, self.depth, self.width)
        ahead = [np.zeros(shape, np.uint16), *(ids[None] for ids, _ in self._forecast)]
        expected = [np.zeros(shape, np.float16), *(n[None] for _, n in self._forecast)]
        return RoutingTrace(
            self.experts,
            self.top_k,
            np.concatenate([none, *self._rows]),
            np.concatenate([none.astype(np.float16), *self._scores]),
            np.cumsum([0, *(len(rows) for rows in self._rows)]).astype(np.int64),
            np.array(self._prefill, bool),
            np.array(self._sequence, np.int32),
            forecast_ids=np.concatenate(ahead),
            forecast_tokens=np.concatenate(expected),
            model=self.model,
        )


def merge(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """One trace after the other; sequences keep apart, recorded forecasts must agree in shape."""
    if not traces:
        raise TraceError("merge needs at least one trace, got none")
    first = traces[0]
    for other in traces[1:]:
        _compatible(first, other)
    rows = np.cumsum([0, *(len(t.ids) for t in traces)])
    counts = np.cumsum([0, *(len(t.counts) for t in traces)])
    last = np.cumsum([0, *(int(t.sequence.max(initial=-1)) + 1 for t in traces)])
    whole = {
        n: np.concatenate([getattr(t, n) for t in traces]) for n in ("ids", "scores", "prefill")
    }
    ahead = {n: np.concatenate([getattr(t, n) for t in traces]) for n in ARRAYS[-2:]}
    kept = [t.counts for t in traces if t.counts.size]
    return RoutingTrace(
        first.experts,
        first.top_k,
        offsets=np.concatenate([[0], *(t.offsets[1:] + n for t, n in zip(traces, rows))]),
        sequence=np.concatenate([t.sequence + n for t, n in zip(traces, last)]).astype(np.int32),
        counts=np.concatenate(kept) if kept else first.counts,
        counted=np.concatenate([_shifted(t.counted, n) for t, n in zip(traces, counts)]),
        model=first.model,
        shape=first.shape,
        **whole,
        **ahead,
    )


def _shifted(counted: Array, by: int) -> Array:
    return np.where(counted >= 0, counted + by, -1).astype(np.int32)


def _compatible(first: RoutingTrace, other: RoutingTrace) -> None:
    for name in ("layers", "experts", "top_k", "depth"):
        if getattr(first, name) != getattr(other, name):
            mine, theirs = getattr(first, name), getattr(other, name)
            raise TraceError(f"traces to merge differ in {name}: {mine} and {theirs}")
