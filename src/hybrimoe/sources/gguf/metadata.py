"""What the metadata of a GGUF file says about a model's arithmetic, and whether the model follows it.

Every key of the architecture is known here: it makes a part of the configuration, or it must have the
value that the model computes with, or it changes no number. Any other key must be off. Sizes are those
of the tensors.
"""

from __future__ import annotations

import math
from typing import Any

from hybrimoe.errors import CheckpointError
from hybrimoe.sources.gguf.header import ArrayLength, GgufHeader, GgufTensor
from hybrimoe.sources.gguf.layout import Layout

HARMLESS = {
    "context_length", "block_count", "nextn_predict_layers", "feed_forward_length", "pooling_type",
    "decoder_start_token_id", "rope.scaling.finetuned",
}  # fmt: skip
"""Keys that change no number, or that the tensors decide."""
SCALING = "rope.scaling."
OLD_FACTOR = "rope.scale_linear"
UNSCALED, SCALED = "none", ("linear", "yarn")
ROTARY = {
    OLD_FACTOR,
    *(
        SCALING + name
        for name in (
            "type",
            "factor",
            "original_context_length",
            "yarn_beta_fast",
            "yarn_beta_slow",
        )
    ),
}
"""Keys that `rope_of` reads; they mean something only together."""
Values = tuple[Any, ...]


def fields_of(header: GgufHeader, layout: Layout, family: str) -> dict[str, Any]:
    """The fields of the configuration of a file without a config.json."""
    heads = whole(header, "attention.head_count")
    vocabulary, hidden = _sizes(header, "token_embd.weight")
    gate = next(iter(layout.experts.values())).gate
    fields: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "num_hidden_layers": layout.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": whole(header, "attention.head_count_kv", heads),
        "num_experts": gate.shape[0],
        "num_experts_per_tok": whole(header, "expert_used_count"),
        "moe_intermediate_size": gate.shape[1],
        "rms_norm_eps": positive(header, "attention.layer_norm_rms_epsilon"),
        "norm_topk_prob": bool(value_of(header, "expert_weights_norm", family == "qwen3_moe")),
        "rope_parameters": rope_of(header),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    for key, field in (
        ("context_length", "max_position_embeddings"),
        ("attention.key_length", "head_dim"),
    ):
        if value_of(header, key) is not None:
            fields[field] = whole(header, key)
    inner = value_of(header, "feed_forward_length")  # of layers without experts; some files have 0
    if type(inner) is int and inner > 0:
        fields["intermediate_size"] = inner
    if family == "qwen2_moe":
        fields["qkv_bias"] = "blk.0.attn_q.bias" in header.tensors
        shared = _find(header, layout, "ffn_up_shexp")
        if shared is not None:
            fields["shared_expert_intermediate_size"] = shared.shape[0]
    return fields


def check_metadata(header: GgufHeader, config: Any) -> None:
    """Raise CheckpointError for a key by which the file computes otherwise than the model."""
    known = _computed(header, config)
    prefix = f"{header.architecture}."
    for key, value in header.values.items():
        name = key.removeprefix(prefix)
        if name == key or name in HARMLESS or name in ROTARY:
            continue
        if not _is_among(value, known.get(name, (0,))):
            raise _differs(header, key, value, known.get(name))
    used = config.num_experts_per_tok
    if not 1 <= used <= config.num_experts:
        raise CheckpointError(
            f"must use 1 to {config.num_experts} experts per token, got {prefix}expert_used_count = "
            f"{used}",
            header.path,
        )
    _check_rope(header, config)


def whole(header: GgufHeader, key: str, default: int | None = None) -> int:
    """A size or a count that must be there, or have a default; arrays may repeat it."""
    value = value_of(header, key, default)
    if type(value) is not int or value < 1:
        raise _not_a(header, key, "a whole number above 0", value)
    return value


def positive(header: GgufHeader, key: str, default: float | None = None) -> float:
    """A finite number above 0, that must be there or have a default."""
    value = value_of(header, key, default)
    is_number = isinstance(value, (int, float)) and not isinstance(value, ArrayLength)
    if not is_number or not math.isfinite(value) or value <= 0:
        raise _not_a(header, key, "a number above 0", value)
    return float(value)


def value_of(header: GgufHeader, key: str, default: Any = None) -> Any:
    """A key of the architecture; of an array the one number that it repeats for every layer."""
    value = header.values.get(f"{header.architecture}.{key}", default)
    if isinstance(value, ArrayLength) and len(set(value.numbers)) == 1:
        return value.numbers[0]
    return value


def rope_of(header: GgufHeader) -> dict[str, Any]:
    """The rotary embedding, as configurations write it.

    llama.cpp scales linearly where a factor comes without a type.
    """
    plain = {"rope_type": "default", "rope_theta": positive(header, "rope.freq_base", 10000.0)}
    kind = value_of(header, f"{SCALING}type", "linear")
    if kind != UNSCALED and kind not in SCALED:
        raise _not_a(header, f"{SCALING}type", "one of none, linear and yarn", kind)
    given = f"{SCALING}factor" if value_of(header, f"{SCALING}factor") is not None else OLD_FACTOR
    if kind == UNSCALED or value_of(header, given, 1) in (0, 1):
        return plain
    scaled = {**plain, "rope_type": kind, "factor": positive(header, given)}
    return scaled if kind == "linear" else {**scaled, **_yarn(header, scaled["factor"])}


def _yarn(header: GgufHeader, factor: float) -> dict[str, Any]:
    """llama.cpp multiplies the factor of attention by its own, where transformers replaces it."""
    original = value_of(header, f"{SCALING}original_context_length", 0)
    name = f"{SCALING}original_context_length" if original else "context_length"
    known: dict[str, Any] = {"original_max_position_embeddings": whole(header, name)}
    attention = positive(header, f"{SCALING}attn_factor", 1.0)
    if attention != 1:
        known["attention_factor"] = attention * (0.1 * math.log(factor) + 1)
    for ours, theirs in (("yarn_beta_fast", "beta_fast"), ("yarn_beta_slow", "beta_slow")):
        if value_of(header, SCALING + ours) is not None:
            known[theirs] = positive(header, SCALING + ours)
    return known


def _computed(header: GgufHeader, config: Any) -> dict[str, Values]:
    """By key, the values under which the model of a configuration computes what the file means."""
    heads = config.num_attention_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1)
    shared = getattr(config, "shared_expert_intermediate_size", 0)
    theta = (config.rope_parameters or {}).get("rope_theta")
    sizes: dict[str, Values] = {
        "vocab_size": (config.vocab_size,),
        "embedding_length": (config.hidden_size,),
        "attention.head_count": (heads,),
        "attention.head_count_kv": (config.num_key_value_heads,),
        "attention.key_length": (head,),
        "attention.value_length": (head,),
        "attention.layer_norm_rms_epsilon": (config.rms_norm_eps,),
        "attention.layer_norm_epsilon": (0, config.rms_norm_eps),
        "attention.scale": (0, 1 / math.sqrt(max(head, 1))),
        "attention.sliding_window": _windows(header, config),
        "attention.causal": (1,),
        "rope.dimension_count": (head,),
        "rope.freq_base": (theta,),
        "expert_count": (config.num_experts,),
        "expert_used_count": (config.num_experts_per_tok,),
        "expert_feed_forward_length": (config.moe_intermediate_size,),
        "expert_shared_feed_forward_length": (shared,),
        "expert_shared_count": _shared_counts(config, shared),
        "expert_weights_norm": (config.norm_topk_prob,),
    }
    return {**sizes, **_switched_off(header)}


def _switched_off(header: GgufHeader) -> dict[str, Values]:
    """Keys whose neutral value is not just 0. Routers here take a softmax of all experts."""
    once = dict.fromkeys(
        ("expert_weights_scale", "expert_group_scale", "logit_scale", "embedding_scale",
         "residual_scale", "attention.output_scale", "full_attention_interval",
         "interleave_moe_layer_step"), (0, 1)
    )  # fmt: skip
    groups = value_of(header, "expert_group_count", 0)
    is_yarn = rope_of(header)["rope_type"] == "yarn"
    return {
        **once,
        "expert_gating_func": (0, 1),
        "expert_group_count": (0, 1, value_of(header, "expert_group_used_count")),
        "expert_group_used_count": (0, 1, groups) if groups in (0, 1) else (groups,),
        "tensor_data_layout": ("reference",),
        f"{SCALING}yarn_ext_factor": (-1, 1) if is_yarn else (-1, 0, 1),
        f"{SCALING}yarn_attn_factor": (1,),
        f"{SCALING}yarn_log_multiplier": (0,),
        f"{SCALING}alpha": (0, 1),
        f"{SCALING}attn_factor": (value_of(header, f"{SCALING}attn_factor"),) if is_yarn else (1,),
    }


def _windows(header: GgufHeader, config: Any) -> Values:
    """The model's own sliding window, and any that is no shorter than all that it can read."""
    own = getattr(config, "sliding_window", None) or 0
    stated = value_of(header, "attention.sliding_window")
    is_wide = type(stated) is int and own == 0 and stated >= config.max_position_embeddings
    return (own, stated) if is_wide else (own,)


def _shared_counts(config: Any, shared: int) -> Values:
    """Shared experts are one, as wide as all of them together."""
    if not shared:
        return (0,)
    return (1, shared // config.moe_intermediate_size)


def _check_rope(header: GgufHeader, config: Any) -> None:
    """Raise CheckpointError if the file scales rotary embeddings otherwise than the model."""
    prefix = f"{header.architecture}."
    stated = [prefix + key for key in (f"{SCALING}type", f"{SCALING}factor", OLD_FACTOR)]
    stated = [key for key in stated if key in header.values]
    if not stated:
        return
    wanted, got = rope_of(header), dict(config.rope_parameters or {})
    mine, theirs = _scaling(wanted, config), _scaling(got, config)
    if mine.keys() != theirs.keys() or any(not _is_among(mine[k], (theirs[k],)) for k in mine):
        said = ", ".join(f"{key} = {header.values[key]}" for key in stated)
        raise CheckpointError(
            f"has {said}, which makes the rotary embedding {wanted}; by its configuration the model "
            f"computes with {got}",
            header.path,
        )


def _scaling(rope: dict[str, Any], config: Any) -> dict[str, Any]:
    """What a rotary embedding computes with, defaults filled in."""
    kind, factor = rope.get("rope_type", "default"), rope.get("factor", 1.0)
    if kind == "default" or (kind in SCALED and factor == 1):
        return {"rope_type": "default"}
    filled = {key: value for key, value in rope.items() if value is not None}
    if kind == "yarn":
        filled.setdefault("original_max_position_embeddings", config.max_position_embeddings)
        filled.setdefault("attention_factor", 0.1 * math.log(factor) + 1)
        filled.setdefault("beta_fast", 32)
        filled.setdefault("beta_slow", 1)
        filled.setdefault("truncate", True)
    return {key: filled[key] for key in filled if key != "rope_theta"}


def _is_among(value: Any, allowed: Values) -> bool:
    """Whether a value, or all of an array, is one of those; metadata holds float32."""
    if isinstance(value, ArrayLength):
        return bool(value.numbers) and all(_is_among(number, allowed) for number in value.numbers)
    return any(_are_same(value, other) for other in allowed)


def _are_same(value: Any, other: Any) -> bool:
    if isinstance(value, str) or isinstance(other, str) or other is None:
        return bool(value == other)
    if isinstance(value, int) and isinstance(other, int):
        return value == other
    return math.isclose(value, other, rel_tol=1e-5)


def _differs(header: GgufHeader, key: str, value: Any, known: Values | None) -> CheckpointError:
    shown = float(f"{value:.6g}") if isinstance(value, float) else str(value)[:40]
    said = f"has {key[:80]} = {shown} in its metadata"
    if known is None:
        return CheckpointError(f"{said}: what that changes is not known", header.path)
    wanted = " or ".join(dict.fromkeys(str(other) for other in known if other is not None))
    return CheckpointError(f"{said}, the model computes with {wanted or 'none'}", header.path)


def _not_a(header: GgufHeader, key: str, rule: str, value: Any) -> CheckpointError:
    return CheckpointError(
        f"must have {rule} as {header.architecture}.{key}, got {str(value)[:40]}", header.path
    )


def _sizes(header: GgufHeader, name: str) -> tuple[int, int]:
    tensor = header.tensors.get(name)
    if tensor is None:
        raise CheckpointError("is missing", header.path, name)
    if len(tensor.shape) != 2:
        raise CheckpointError(f"must be a matrix, got {tensor.shape}", tensor.path, name)
    return tensor.shape[0], tensor.shape[1]


def _find(header: GgufHeader, layout: Layout, name: str) -> GgufTensor | None:
    """The first layer's tensor of that name."""
    found = (header.tensors.get(f"blk.{block}.{name}.weight") for block in layout.experts)
    return next((tensor for tensor in found if tensor is not None), None)
