"""Opens the disk tier that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hybrimoe.config import Config
from hybrimoe.formats.layout import expert_layout
from hybrimoe.models import weights as formats
from hybrimoe.models.adapters import FoundExperts, find_experts, top_k_of
from hybrimoe.runtime.disk.file import Backing
from hybrimoe.runtime.disk.sizes import tier_sizes
from hybrimoe.runtime.disk.tier import DiskTier

WeightsOf = Callable[[str], str | None]
"""The format that files prescribe for the experts of a name."""


def open_tier(
    config: Config, model: nn.Module, weights_of: WeightsOf | None = None
) -> DiskTier | None:
    """The tier for a model that is not wrapped yet, or None where RAM holds all its experts.

    weights_of: instead of `config.weights`, where files prescribe it.
    Takes no memory and no disk yet. Raises ConfigError.
    """
    if config.ram is None:
        return None
    layers = [
        shape_of(found, (weights_of and weights_of(found.name)) or config.weights)
        for found in find_experts(model)
    ]
    top_k = top_k_of(model)
    sizes = tier_sizes(config.ram, layers, top_k)
    if sizes is None:
        return None
    return DiskTier(sizes, top_k, Backing(config.spill), config.trace)


def shape_of(found: FoundExperts, weights: str) -> tuple[int, int]:
    """How many experts a layer has, and the bytes of one when it is packed."""
    described = found.describe(found.module)
    count, matrices, inner, hidden = described.up.shape
    fmt = formats.format_of(weights, described.up.dtype)
    layout = expert_layout(fmt, hidden, inner, matrices == 2, described.up_bias is not None)
    return count, layout.expert_bytes
