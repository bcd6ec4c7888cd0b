"""What `torch.compile` sees of packed layers: an operation each way, so that the graph does not break.

An operation takes tensors and numbers only, hence the register from numbers to layers. Eager mode
does not come this way: it would cost some microseconds per call.
"""

from __future__ import annotations

import itertools
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor

_NUMBERS = itertools.count()
_LAYERS: WeakValueDictionary[int, Any] = WeakValueDictionary()


def register(layer: Any) -> int:
    """The number of a layer, for as long as the layer lives."""
    number = next(_NUMBERS)
    _LAYERS[number] = layer
    return number


@torch.library.custom_op("hybrimoe::experts", mutates_args=())
def experts(hidden: Tensor, ids: Tensor, weights: Tensor, number: int, learns: bool) -> Tensor:
    """`PooledExperts.compiled` of a registered layer."""
    out: Tensor = _LAYERS[number].compiled(hidden, ids, weights, learns)
    return out


@torch.library.custom_op("hybrimoe::experts_gradients", mutates_args=())
def experts_gradients(
    grad: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    """`PooledExperts.gradients` of a registered layer."""
    to_hidden, to_weights = _LAYERS[number].gradients(grad, hidden, ids, weights)
    return to_hidden.contiguous(), to_weights.contiguous()


@torch.library.custom_op("hybrimoe::linear", mutates_args=())
def linear(x: Tensor, number: int, outputs: int) -> Tensor:
    """`PackedLinear.compute` of a registered layer."""
    out: Tensor = _LAYERS[number].compute(x)
    return out


@torch.library.custom_op("hybrimoe::linear_gradient", mutates_args=())
def linear_gradient(grad: Tensor, number: int, inputs: int) -> Tensor:
    """`PackedLinear.gradients` of a registered layer."""
    found: Tensor = _LAYERS[number].gradients(grad)
    return found.contiguous()


@experts.register_fake
def _(hidden: Tensor, ids: Tensor, weights: Tensor, number: int, learns: bool) -> Tensor:
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@experts_gradients.register_fake
def _(
    grad: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor, number: int
) -> tuple[Tensor, Tensor]:
    like = torch.contiguous_format
    return torch.empty_like(hidden, memory_format=like), torch.empty_like(
        weights, memory_format=like
    )


@linear.register_fake
def _(x: Tensor, number: int, outputs: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@linear_gradient.register_fake
def _(grad: Tensor, number: int, inputs: int) -> Tensor:
    return grad.new_empty(*grad.shape[:-1], inputs)


def _keep_experts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    hidden, ids, weights, ctx.number, _ = inputs
    ctx.save_for_backward(hidden, ids, weights)


def _from_experts(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    to_hidden, to_weights = experts_gradients(grad, *ctx.saved_tensors, ctx.number)
    return to_hidden, None, to_weights, None, None


def _keep_linear(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.number, _ = inputs
    ctx.inputs = x.shape[-1]


def _from_linear(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return linear_gradient(grad, ctx.number, ctx.inputs), None, None


experts.register_autograd(_from_experts, setup_context=_keep_experts)
linear.register_autograd(_from_linear, setup_context=_keep_linear)
