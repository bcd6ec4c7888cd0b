"""What an accelerator's expert kernels take: experts in slots, and which token meets which slot.

`torch_experts.run` and `triton_experts.run` share one contract:

    run(slots, pairs, x, out, put)

adds weight[p] * expert(slot[p])(x[token[p]]) to out[token[p]] for every pair p, of each expert only
the shards [low[p], high[p]). x [T, D] in any float dtype and out [T, D] float32 are contiguous on
the device of the blobs, whose current stream is used; nothing waits for the device. The host knows
all pairs, so it cuts the work, and `put` takes what the device must know of it in one transfer.
Shapes and ids are the caller's to check. Every run gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from torch import Tensor

from hybrimoe.formats.gate import Gate
from hybrimoe.formats.layout import Layout

Put = Callable[[np.ndarray], Tensor]
"""Copies a flat int32 array to the device, in the order of the current stream."""


class Slots(NamedTuple):
    """Experts on a device; a slot may be larger than its expert, `layout.expert_bytes` says it."""

    fmt: str
    layout: Layout
    gate: Gate
    blobs: Tensor  # [S, expert_bytes] uint8, contiguous, starting on 16 bytes


class Pairs(NamedTuple):
    """One row per token and expert, in order of tokens; a token meets a slot at most once."""

    token: np.ndarray  # [P] int32, ascending
    slot: np.ndarray  # [P] int32
    weight: np.ndarray  # [P] float32
    low: np.ndarray  # [P] int32, first shard to sum
    high: np.ndarray  # [P] int32, behind the last one; both equal for all pairs of a slot


def pairs_of(slots: np.ndarray, weights: np.ndarray, shards: np.ndarray) -> Pairs:
    """The pairs of a launch: slots [T, K] with ranges in shards [S + 1, 2], whose last row is none.

    weights [T, K] float32. Costs what the pairs cost, whatever the number of slots.
    """
    flat = slots.reshape(-1)
    here = np.flatnonzero(flat < len(shards) - 1)
    slot = flat[here].astype(np.int32)
    low, high = shards[slot].T
    token = (here // slots.shape[1]).astype(np.int32)
    return Pairs(token, slot, weights.reshape(-1)[here], low, high)


class Run(NamedTuple):
    """All pairs of one slot, which lie side by side once sorted by slot."""

    slot: int
    start: int
    count: int
    low: int
    high: int


def by_slot(pairs: Pairs) -> tuple[np.ndarray, list[Run]]:
    """The places [P] of the pairs in order of slots, tokens ascending, and where each slot's lie."""
    order = np.argsort(pairs.slot, kind="stable")
    slot = pairs.slot[order]
    starts = np.flatnonzero(np.diff(slot, prepend=-1))
    counts = np.diff(starts, append=slot.size)
    heads = order[starts]
    # fmt: off
    runs = zip(slot[starts].tolist(), starts.tolist(), counts.tolist(),
               pairs.low[heads].tolist(), pairs.high[heads].tolist())
    # fmt: on
    return order, [Run(*run) for run in runs]


def begins(pairs: Pairs, tokens: int) -> np.ndarray:
    """[T + 1] where the pairs of each token begin, and where the last ones end."""
    return np.searchsorted(pairs.token, np.arange(tokens + 1, dtype=np.int32))
