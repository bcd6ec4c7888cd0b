"""Routing known only by the share of tokens that each expert got."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hybrimoe.errors import TraceError
from hybrimoe.policy.timeline import Array
from hybrimoe.simulation.trace import RoutingTrace


def from_fractions(
    fractions: Array, tokens: int | Sequence[int], top_k: int = 2, model: str = "mixtral-8x7b"
) -> RoutingTrace:
    """One prefill step per prompt from the share of its tokens at each expert, [prompts, L, E].

    tokens: prompt length, one for all or one each. Every layer's loads sum to top_k * tokens: what
    rounding leaves over goes to the largest remainders.
    """
    shares = np.asarray(fractions, np.float64)
    if shares.ndim != 3 or not np.isfinite(shares).all() or (shares < 0).any():
        raise TraceError(f"fractions must be finite [prompts, layers, experts], got {shares.shape}")
    prompts, layers, experts = shares.shape
    total = top_k * np.broadcast_to(np.asarray(tokens), (prompts,)).astype(np.int64)[:, None, None]
    exact = shares / np.maximum(shares.sum(axis=2, keepdims=True), 1e-12) * total
    counts = np.floor(exact).astype(np.int64)
    rank = np.argsort(np.argsort(counts - exact, axis=2, kind="stable"), axis=2, kind="stable")
    counts += rank < total - counts.sum(axis=2, keepdims=True)
    return RoutingTrace(
        experts,
        top_k,
        np.zeros((0, layers, top_k), np.uint8),
        np.zeros((0, layers, top_k), np.float16),
        np.zeros(prompts + 1, np.int64),
        np.ones(prompts, bool),
        np.arange(prompts, dtype=np.int32),
        counts.astype(np.uint32),
        np.arange(prompts, dtype=np.int32),
        model=model,
    )
