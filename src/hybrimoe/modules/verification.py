"""Does a wrapped model compute what it should? Layer by layer, on real hidden states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hybrimoe.models.weights import NATIVE, bound_of
from hybrimoe.modules.pooled_experts import PooledExperts


@dataclass(frozen=True)
class LayerCheck:
    """One layer against its reference. nmse: squared error over squared reference, summed.

    intact: the stored weights are still the bytes that `wrap` wrote.
    """

    name: str
    nmse: float
    cosine: float
    bound: float
    intact: bool

    @property
    def passed(self) -> bool:
        return self.intact and self.nmse <= self.bound  # False for NaN


@dataclass(frozen=True, repr=False)
class Verification:
    """The checks of all layers; true if every layer is within its format's bound."""

    layers: tuple[LayerCheck, ...]

    @property
    def passed(self) -> bool:
        return all(layer.passed for layer in self.layers)

    @property
    def worst(self) -> LayerCheck:
        """The layer that comes closest to its bound, or exceeds it most; NaN is worst of all."""

        def badness(check: LayerCheck) -> tuple[bool, float]:
            ratio = check.nmse / check.bound if check.nmse == check.nmse else float("inf")
            return not check.intact, ratio

        return max(self.layers, key=badness)

    def __bool__(self) -> bool:
        return self.passed

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        worst = self.worst
        return (
            f"{'pass' if self.passed else 'FAIL'}: {len(self.layers)} layers checked; worst is "
            f"{worst.name}: NMSE {worst.nmse:.2e} (bound {worst.bound:.0e}), "
            f"cosine {worst.cosine:.6f}{'' if worst.intact else '; its weights changed in memory'}"
        )


def verify_layers(model: nn.Module, layers: list[PooledExperts], input_ids: Tensor) -> Verification:
    """Run the model once and hold each layer's output against `PooledExperts.reference`."""
    checks: dict[str, LayerCheck] = {}

    def check(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(module, PooledExperts)
        checks[module.name] = compare(module, args, output)

    hooks = [layer.register_forward_hook(check) for layer in layers]
    try:
        with torch.no_grad():
            model(input_ids=input_ids)
    finally:
        for hook in hooks:
            hook.remove()
    return Verification(tuple(checks.values()))


def compare(layer: PooledExperts, args: tuple[Any, ...], output: Tensor) -> LayerCheck:
    """One layer's output against the reference on the same hidden states and routing."""
    wanted = layer.reference(*args).double()
    got = output.double()
    error, size = (got - wanted).square().sum(), wanted.square().sum()
    cosine = (got * wanted).sum() / (got.norm() * wanted.norm())
    # The output's own dtype rounds too: a bfloat16 result cannot be closer than bfloat16 is.
    bound = max(bound_of(layer.packed.fmt), bound_of(NATIVE[output.dtype]))
    return LayerCheck(layer.name, float(error / size), float(cosine), bound, layer.is_intact())
