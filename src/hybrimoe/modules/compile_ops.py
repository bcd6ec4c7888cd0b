"""What `torch.compile` sees of packed layers: one operation each, so that the graph does not break.

An operation takes tensors and numbers only, hence the register from numbers to layers. Eager mode
does not come this way: it would cost some microseconds per call.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Layer(Protocol):
    """A module without parameters of its own that computes on the host."""

    @property
    def compute(self) -> Callable[..., Tensor]:
        """Its forward, without gradients."""


_NUMBERS = itertools.count()
_LAYERS: WeakValueDictionary[int, Layer] = WeakValueDictionary()


def register(layer: Layer) -> int:
    """The number of a layer, for as long as the layer lives."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return number


@torch.library.custom_op("hybrimoe::experts", mutates_args=())
def experts(hidden: Tensor, ids: Tensor, weights: Tensor, number: int) -> Tensor:
    """`PooledExperts.compute` of a registered layer."""
    return _LAYERS[number].compute(hidden, ids, weights)


@torch.library.custom_op("hybrimoe::linear", mutates_args=())
def linear(x: Tensor, number: int, outputs: int) -> Tensor:
    """`PackedLinear.compute` of a registered layer."""
    return _LAYERS[number].compute(x)


@experts.register_fake
def _(hidden: Tensor, ids: Tensor, weights: Tensor, number: int) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@linear.register_fake
def _(x: Tensor, number: int, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)
