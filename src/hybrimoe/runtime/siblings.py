"""Dense layers that read one input, computed by one launch when there is one token.

Each launch wakes the threads and ends with a wait for them; the keys and values of a layer with few
heads take less time than that.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hybrimoe.kernels.linear import PackedMatrix
from hybrimoe.kernels.workspace import Workspace
from hybrimoe.runtime.linears import FoundLinear, PackedLinear, multiply, pack_matrices

FAMILIES = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""What layers that read one input are called, in the order in which they are."""


class _Memo(NamedTuple):
    """Outputs that nobody has asked for yet, and what they were computed from."""

    x: Tensor
    version: int
    outputs: dict[PackedLinear, Tensor]


class _Latest(threading.local):
    """What this thread's last call of the first sibling left for the others."""

    memo: _Memo | None = None


class Siblings:
    """The first layer computes all; the others hand out their part, each once.

    They do so for the very tensor that the first was called with, unchanged since. If that is ever
    not what they are called with, or not all are called, then from then on each computes alone.
    """

    def __init__(self, matrix: PackedMatrix, layers: Sequence[PackedLinear]) -> None:
        self.matrix, self.layers, self.together = matrix, layers, True
        # The output of each layer, and behind it the rows that fill up its last group.
        sizes = [(part.out_features, part.matrix.layout.hidden) for part in layers]
        self.sizes = [size for own, padded in sizes for size in (own, padded - own)]
        self.latest = _Latest()

    def compute(self, layer: PackedLinear, x: Tensor) -> Tensor:
        """What the layer alone would compute, to the bit."""
        if not self.together or x.numel() != layer.in_features:
            return layer.compute(x)
        # Inference tensors do not tell whether they were changed; autograd takes parts of one tensor
        # for changed when another part is.
        if torch.is_inference(x) or torch.is_grad_enabled():
            return layer.compute(x)
        memo = self.latest.memo
        if layer is self.layers[0]:
            self.together = memo is None
            return self._begin(x) if self.together else self._part(layer, x)
        if memo is None or memo.x is not x or memo.version != x._version:
            return self._part(layer, x)
        output = memo.outputs.pop(layer, None)
        if output is None:
            return self._part(layer, x)
        if not memo.outputs:
            self.latest.memo = None
        return output

    def _part(self, layer: PackedLinear, x: Tensor) -> Tensor:
        """From now on, each computes alone."""
        self.together, self.latest.memo = False, None
        return layer.compute(x)

    def _begin(self, x: Tensor) -> Tensor:
        parts = multiply(self.matrix, x, self.layers[0]).split(self.sizes, -1)[::2]
        outputs = dict(zip(self.layers[1:], parts[1:], strict=True))
        self.latest.memo = _Memo(x, x._version, outputs)
        return parts[0]


def pack(
    found: Sequence[FoundLinear], workspace: Workspace, threads: int
) -> Iterator[PackedLinear]:
    """Pack dense layers, siblings into one block of memory; who iterates installs each."""
    for family in families(found):
        whole, *parts = pack_matrices(family[0].fmt, [one.module for one in family])
        layers = [
            PackedLinear(one, workspace, threads, part)
            for one, part in zip(family, parts, strict=True)
        ]
        siblings = Siblings(whole, layers) if len(layers) > 1 else None
        for layer in layers:
            layer.siblings = siblings
            yield layer


def families(found: Sequence[FoundLinear]) -> Iterator[list[FoundLinear]]:
    """Each layer once, those that are siblings by their names together."""
    places = {(id(one.parent), one.attribute): one for one in found}
    done: set[int] = set()
    for one in found:
        if id(one) in done:
            continue
        names = next((names for names in FAMILIES if one.attribute in names), (one.attribute,))
        family = [places.get((id(one.parent), name)) for name in names]
        kinds = {like and (like.fmt, like.module.in_features, like.tied) for like in family}
        together = [like for like in family if like] if len(kinds) == 1 else [one]
        done |= {id(like) for like in together}
        yield together
