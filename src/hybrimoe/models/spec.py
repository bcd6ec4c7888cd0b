"""What is known of one layer's routed experts besides their numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hybrimoe.formats.gate import Gate
from hybrimoe.formats.layout import Layout, expert_layout
from hybrimoe.models.weights import format_of


@dataclass(frozen=True)
class ExpertSpec:
    """The routed experts of one layer, found once per model: `FoundExperts.spec`.

    name: of their module in the model. experts: E. hidden: D. inner: F. gate: the formula between the
    projections. parameters: names in the order up, down, biases. native_bytes: as the checkpoint's
    dtype has them. kept: the format that files prescribe, whatever is asked for; None if they
    prescribe none.
    """

    name: str
    experts: int
    hidden: int
    inner: int
    gated: bool
    bias: bool
    dtype: torch.dtype
    gate: Gate
    parameters: tuple[str, ...]
    native_bytes: int
    kept: str | None = None

    def fmt(self, weights: str) -> str:
        """The blob format of its experts where a `Config.weights` choice is asked for."""
        return format_of(self.kept or weights, self.dtype)

    def layout(self, weights: str) -> Layout:
        """Where the numbers of one packed expert lie."""
        return expert_layout(self.fmt(weights), self.hidden, self.inner, self.gated, self.bias)

    def packed_bytes(self, weights: str) -> int:
        """All experts of the layer in the pool."""
        return self.experts * self.layout(weights).expert_bytes
