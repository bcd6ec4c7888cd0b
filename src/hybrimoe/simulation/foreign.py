"""Routing recorded by others: files that are read as they are."""

import os

import numpy as np

from hybrimoe.errors import TraceError
from hybrimoe.policy.timeline import Array
from hybrimoe.simulation.trace import RoutingTrace, read_arrays


def read_trace(path: str | os.PathLike[str]) -> RoutingTrace:
    """A trace written by hybrimoe, or a decode file of ids, probs and offsets."""
    arrays = read_arrays(path)
    if {"ids", "probs", "offsets"} <= set(arrays) and "head" not in arrays:
        return from_decode(arrays["ids"], arrays["probs"], arrays["offsets"])
    return RoutingTrace.load(path)


def from_decode(
    ids: Array,
    probs: Array,
    offsets: Array,
    experts: int = 32,
    model: str = "gpt-oss-20b",
) -> RoutingTrace:
    """One decode step per row: ids and probs [tokens, L, K], sequence s in offsets[s:s + 2]."""
    if ids.ndim != 3 or offsets.ndim != 1 or offsets.size < 1 or offsets[-1] != len(ids):
        raise TraceError(
            "ids must be [tokens, layers, top_k] and offsets must end at the tokens, got "
            f"{ids.shape} and {offsets[-1:]}"
        )
    return RoutingTrace(
        experts,
        ids.shape[2],
        ids,
        probs,
        np.arange(len(ids) + 1),
        np.zeros(len(ids), bool),
        np.repeat(np.arange(offsets.size - 1), np.diff(offsets)).astype(np.int32),
        model=model,
    )
