"""How many expert slots an accelerator has room for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hybrimoe.errors import ConfigError
from hybrimoe.models.adapters import text_config
from hybrimoe.sizes import expert_budget

LEAST_WORKSPACE, MOST_WORKSPACE = 1 << 30, 4 << 30
KV_TOKEN = 256 << 10
"""Bytes of KV cache per token where the model's configuration does not tell; Mixtral 8x7B has half."""
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


def kv_bytes(model: Any, tokens: int) -> int:
    """Bytes of the KV cache of so many tokens: an upper bound from the model's configuration, and a
    guess where it has none.

    Layers with a sliding window count as far as it reaches. Compressed keys count expanded, as some
    releases of transformers store them; layers that keep a fixed state count like the others.
    """
    config, parameter = text_config(model), next(model.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    layers, every = (_number(config, n) for n in ("num_hidden_layers", "num_attention_heads"))
    key, value = _number(config, "qk_head_dim"), _number(config, "v_head_dim")
    if not key:
        key = _number(config, "qk_nope_head_dim") + _number(config, "qk_rope_head_dim")
    heads = every
    if not key or not value:
        key = value = _number(config, "head_dim") or _number(config, "hidden_size") // max(every, 1)
        heads = _number(config, "num_key_value_heads") or every
    if not (layers and heads and key):
        return KV_TOKEN * tokens
    kinds = getattr(config, "layer_types", None) or []
    sliding = sum("sliding" in kind for kind in kinds[:layers])
    window = min(_number(config, "sliding_window") or tokens, tokens)
    # Windows are short, so some models give these layers more and wider heads.
    wide = _number(config, "swa_num_key_value_heads") or every
    deep = max(key + value, 2 * _number(config, "swa_head_dim"))
    elements = (layers - sliding) * tokens * heads * (key + value)
    return int((elements + sliding * window * wide * deep) * dtype.itemsize)


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


def _number(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0
