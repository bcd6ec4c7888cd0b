"""Low-rank changes of expert weights: added to them, and taken out again to the last bit.

Sums are made in float64 and rounded once, to the weights' own dtype. What was added is subtracted in
the same way, which gives back most weights as they were; of the others, those that were much smaller
than the change, the value itself is kept. With a change of a hundredth of the weights, that is about
one weight in a hundred.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""What compares bits, by the size of a number."""


class Delta(NamedTuple):
    """scale * left[e] @ right[e] is added to expert e. left: [E, N, R], right: [E, R, K]."""

    left: Tensor
    right: Tensor
    scale: float


class Kept(NamedTuple):
    """Weights of one expert that subtraction does not give back: where they are, None for all."""

    places: Tensor | None
    values: Tensor

    @property
    def nbytes(self) -> int:
        """The memory it takes."""
        return self.values.nbytes + (0 if self.places is None else self.places.nbytes)


def add(weights: Tensor, deltas: Sequence[Delta]) -> Tensor:
    """weights, [E, N, K] or [N, K], and all deltas, in memory of their own."""
    return _sum(weights, deltas, 1.0)


def subtract(folded: Tensor, deltas: Sequence[Delta], kept: Sequence[Kept] = ()) -> Tensor:
    """The inverse of `add`: exact with what `keep` kept of the weights, else up to rounding."""
    weights = _sum(folded, deltas, -1.0)
    for expert, (places, values) in zip(_experts(weights), kept):
        if places is None:
            expert.copy_(values.view_as(expert))
        else:
            expert.view(-1)[places.long()] = values
    return weights


def keep(weights: Tensor, folded: Tensor, deltas: Sequence[Delta]) -> list[Kept]:
    """Of each expert, what `subtract` needs to give back these very weights."""
    found = subtract(folded, deltas)
    return [_differing(*pair) for pair in zip(_experts(weights), _experts(found))]


def _sum(weights: Tensor, deltas: Sequence[Delta], sign: float) -> Tensor:
    out = weights.detach().clone(memory_format=torch.contiguous_format)
    if deltas:
        for e, expert in enumerate(_experts(out)):
            total = expert.double()
            for left, right, scale in deltas:
                total.addmm_(left[e].double(), right[e].double(), alpha=sign * scale)
            expert.copy_(total)
    return out


def _differing(wanted: Tensor, found: Tensor) -> Kept:
    kind = INTEGERS[wanted.element_size()]
    wanted = wanted.detach().contiguous().view(-1)
    places = (wanted.view(kind) != found.view(-1).view(kind)).nonzero().view(-1)
    if len(places) * (4 + wanted.element_size()) >= wanted.nbytes:
        return Kept(None, wanted.clone())
    return Kept(places.to(torch.int32), wanted[places])


def _experts(weights: Tensor) -> Tensor:
    """[E, N, K]; a parameter of two dimensions, such as all biases, counts as one expert."""
    return weights if weights.dim() == 3 else weights.unsqueeze(0)
