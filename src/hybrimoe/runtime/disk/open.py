"""Opens the disk tier that a configuration asks for."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hybrimoe.config import Config
from hybrimoe.models.adapters import FoundExperts, top_k_of
from hybrimoe.runtime.disk.file import ExpertFile
from hybrimoe.runtime.disk.sizes import packed_sizes, tier_sizes
from hybrimoe.runtime.disk.tier import DiskTier

WeightsOf = Callable[[str], str | None]
"""The format that files prescribe for the experts of a name."""


def open_tier(
    config: Config,
    model: nn.Module,
    found: list[FoundExperts],
    weights_of: WeightsOf | None = None,
) -> DiskTier | None:
    """The tier for a model that is not wrapped yet, or None where RAM holds all its experts.

    found: its experts. weights_of: instead of `config.weights`, where files prescribe it.
    Takes no memory and no disk yet. Raises ConfigError.
    """
    if config.ram is None:
        return None
    layers = [
        packed_sizes(experts.spec, (weights_of and weights_of(experts.name)) or config.weights)
        for experts in found
    ]
    top_k = top_k_of(model)
    sizes = tier_sizes(config.ram, layers, top_k)
    if sizes is None:
        return None
    return DiskTier(sizes, top_k, ExpertFile(config.spill), config.trace)
