"""The norm whose output a router reads, found by watching one call of its layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class InputNorm:
    """Looks among the children of some modules for the norm before a router.

    The norm is the one that returned the very memory that the router is called with. It only serves
    where it scales channels and does nothing else to them, as RMS norms do: then one layer's
    router input is turned into another layer's by one product.
    """

    def __init__(self, around: Sequence[nn.Module]) -> None:
        children = [child for module in around for child in module.children()]
        self._candidates = [child for child in children if _is_norm(child)]
        self._outputs: list[tuple[nn.Module, Tensor]] = []
        self._hooks: list[Any] = []
        self._ratios: dict[tuple[int, torch.dtype, torch.device], Tensor | None] = {}
        self.module: nn.Module | None = None

    @property
    def searching(self) -> bool:
        """Whether the next call may tell which norm it is."""
        return bool(self._hooks)

    def watch(self) -> list[Any]:
        """Watch the candidates until the norm is found; returns the hooks."""
        self._hooks = [c.register_forward_hook(self._returned) for c in self._candidates]
        return self._hooks[:]

    def find(self, x: Tensor) -> None:
        """The router is called with `x`: decide, and watch no more."""
        outputs, self._outputs = self._outputs, []
        for module, output in outputs:
            if output.data_ptr() == x.data_ptr() and output.numel() == x.numel():
                self.module = module
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def to(self, other: InputNorm, x: Tensor) -> Tensor | None:
        """[D], what to multiply outputs `x` of this norm by to make them the other's."""
        if self.module is None or other.module is None:
            return None
        key = id(other), x.dtype, x.device
        if key not in self._ratios:
            mine, its = (channel_scale(m, x) for m in (self.module, other.module))
            self._ratios[key] = None if mine is None or its is None else _ratio(mine, its, x.dtype)
        return self._ratios[key]

    def _returned(self, module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            self._outputs.append((module, output))


@torch.no_grad()
def channel_scale(norm: nn.Module, x: Tensor) -> Tensor | None:
    """[D] float32, what a norm multiplies normalised channels by; None if it is no RMS norm.

    Seen on ones, whose root mean square is 1, and on their negatives: a mean or a bias shows there.
    """
    ones = torch.ones(2, x.shape[-1], dtype=x.dtype, device=x.device)
    ones[1] = -1
    scale, negative = norm.forward(ones).float()
    # sync: once per pair of layers.
    plain = torch.equal(scale, -negative) and bool(scale.any()) and bool(scale.isfinite().all())
    return scale if plain else None


def _ratio(mine: Tensor, its: Tensor, dtype: torch.dtype) -> Tensor:
    """A channel that this norm drops is lost for the other, too."""
    return torch.where(mine == 0, 0, its / mine).to(dtype)


def _is_norm(module: nn.Module) -> bool:
    """Whether its only parameters are vectors, the first of them called weight."""
    parameters = dict(module.named_parameters())
    return "weight" in parameters and all(p.dim() == 1 for p in parameters.values())
