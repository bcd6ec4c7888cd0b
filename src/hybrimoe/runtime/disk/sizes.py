"""How many experts a budget of RAM holds, before anything is allocated."""

from __future__ import annotations

from typing import NamedTuple

from hybrimoe.errors import ConfigError
from hybrimoe.models.spec import ExpertSpec
from hybrimoe.runtime.disk.file import padded
from hybrimoe.sizes import parse_size


class TierSizes(NamedTuple):
    """What a disk tier is laid out by; entry i of each tuple is layer i's."""

    experts: tuple[int, ...]
    expert_bytes: tuple[int, ...]
    slots: int

    @property
    def slot_bytes(self) -> int:
        """A slot fits any expert, in whole pages."""
        return padded(max(self.expert_bytes))

    @property
    def file_bytes(self) -> int:
        """What all experts take in a file of whole pages."""
        return sum(n * padded(size) for n, size in zip(self.experts, self.expert_bytes))


def packed_sizes(spec: ExpertSpec, weights: str) -> tuple[int, int]:
    """How many experts a layer has, and the bytes of one when it is packed."""
    return spec.experts, spec.layout(weights).expert_bytes


def tier_sizes(
    ram: int | float | str, layers: list[tuple[int, int]], top_k: int
) -> TierSizes | None:
    """The slots of a budget, or None if it holds everything; layers: experts, bytes of one.

    Raises ConfigError for a budget that does not hold the experts of one token.
    """
    experts, sizes = tuple(n for n, _ in layers), tuple(size for _, size in layers)
    top_k = min(top_k, max(experts))
    size, each = parse_size("ram", ram), padded(max(sizes))
    # A hair more than a fraction asks for, so that 0.25 of 768 experts is 192 despite rounding.
    slots = int(size * sum(experts) * (1 + 1e-12)) if isinstance(size, float) else size // each
    if not isinstance(size, float) and size >= sum(n * s for n, s in layers):
        return None
    if slots >= sum(experts):
        return None
    if slots < top_k:
        raise ConfigError(
            f"ram must hold at least the {top_k} experts that one token activates, {top_k * each} "
            f"bytes, got {ram!r}, which holds {slots}"
        )
    return TierSizes(experts, sizes, slots)
