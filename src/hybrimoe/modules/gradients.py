"""Gradients of what pooled experts are called with; the experts themselves are frozen."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from hybrimoe.modules.frozen import refuse_training
from hybrimoe.modules.lora import Folded, LayerAdapters


class FrozenLayer(Protocol):
    """What of `PooledExperts` its gradients need."""

    name: str
    adapters: LayerAdapters

    def compute(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The output, without gradients."""

    def call_original(
        self, tensors: dict[str, Tensor], hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        """The original's own arithmetic on these weights."""


class Differentiable(torch.autograd.Function):
    """Forward by the kernels, backward by `differentiate`.

    Experts themselves are frozen: they have no parameters here, so none gets a silent zero.
    """

    @staticmethod
    def forward(
        ctx: Any, layer: FrozenLayer, hidden: Tensor, ids: Tensor, weights: Tensor, *_: Tensor
    ) -> Tensor:
        ctx.layer = layer
        ctx.save_for_backward(hidden, ids, weights)
        out = layer.compute(hidden, ids, weights)
        ctx.folded = layer.adapters.folded
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if any(ctx.needs_input_grad[4:]):
            refuse_training(ctx.layer.name)
        found = differentiate(ctx.layer, ctx.folded, grads[0], *ctx.saved_tensors)
        return None, found[0], None, found[1]


def differentiate(
    layer: FrozenLayer, folded: Folded, grad: Tensor, *called: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of hidden states and routing weights, from that of the output.

    By the original arithmetic on unpacked weights with the deltas that were folded into them.
    called: hidden states [T, D], ids [T, K] and weights [T, K].
    """
    hidden, ids, weights = called
    hidden, weights = hidden.detach().requires_grad_(), weights.detach().requires_grad_()
    with torch.enable_grad():
        tensors = layer.adapters.as_in(folded)
        tensors = {name: tensor.to(hidden) for name, tensor in tensors.items()}  # dtype and device
        out = layer.call_original(tensors, hidden, ids, weights)
        to_hidden, to_weights = torch.autograd.grad(out, (hidden, weights), grad)
    return to_hidden, to_weights


def differentiate_apart(
    layer: FrozenLayer, folded: Folded, grad: Tensor, *called: Tensor
) -> tuple[Tensor, Tensor]:
    """`differentiate` from inside an operation of torch: its thread has no autograd there."""
    with ThreadPoolExecutor(max_workers=1) as other:
        return other.submit(differentiate, layer, folded, grad, *called).result()
