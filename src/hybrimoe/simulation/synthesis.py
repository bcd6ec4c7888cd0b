"""Routing made up to measure: router logits that drift in time and carry over between layers."""

from collections.abc import Sequence

import numpy as np

from hybrimoe.errors import ConfigError
from hybrimoe.policy.cache import Cache
from hybrimoe.policy.rankings import LRU, Ranking
from hybrimoe.policy.timeline import Array
from hybrimoe.simulation.trace import RoutingTrace

FIT_TOKENS = 200  # rows used while fitting; the hit rate of as many is within a point or two
FIT_ROUNDS = 9


def synthesise(
    layers: int,
    experts: int,
    top_k: int,
    *,
    tokens: int = 256,
    prompt: int = 0,
    sequences: int = 1,
    temporal: float = 0.5,
    across: float = 0.3,
    skew: float = 0.5,
    sharpness: float = 2.0,
    recall: Sequence[float] = (),
    lru_hit_rate: float | None = None,
    capacity: float = 0.25,
    model: str = "",
    seed: int = 0,
) -> RoutingTrace:
    """A trace of `sequences` prompts, each one prefill step and `tokens` decode steps.

    temporal: correlation of a router's logits with the previous token's, from 0 to below 1.
    across: correlation of what is new in a layer with what is new in the layer before.
    skew: spread of the experts' lasting popularity, against 1 for everything that changes.
    sharpness: larger logits put more of the score on the best experts.
    recall: how much of the top-k a look-ahead recalls, 1, 2, ... layers before; adds forecasts.
    lru_hit_rate: choose `temporal` so that LRU hits this often with `capacity` of each layer's
        experts resident; refused where no correlation gives it.
    """
    _check(layers, experts, top_k, temporal, across)
    if lru_hit_rate is not None:
        temporal = _fit_temporal(
            *(layers, experts, top_k, across, skew, lru_hit_rate, capacity, seed)
        )
    rng = np.random.default_rng(seed)
    rows = sequences * (prompt + tokens)
    logits = _logits(rng, rows, layers, experts, temporal, across, skew)
    ranks = min(2 * top_k, experts)  # as many as MRS reads
    ids, scores = _ranked(logits, ranks, sharpness)
    sizes = ([prompt] if prompt else []) + [1] * tokens
    offsets = np.cumsum([0, *(sizes * sequences)]).astype(np.int64)
    prefill = np.array(([True] if prompt else []) + [False] * tokens)
    ahead, expected = _forecasts(rng, logits, offsets, top_k, recall)
    return RoutingTrace(
        experts,
        top_k,
        ids,
        scores,
        offsets,
        np.tile(prefill, sequences),
        np.repeat(np.arange(sequences, dtype=np.int32), len(sizes)),
        forecast_ids=ahead,
        forecast_tokens=expected,
        model=model,
    )


def hit_rate(trace: RoutingTrace, ranking: Ranking, slots: int) -> tuple[float, float]:
    """What a cache alone does on a trace, every miss offered to it: (hit rate, uploads per step).

    Starts empty and protects a layer's own experts, as published hit rates do.
    """
    cache = Cache(ranking, slots, trace.layers, trace.experts, trace.top_k)
    hits = asked = uploads = 0
    for step in range(trace.steps):
        for load in trace.loads(step):
            ready = cache.ready(load.layer, load.experts)
            cache.observe(load)
            absent = load.experts[ready > 0]
            asked += ready.size
            hits += ready.size - absent.size
            for expert in absent.tolist():
                uploads += cache.admit(load.layer, expert, load.experts) is not None
    return hits / max(asked, 1), uploads / max(trace.steps, 1)


def _logits(
    rng: np.random.Generator,
    rows: int,
    layers: int,
    experts: int,
    temporal: float,
    across: float,
    skew: float,
) -> Array:
    """[N, L, E] float32: a lasting part per expert and a part that drifts from token to token.

    What is new at a layer is partly what was new one layer before, under a fixed permutation.
    """
    popular = skew * rng.standard_normal((layers, experts)).astype(np.float32)
    order = np.stack([rng.permutation(experts) for _ in range(layers)])
    fresh = rng.standard_normal((rows, layers, experts), np.float32)
    for layer in range(1, layers):
        carried = fresh[:, layer - 1, order[layer]]
        fresh[:, layer] = across * carried + np.sqrt(1 - across**2) * fresh[:, layer]
    keep = np.float32(temporal)
    for row in range(1, rows):
        fresh[row] = keep * fresh[row - 1] + np.sqrt(1 - keep**2) * fresh[row]
    return popular + fresh


def _ranked(logits: Array, ranks: int, sharpness: float) -> tuple[Array, Array]:
    """The best experts of each row, and their softmax scores."""
    order = np.argsort(-logits, axis=2, kind="stable")[:, :, :ranks]
    power = np.exp(sharpness * (logits - logits.max(axis=2, keepdims=True)))
    scores = power / power.sum(axis=2, keepdims=True)
    narrow = np.uint8 if logits.shape[2] <= 256 else np.uint16
    picked = np.take_along_axis(scores, order, axis=2).astype(np.float16)
    return order.astype(narrow), picked


def _forecasts(
    rng: np.random.Generator, logits: Array, offsets: Array, top_k: int, recall: Sequence[float]
) -> tuple[Array, Array]:
    """Forecasts from logits with as much noise as leaves the given recall."""
    steps, layers, experts = offsets.size - 1, logits.shape[1], logits.shape[2]
    shape = (steps, layers, len(recall), top_k)
    ids, tokens = np.zeros(shape, np.uint16), np.zeros(shape, np.float16)
    noise = rng.standard_normal(logits.shape, np.float32) if recall else logits
    for d, share in enumerate(recall):
        sigma = _fit_noise(logits, noise, top_k, share)
        seen = logits + sigma * noise
        best = np.argsort(-seen, axis=2, kind="stable")[:, :, :top_k]
        counts = np.zeros((steps, layers, experts), np.float32)
        step = np.repeat(np.arange(steps), np.diff(offsets))
        np.add.at(counts, (step[:, None, None], np.arange(layers)[:, None], best), 1)
        order = np.argsort(-counts, axis=2, kind="stable")[:, :, :top_k]
        expected = np.take_along_axis(counts, order, axis=2) * np.float32(share)
        ids[:, : layers - 1 - d, d] = order[:, d + 1 :]
        tokens[:, : layers - 1 - d, d] = expected[:, d + 1 :]
    return ids, tokens


def _fit_noise(logits: Array, noise: Array, top_k: int, recall: float) -> float:
    """The noise under which the top-k of a few rows keeps this share of the true one."""
    few, some = logits[:64], noise[:64]
    true = np.argsort(-few, axis=2)[:, :, :top_k]
    low, high = 0.0, 20.0
    for _ in range(12):
        middle = (low + high) / 2
        seen = np.argsort(-(few + middle * some), axis=2)[:, :, :top_k]
        kept = (seen[..., None] == true[..., None, :]).any(axis=3).mean()
        low, high = (middle, high) if kept > recall else (low, middle)
    return (low + high) / 2


def _fit_temporal(
    layers: int,
    experts: int,
    top_k: int,
    across: float,
    skew: float,
    wanted: float,
    capacity: float,
    seed: int,
) -> float:
    """Bisect the temporal correlation; LRU hits more often the larger it is."""
    few = min(layers, 4)  # layers are alike, so a few tell the hit rate
    slots = max(round(capacity * experts), top_k) * few

    def rate(temporal: float) -> float:
        trace = synthesise(
            *(few, experts, top_k),
            **{"tokens": FIT_TOKENS, "temporal": temporal, "across": across, "skew": skew},  # type: ignore[arg-type]
            seed=seed,
        )
        return hit_rate(trace, LRU(), slots)[0]

    low, high = 0.0, 0.999
    if not rate(low) - 0.02 <= wanted <= rate(high):
        raise ConfigError(
            f"lru_hit_rate must lie in [{rate(low):.3f}, {rate(high):.3f}] for {experts} experts, "
            f"top-{top_k} and skew {skew}, got {wanted}"
        )
    for _ in range(FIT_ROUNDS):
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) < wanted else (low, middle)
    return (low + high) / 2


def _check(layers: int, experts: int, top_k: int, temporal: float, across: float) -> None:
    if layers < 1 or not 1 <= top_k <= experts:
        raise ConfigError(
            f"layers must be positive and top_k in [1, experts], got {layers}, {top_k}, {experts}"
        )
    for name, value in (("temporal", temporal), ("across", across)):
        if not 0 <= value < 1:
            raise ConfigError(f"{name} must lie in [0, 1), got {value}")
