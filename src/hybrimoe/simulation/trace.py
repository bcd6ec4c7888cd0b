"""Recorded routing: which experts each token of each layer asked for."""

import io
import os
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hybrimoe.errors import TraceError
from hybrimoe.files import write_atomically
from hybrimoe.policy.jit import compiled
from hybrimoe.policy.routing import NO_EXPERT, Forecast, Load
from hybrimoe.policy.timeline import Array

VERSION = 1


INT32_ONES = np.ones(4096, np.int32)


@dataclass(frozen=True)
class RoutingTrace:
    """The routing of a run: steps of one or more token rows, each with its experts at every layer.

    ids: [N, L, R] uint8 or uint16, best first; the first `top_k` are activated, the others only
        scored. scores: [N, L, R] float16, the router's score of each.
    offsets: [S + 1] step s is the rows offsets[s]:offsets[s + 1].
    prefill: [S] bool. sequence: [S] int32, which prompt the step belongs to.
    counts: [C, L, E] tokens per expert of steps known only by their loads; counted: [S] the row in
        `counts`, or -1.
    forecast_ids: [S, L, D, W] uint16, what was expected d + 1 layers ahead when layer l ran;
        forecast_tokens: [S, L, D, W] float16, expected tokens of each.
    model: the name of the model that was recorded. shape: hidden and intermediate size of its
        experts, and the other weights of one layer; empty where they are not known.
    """

    experts: int
    top_k: int
    ids: Array
    scores: Array
    offsets: Array
    prefill: Array
    sequence: Array
    counts: Array = field(default_factory=lambda: np.zeros((0, 0, 0), np.uint32))
    counted: Array = field(default_factory=lambda: np.zeros(0, np.int32))
    forecast_ids: Array = field(default_factory=lambda: np.zeros((0, 0, 0, 0), np.uint16))
    forecast_tokens: Array = field(default_factory=lambda: np.zeros((0, 0, 0, 0), np.float16))
    model: str = ""
    shape: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.counted.size == 0:
            object.__setattr__(self, "counted", np.full(self.prefill.size, -1, np.int32))
        _check(self)

    def __repr__(self) -> str:
        of = f" of {self.model}" if self.model else ""
        return (
            f"<RoutingTrace{of}: {self.steps} steps, {self.layers} layers, "
            f"top-{self.top_k} of {self.experts} experts>"
        )

    @property
    def layers(self) -> int:
        return int(self.ids.shape[1])

    @property
    def steps(self) -> int:
        return int(self.prefill.size)

    @property
    def depth(self) -> int:
        """Layers that the recorded forecasts look ahead, 0 without forecasts."""
        return int(self.forecast_ids.shape[2])

    def tokens(self, step: int) -> int:
        """Tokens of one step."""
        row = self.counted[step]
        if row >= 0:
            return int(self.counts[row, 0].sum()) // self.top_k
        return int(self.offsets[step + 1] - self.offsets[step])

    def loads(self, step: int) -> list[Load]:
        """What every layer's router asked for in one step."""
        if self.counted[step] >= 0:
            counts = self.counts[self.counted[step]]
            scores = (counts / max(self.top_k, 1)).astype(np.float32)
            return [_dense(layer, counts[layer], scores[layer]) for layer in range(self.layers)]
        rows = slice(self.offsets[step], self.offsets[step + 1])
        single = self.scores[rows].astype(np.float32)  # numba has no float16
        counts, scores = _totals(self.ids[rows], single, self.top_k, self.experts)
        if rows.stop - rows.start == 1:  # decode: ids are the activated experts already
            ids = self.ids[rows.start, :, : self.top_k].astype(np.int32)
            ones = INT32_ONES[: self.top_k]
            return [Load(layer, ids[layer], ones, scores[layer]) for layer in range(self.layers)]
        return [_dense(layer, counts[layer], scores[layer]) for layer in range(self.layers)]

    def forecasts(self, step: int, layer: int) -> list[Forecast]:
        """What was expected of the next layers when this one ran, as far as it was recorded."""
        ahead = range(min(self.depth, self.layers - 1 - layer))
        return [self._forecast(step, layer, d) for d in ahead]

    def frequencies(self) -> Array:
        """[L, E] the share of all routed tokens that went to each expert of a layer."""
        counts = _count(self.ids, self.top_k, self.experts).astype(np.float64)
        if self.counts.size:
            counts += self.counts.sum(axis=0)
        shares: Array = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
        return shares

    def select(self, steps: Iterable[int]) -> "RoutingTrace":
        """The trace of these steps alone, in this order."""
        picked = np.fromiter(steps, np.int64)
        rows = [np.arange(self.offsets[s], self.offsets[s + 1]) for s in picked]
        index = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        counted = self.counted[picked]
        has_forecast = len(self.forecast_ids) > 0
        return RoutingTrace(
            self.experts,
            self.top_k,
            self.ids[index],
            self.scores[index],
            np.concatenate([[0], np.cumsum([len(r) for r in rows])]).astype(np.int64),
            self.prefill[picked],
            self.sequence[picked],
            self.counts[counted[counted >= 0]],
            np.where(counted >= 0, np.cumsum(counted >= 0) - 1, -1).astype(np.int32),
            self.forecast_ids[picked] if has_forecast else self.forecast_ids,
            self.forecast_tokens[picked] if has_forecast else self.forecast_tokens,
            self.model,
            self.shape,
        )

    def split(self, share: float = 0.5) -> tuple["RoutingTrace", "RoutingTrace"]:
        """Two traces of whole sequences: the first `share` of them, and the rest."""
        names = np.unique(self.sequence)
        first = np.isin(self.sequence, names[: round(share * names.size)])
        return self.select(np.flatnonzero(first)), self.select(np.flatnonzero(~first))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one npz; a reader sees the old file or the new one, never a part."""
        arrays = {name: getattr(self, name) for name in ARRAYS}
        head = np.array([VERSION, self.experts, self.top_k], np.int64)
        buffer = io.BytesIO()
        names = {"model": np.array(self.model), "shape": np.array(self.shape, np.int64)}
        np.savez_compressed(buffer, head=head, **names, **arrays)  # type: ignore[arg-type]
        write_atomically(Path(path), buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "RoutingTrace":
        """Read what `save` wrote."""
        stored = read_arrays(path)
        missing = {"head", "model", *ARRAYS} - set(stored)
        if missing:
            raise TraceError(f"{path} is no routing trace: {sorted(missing)} missing")
        head = stored["head"]
        if head.shape != (3,) or head[0] != VERSION:
            raise TraceError(f"{path} has trace version {head.ravel()[:1]}, this reads {VERSION}")
        arrays = {name: stored[name] for name in ARRAYS}
        shape = tuple(int(n) for n in stored.get("shape", ()))
        return cls(int(head[1]), int(head[2]), model=str(stored["model"]), shape=shape, **arrays)

    def _forecast(self, step: int, layer: int, ahead: int) -> Forecast:
        expected = self.forecast_tokens[step, layer, ahead].astype(np.float64)
        ids = self.forecast_ids[step, layer, ahead]
        kept = ids != NO_EXPERT
        expected, experts = expected[kept], ids[kept].astype(np.int32)
        tokens = np.maximum(np.rint(expected), 1).astype(np.int32)
        return Forecast(layer + 1 + ahead, experts, tokens, np.minimum(expected, 1.0))


ARRAYS = (
    *("ids", "scores", "offsets", "prefill", "sequence"),
    *("counts", "counted", "forecast_ids", "forecast_tokens"),
)


def read_arrays(path: str | os.PathLike[str]) -> dict[str, Array]:
    """All arrays of an npz; anything else is a TraceError that names the file."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, EOFError, KeyError, zipfile.BadZipFile, AttributeError) as error:
        raise TraceError(f"{path} is no complete npz file: {error}") from error


def sequences(trace: RoutingTrace) -> Iterator[Array]:
    """The steps of each sequence, in the order they were recorded."""
    for name in np.unique(trace.sequence):
        yield np.flatnonzero(trace.sequence == name)


def _dense(layer: int, counts: Array, scores: Array) -> Load:
    experts = np.flatnonzero(counts).astype(np.int32)
    return Load(layer, experts, counts[experts].astype(np.int32), scores)


@compiled
def _totals(ids: Array, scores: Array, top_k: int, experts: int) -> tuple[Array, Array]:
    """[L, E] tokens per expert and [L, E] summed scores of some rows."""
    counts = np.zeros((ids.shape[1], experts), np.int32)
    total = np.zeros((ids.shape[1], experts), np.float32)
    for n in range(ids.shape[0]):
        for layer in range(ids.shape[1]):
            for rank in range(ids.shape[2]):
                total[layer, ids[n, layer, rank]] += scores[n, layer, rank]
                counts[layer, ids[n, layer, rank]] += rank < top_k
    return counts, total


@compiled
def _count(ids: Array, top_k: int, experts: int) -> Array:
    counts = np.zeros((ids.shape[1], experts), np.int64)
    for n in range(ids.shape[0]):
        for layer in range(ids.shape[1]):
            for rank in range(top_k):
                counts[layer, ids[n, layer, rank]] += 1
    return counts


def _check(trace: RoutingTrace) -> None:
    """Refuse what cannot be replayed, before anything is computed from it."""
    ids, steps = trace.ids, trace.prefill.size
    rules = {
        "ids must be [tokens, layers, ranks]": ids.ndim == 3 and ids.dtype.kind == "u",
        "scores must have the shape of ids": trace.scores.shape == ids.shape,
        "top_k must lie in [1, ranks]": ids.ndim == 3 and 1 <= trace.top_k <= ids.shape[2],
        "ids must be below experts": ids.size == 0 or int(ids.max()) < trace.experts,
        "scores must be finite": bool(np.isfinite(trace.scores).all()),
        "offsets must have steps + 1 entries": trace.offsets.shape == (steps + 1,),
        "sequence must have one entry per step": trace.sequence.shape == (steps,),
        "counted must have one entry per step": trace.counted.shape == (steps,),
    }
    rules["shape must be empty or three positive sizes"] = (
        len(trace.shape) in (0, 3) and min(trace.shape, default=1) > 0
    )
    rules["offsets must rise from 0 to the tokens"] = bool(
        rules["offsets must have steps + 1 entries"]
        and trace.offsets[0] == 0
        and trace.offsets[-1] == len(ids)
        and (np.diff(trace.offsets) >= 0).all()
    )
    if trace.counts.size or trace.counted.max(initial=-1) >= 0:
        shape = (trace.counts.shape[0], ids.shape[1], trace.experts)
        rules["counts must be [counted steps, layers, experts]"] = trace.counts.shape == shape
        rules["counted must name a row of counts"] = trace.counted.max(initial=-1) < shape[0]
    if trace.forecast_ids.size:
        fits = trace.forecast_ids.shape[:2] == (steps, ids.shape[1])
        rules["forecasts must be [steps, layers, depth, width]"] = fits
        rules["forecast_tokens must match"] = (
            trace.forecast_tokens.shape == trace.forecast_ids.shape
        )
        named = trace.forecast_ids[trace.forecast_ids != NO_EXPERT]
        rules["forecasts must name experts"] = int(named.max(initial=0)) < trace.experts
    for rule, holds in rules.items():
        if not holds:
            raise TraceError(f"inconsistent trace: {rule}")
