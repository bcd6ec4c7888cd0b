"""Pairs of tokens and experts as a router names them: their kinds, and those that name no expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from hybrimoe.errors import RoutingError
from hybrimoe.models.weights import NATIVE

INTEGERS = {
    *(torch.int64, torch.int32, torch.int16, torch.int8),
    *(torch.uint64, torch.uint32, torch.uint16, torch.uint8),
}
Compute = Callable[[Tensor, Tensor, Tensor], Tensor]


def check_kinds(name: str, hidden: Tensor, ids: Tensor) -> None:
    """RoutingError for what no layer can be called with; shapes and ranges are the kernels' to check."""
    if hidden.dtype not in NATIVE or hidden.dim() != 2:
        raise RoutingError(
            f"hidden_states must be [T, D] in float32, bfloat16 or float16, got "
            f"{hidden.dtype} {tuple(hidden.shape)} in {name}"
        )
    if ids.dtype not in INTEGERS or ids.dim() != 2:
        raise RoutingError(
            f"expert ids must be integers [T, K], got {ids.dtype} {tuple(ids.shape)} in {name}"
        )


def each_alone(ids: Tensor, weights: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Routing [T * K, 1] in which every pair is a token of its own, with weight 1 if it counts."""
    if weights.shape != ids.shape:
        raise RoutingError(
            f"ids and weights must have one shape, got {tuple(ids.shape)} and {tuple(weights.shape)}"
        )
    ids = ids.to(torch.int64)
    counts = (ids != experts) | (weights != 0)
    return ids.reshape(-1, 1), counts.reshape(-1, 1).to(torch.float32)


def without_blanks(
    compute: Compute, experts: int, hidden: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """`compute(hidden, ids, weights)` where pairs with the id `experts` contribute nothing.

    Those are left out: tokens with equally many others go together.
    """
    ids = ids.to(torch.int64)
    real = ids != experts  # [T, K]
    order = real.to(torch.uint8).argsort(dim=1, descending=True, stable=True)  # those first
    counts, out = real.sum(1), torch.zeros_like(hidden, memory_format=torch.contiguous_format)
    for count in counts.unique().tolist():
        if count:
            tokens = (counts == count).nonzero()[:, 0]
            pairs = order[tokens, :count]
            routing = ids[tokens].gather(1, pairs), weights[tokens].gather(1, pairs)
            out[tokens] = compute(hidden[tokens], *routing)
    return out
