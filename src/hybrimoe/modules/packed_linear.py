"""Dense layers packed for the CPU, where they cost more than the experts: `Config(linear=...)`."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn

from hybrimoe.errors import RoutingError
from hybrimoe.formats.gate import Gate
from hybrimoe.formats.registry import rounded
from hybrimoe.kernels.cpu.linear import PackedMatrix, matrix_layout, run_linear
from hybrimoe.kernels.cpu.workspace import Workspace
from hybrimoe.models import weights as formats
from hybrimoe.models.places import exchange
from hybrimoe.models.routers import probes_of
from hybrimoe.models.tuners import own_modules
from hybrimoe.models.weights import ExpertWeights
from hybrimoe.modules import compile_ops as opaque
from hybrimoe.modules.replacement import PackedModule
from hybrimoe.runtime.pages import allocate_blobs

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


def head_format() -> str:
    """What the output head is packed as, whatever the other layers are."""
    return rounded()[0]


def find_linears(model: nn.Module, weights: str, experts: list[str]) -> list[FoundLinear]:
    """Every dense layer worth packing.

    weights: a format to round to. The output head has the most precise: it chooses the tokens.
    experts: names of the routed experts' modules. They, the routers beside them, adapters and
    matrices of less than 4096 weights are left as they are.
    """
    kept = {id(part) for part in own_modules(model)}
    kept |= {id(part) for name in experts for part in model.get_submodule(name).modules()}
    kept |= {id(probe.router) for probe in probes_of(model, experts)}
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
            fmt = head_format() if module is head else weights
            name = f"{path}.{attribute}" if path else attribute
            tied = owners[id(module.weight)] > 1
            found.append(FoundLinear(name, parent, attribute, module, fmt, tied))
    return found


class PackedLinear(PackedModule):
    """Computes `x @ weight.T + bias` from packed rows; the original is kept aside, without weights."""

    def __init__(
        self,
        found: FoundLinear,
        workspace: Workspace,
        threads: int,
        matrix: PackedMatrix | None = None,
    ) -> None:
        """matrix: the rows, where they are packed already; the weight's place is then empty."""
        super().__init__()
        linear = found.module
        self.name, self.threads, self.workspace = found.name, threads, workspace
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = linear.weight.dtype
        self.number = opaque.register(self)
        # Kept out of nn.Module's registry: its parameters are not parameters of the model now.
        self.__dict__["found"] = found
        weights = self.in_features * self.out_features
        self.native_bytes = weights * self.dtype.itemsize
        self.packed_numbers = 0 if found.tied else weights
        self.packed_numbers += 0 if linear.bias is None else linear.bias.numel()
        self.packed_names = tuple(name for name, _ in linear.named_parameters())
        self.matrix = pack_matrix(found.fmt, linear) if matrix is None else matrix
        self.train(linear.training)

    @property
    def packed_bytes(self) -> int:  # type: ignore[override]
        """What its rows take."""
        return self.matrix.blob.nbytes

    def attach(self) -> None:
        """Take the original's place in its parent and drop its weight."""
        exchange(self.found, self.found.module, self)
        if not self.found.tied:
            self.found.module.weight.data = torch.empty(0, dtype=self.dtype)

    def restore(self) -> None:
        """Undo `attach`; the weight is what was packed, rounded as its format rounds."""
        if not self.found.tied:
            self.found.module.weight.data = self.unpacked()
        self.found.module.train(self.training)
        exchange(self.found, self, self.found.module)

    def kept(self) -> dict[str, Tensor]:
        """What of the original is not packed: its bias, and a weight that is another module's too."""
        linear = self.found.module
        kept = {"weight": linear.weight if self.found.tied else None, "bias": linear.bias}
        return {name: tensor.detach() for name, tensor in kept.items() if tensor is not None}

    def unpacked(self) -> Tensor:
        """The weight [N, K] that the packed rows stand for."""
        weight = torch.empty(self.out_features, self.in_features, dtype=self.dtype)
        fmt, layout = self.matrix.fmt, self.matrix.layout
        formats.unpack(fmt, layout, self.matrix.blob[None], _as_down(weight))
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        if torch.compiler.is_compiling():
            return opaque.linear(x, self.number, self.out_features)
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _Differentiable.apply(self, x))
        return self.compute(x)

    def gradients(self, grad: Tensor) -> Tensor:
        """Of the input, by the unpacked weight."""
        return grad @ self.unpacked().to(grad.dtype)

    def compute(self, x: Tensor) -> Tensor:
        """`forward` without gradients."""
        dtype = formats.NATIVE.get(x.dtype)
        if dtype is None or x.shape[-1] != self.in_features:
            raise RoutingError(
                f"the input must be [..., {self.in_features}] in float32, bfloat16 or float16, got "
                f"{x.dtype} {tuple(x.shape)} in {self.name}"
            )
        # Each torch call costs microseconds in decode, so only those that are needed are made.
        if x.requires_grad:
            x = x.detach()
        out = torch.empty(*x.shape[:-1], self.out_features, dtype=x.dtype)
        if out.numel():
            rows = formats.bits(x if x.is_contiguous() else x.contiguous())
            arrays = (
                rows.reshape(-1, self.in_features),
                formats.bits(out).reshape(-1, self.out_features),
            )
            run_linear(self.matrix, *arrays, self.workspace, dtype, self.threads)
        return out

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
        kept = self.kept()
        state = kept if self.found.tied else {"weight": self.unpacked(), **kept}
        destination.update({prefix + name: tensor for name, tensor in state.items()})

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features} to {self.out_features} as {self.matrix.fmt}"


class _Differentiable(torch.autograd.Function):
    """Forward by the kernel, backward by `PackedLinear.gradients`. The weight is frozen."""

    @staticmethod
    def forward(ctx: Any, layer: PackedLinear, x: Tensor) -> Tensor:
        ctx.layer = layer
        return layer.compute(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, Tensor]:
        return None, ctx.layer.gradients(grads[0])


def pack_matrix(fmt: str, linear: nn.Linear) -> PackedMatrix:
    """Pack one weight [N, K] into memory of its own; raises FormatError if the format cannot hold it."""
    layout = matrix_layout(fmt, *linear.weight.shape)
    blobs = allocate_blobs(1, layout)
    formats.pack(fmt, layout, _as_down(linear.weight.data), blobs)
    return packed_matrix(fmt, linear, blobs[0])


def packed_matrix(fmt: str, linear: nn.Linear, blob: np.ndarray) -> PackedMatrix:
    """A matrix whose rows are packed in `blob` [n] uint8, with the bias of its layer."""
    shape = linear.out_features, linear.in_features
    layout = matrix_layout(fmt, *shape)
    bias = np.zeros(0 if linear.bias is None else layout.hidden, np.float32)
    if linear.bias is not None:
        bias[: linear.out_features] = linear.bias.detach().float().numpy()
    return PackedMatrix(fmt, layout, shape, blob, bias)


def _as_down(weight: Tensor) -> ExpertWeights:
    """A matrix [N, K] as the down projection of an expert without gate and up rows."""
    outputs, inputs = weight.shape
    nothing = torch.empty(1, 0, inputs, outputs, dtype=weight.dtype)
    return ExpertWeights(nothing, weight[None], Gate(0))
