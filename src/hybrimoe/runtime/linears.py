"""Dense layers packed for the CPU, where they cost more than the experts: `Config(linear=...)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from hybrimoe.errors import RoutingError
from hybrimoe.kernels.activations import Gate
from hybrimoe.kernels.linear import PackedMatrix, matrix_layout, run_linear
from hybrimoe.kernels.workspace import Workspace
from hybrimoe.runtime import formats, opaque
from hybrimoe.runtime.adapters import ExpertWeights
from hybrimoe.runtime.guards import Rooted
from hybrimoe.runtime.pool import allocate_blobs
from hybrimoe.runtime.routers import seats_of

if TYPE_CHECKING:
    from hybrimoe.runtime.siblings import Siblings

SMALLEST = 1 << 12
"""Weights below which a matrix is left alone: there is nothing to gain."""


class FoundLinear(NamedTuple):
    """An `nn.Linear` of a model, where it hangs, and what to pack it as."""

    name: str
    parent: nn.Module
    attribute: str
    module: nn.Linear
    fmt: str
    tied: bool  # its weight is another module's too, and stays


def find_linears(model: nn.Module, weights: str, experts: list[str]) -> list[FoundLinear]:
    """Every dense layer worth packing.

    weights: "int8" or "int4". The output head is never less than int8: it chooses the tokens.
    experts: names of the routed experts' modules. They, the routers beside them and matrices of less
    than 4096 weights are left as they are.
    """
    kept = {id(part) for name in experts for part in model.get_submodule(name).modules()}
    kept |= {id(seat.router) for seat in seats_of(model, experts)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = []
    for path, parent in model.named_modules():
        for attribute, module in parent.named_children():
            if type(module) is not nn.Linear or id(module) in kept:
                continue
            if module.weight.numel() < SMALLEST:
                continue
            fmt = "int8" if module is head else weights
            name = f"{path}.{attribute}" if path else attribute
            tied = owners[id(module.weight)] > 1
            found.append(FoundLinear(name, parent, attribute, module, fmt, tied))
    return found


class PackedLinear(Rooted):
    """Computes `x @ weight.T + bias` from packed rows; the original is kept aside, without weights.

    matrix: the packed rows, where they are a part of more; None packs them into memory of their own.
    """

    def __init__(
        self,
        found: FoundLinear,
        workspace: Workspace,
        threads: int,
        matrix: PackedMatrix | None = None,
    ) -> None:
        super().__init__()
        linear = found.module
        self.name, self.threads, self.workspace = found.name, threads, workspace
        self.siblings: Siblings | None = None  # who may compute this layer along with others
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.number = opaque.register(self)
        # Kept out of nn.Module's registry: its parameters are not parameters of the model now.
        self.__dict__["found"] = found
        self.native_bytes = linear.weight.numel() * linear.weight.element_size()
        self.matrix = matrix or pack_matrix(found.fmt, linear)
        self.train(linear.training)

    def install(self) -> None:
        """Take the original's place in its parent and drop its weight."""
        setattr(self.found.parent, self.found.attribute, self)
        if not self.found.tied:
            self.found.module.weight.data = torch.empty(0, dtype=self.dtype)

    def restore(self) -> None:
        """Undo `install`; the weight is what was packed, rounded as its format rounds."""
        if not self.found.tied:
            self.found.module.weight.data = self.unpacked()
        self.found.module.train(self.training)
        setattr(self.found.parent, self.found.attribute, self.found.module)

    def unpacked(self) -> Tensor:
        """The weight [N, K] that the packed rows stand for."""
        weight = torch.empty(self.out_features, self.in_features, dtype=self.dtype)
        fmt, layout = self.matrix.fmt, self.matrix.layout
        formats.unpack(fmt, layout, self.matrix.blob[None], _as_down(weight))
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _Differentiable.apply(self, x))
        if torch.compiler.is_compiling():
            return opaque.linear(x, self.number, self.out_features)
        if self.siblings is not None:
            return self.siblings.compute(self, x)
        return self.compute(x)

    def compute(self, x: Tensor) -> Tensor:
        """`forward` without gradients."""
        return multiply(self.matrix, x, self)

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            found = self.__dict__["found"]
            if name == "bias" or found.tied:
                return getattr(found.module, name)
            raise AttributeError(
                f"the weight of {found.name} is packed as {found.fmt}; hybrimoe.unwrap(model) "
                "restores it"
            )
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        linear = self.found.module
        destination[prefix + "weight"] = linear.weight.data if self.found.tied else self.unpacked()
        if linear.bias is not None:
            destination[prefix + "bias"] = linear.bias.data

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features} to {self.out_features} as {self.matrix.fmt}"


class _Differentiable(torch.autograd.Function):
    """Forward by the kernel; the gradient of the input by the unpacked weight. The weight is frozen."""

    @staticmethod
    def forward(ctx: Any, layer: PackedLinear, x: Tensor) -> Tensor:
        ctx.layer = layer
        return layer.compute(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, grads[0] @ ctx.layer.unpacked().to(grads[0].dtype)


def multiply(matrix: PackedMatrix, x: Tensor, layer: PackedLinear) -> Tensor:
    """x [..., K] times a packed matrix [N, K], -> [..., N] in x's dtype, as a layer's settings say."""
    dtype, (outputs, inputs) = formats.NATIVE.get(x.dtype), matrix.shape
    if dtype is None or x.shape[-1] != inputs:
        raise RoutingError(
            f"the input must be [..., {inputs}] in float32, bfloat16 or float16, got "
            f"{x.dtype} {tuple(x.shape)} in {layer.name}"
        )
    # Each torch call costs microseconds in decode, so only those that are needed are made.
    if x.requires_grad:
        x = x.detach()
    out = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
    if out.numel():
        rows = formats.bits(x if x.is_contiguous() else x.contiguous()).reshape(-1, inputs)
        into = formats.bits(out).reshape(-1, outputs)
        run_linear(matrix, rows, into, layer.workspace, dtype, layer.threads)
    return out


def pack_matrix(fmt: str, linear: nn.Linear) -> PackedMatrix:
    """Pack one weight [N, K] into memory of its own; raises FormatError if the format cannot hold it."""
    return pack_matrices(fmt, [linear])[1]


def pack_matrices(fmt: str, linears: Sequence[nn.Linear]) -> list[PackedMatrix]:
    """Pack weights [N, K] of one K behind each other: all as one matrix, then each.

    The rows of each begin at a multiple of 32. Raises FormatError if the format cannot hold them.
    """
    inputs = linears[0].in_features
    layouts = [matrix_layout(fmt, linear.out_features, inputs) for linear in linears]
    whole = matrix_layout(fmt, sum(layout.hidden for layout in layouts), inputs)
    blob = allocate_blobs(1, whole)[0]
    biased = any(linear.bias is not None for linear in linears)
    bias = np.zeros(whole.hidden if biased else 0, np.float32)
    parts, at, row = [], 0, 0
    for layout, linear in zip(layouts, linears, strict=True):
        part = blob[at : at + layout.expert_bytes]
        formats.pack(fmt, layout, _as_down(linear.weight.data), part[None])
        if linear.bias is not None:
            bias[row : row + linear.out_features] = linear.bias.detach().float().numpy()
        own = bias[row : row + layout.hidden]
        parts.append(PackedMatrix(fmt, layout, (linear.out_features, inputs), part, own))
        at, row = at + layout.expert_bytes, row + layout.hidden
    return [PackedMatrix(fmt, whole, (whole.hidden, inputs), blob, bias), *parts]


def _as_down(weight: Tensor) -> ExpertWeights:
    """A matrix [N, K] as the down projection of an expert without gate and up rows."""
    outputs, inputs = weight.shape
    nothing = torch.empty(1, 0, inputs, outputs, dtype=weight.dtype)
    return ExpertWeights(nothing, weight[None], Gate(0))
