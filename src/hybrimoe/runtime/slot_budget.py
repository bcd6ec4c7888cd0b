"""How many expert slots an accelerator has room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from hybrimoe.errors import ConfigError
from hybrimoe.sizes import expert_budget

LEAST_WORKSPACE, MOST_WORKSPACE = 1 << 30, 4 << 30
SPARE = 3
"""Slots of the slab besides those of the budget: two that experts pass through, one that stays empty."""
SHARE = 0.25
"""Of the experts, on an accelerator whose memory has no limit."""


class Experts(NamedTuple):
    """What slots are counted by. expert_bytes is the largest expert's, as every slot fits any."""

    number: int  # in all layers
    layers: int
    expert_bytes: int


@dataclass(frozen=True)
class Reserve:
    """Bytes that slots leave alone. kv: for the KV cache; workspace: for everything else."""

    kv: int
    workspace: int


def reserve(free: int, kv: int) -> Reserve:
    """What slots leave alone of so much free memory: a tenth besides the KV cache, 1 to 4 GiB."""
    return Reserve(kv, min(max(free // 10, LEAST_WORKSPACE), MOST_WORKSPACE))


def slot_count(
    vram: int | float | str | None, experts: Experts, free: int | None, kept: Reserve
) -> int:
    """Expert slots of a budget, at most one per expert; raises ConfigError below one per layer.

    free: bytes of the accelerator, None for no limit. With vram=None what is free decides, and 0
    means that there is no room for one slot per layer.
    """
    if vram is None and free is None:
        return max(int(SHARE * experts.number), experts.layers)
    if vram is None:
        assert free is not None
        slots = (free - kept.kv - kept.workspace) // experts.expert_bytes - SPARE
        return min(slots, experts.number) if slots >= experts.layers else 0
    everything = experts.number * experts.expert_bytes
    slots = int(expert_budget(vram, everything) // experts.expert_bytes)
    if slots < experts.layers:
        raise ConfigError(
            f"vram must hold at least one expert of {experts.expert_bytes} bytes per layer, that is "
            f"{experts.layers * experts.expert_bytes} bytes for {experts.layers} layers, got {vram!r}, "
            f"which holds {slots}"
        )
    return min(slots, experts.number)
