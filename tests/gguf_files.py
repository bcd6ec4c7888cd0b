"""GGUF files written from models, for the tests."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType, quants
from torch import nn

ARCHITECTURES = {"qwen2_moe": "qwen2moe", "qwen3_moe": "qwen3moe"}
K_BLOCKS = {"Q2_K": 84, "Q3_K": 110, "Q4_K": 144, "Q5_K": 176, "Q6_K": 210}
K_HALVES = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
"""Where the float16 scales of a block lie; gguf cannot quantize to these types."""


def blocks(values: np.ndarray, kind: str, seed: int = 0) -> np.ndarray:
    """The bytes of a matrix in a type; of K types random ones, with scales of about that size."""
    if kind == "random":  # Q8_0 that costs no quantizing
        raw = np.random.default_rng(seed).integers(
            0, 128, (*values.shape[:-1], values.shape[-1] // 32 * 34), np.uint8
        )
        raw[..., 1::34] = 0x10
        return raw
    if kind not in K_BLOCKS:
        return quants.quantize(values, GGMLQuantizationType[kind])
    size = K_BLOCKS[kind]
    rng = np.random.default_rng(seed)
    count = values.size // 256
    raw = rng.integers(0, 256, (count, size), dtype=np.uint8)
    for at in K_HALVES[kind]:
        least = {"Q2_K": 1e-3, "Q5_K": 1e-5, "Q6_K": 1e-5}.get(kind, 2e-5)
        scale = rng.uniform(least, 2 * least, count)
        raw[:, at : at + 2] = scale.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return raw.reshape(*values.shape[:-1], -1)


def name_of(name: str) -> str:
    """What llama.cpp calls a parameter; experts aside."""
    for old, new in (
        ("model.layers.", "blk."), ("self_attn.q_norm", "attn_q_norm"),
        ("self_attn.k_norm", "attn_k_norm"), ("self_attn.q_proj", "attn_q"),
        ("self_attn.k_proj", "attn_k"), ("self_attn.v_proj", "attn_v"),
        ("self_attn.o_proj", "attn_output"), ("input_layernorm", "attn_norm"),
        ("post_attention_layernorm", "ffn_norm"), ("mlp.gate.", "ffn_gate_inp."),
        ("mlp.shared_expert_gate", "ffn_gate_inp_shexp"),
        ("mlp.shared_expert.gate_proj", "ffn_gate_shexp"),
        ("mlp.shared_expert.up_proj", "ffn_up_shexp"),
        ("mlp.shared_expert.down_proj", "ffn_down_shexp"),
        ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ):  # fmt: skip
        name = name.replace(old, new)
    return name


def kind_for(kinds: Any, name: str) -> str:
    """The type of a tensor: kinds is one for all, or a function of its name."""
    return kinds(name) if callable(kinds) else kinds


def write(
    path: Path,
    model: nn.Module,
    kinds: Any,
    dense: str = "F32",
    tokenizer: tuple[list[str], list[str]] | None = None,
    **values: int,
) -> Path:
    """A file of a model's weights. kinds: the type of experts; dense: that of matrices.

    tokenizer: the tokens and merges of a byte-level one; None writes tokens that mean nothing.
    """
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(
        getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    )
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    if tokenizer is None:
        writer.add_token_list([f"t{n}" for n in range(config.vocab_size)])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokenizer[0])
        writer.add_token_merges(tokenizer[1])
        writer.add_eos_token_id(0)
    for key, value in values.items():
        writer.add_uint32(f"{arch}.{key}", value)

    def add(name: str, tensor: np.ndarray, kind: str) -> None:
        raw = blocks(tensor, kind, seed=len(name) + int(name.split(".")[1]) if "blk" in name else 0)
        if kind in ("F32", "F16"):
            writer.add_tensor(name, np.ascontiguousarray(raw))
        else:
            stored = "Q8_0" if kind == "random" else kind
            writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[stored])

    tied = getattr(config, "tie_word_embeddings", False)
    for name, parameter in model.named_parameters():
        value = parameter.detach().float().numpy()
        at = name_of(name).split("mlp.experts.")[0]
        if name.endswith("experts.gate_up_proj"):
            inner = value.shape[1] // 2
            for part, half in (("gate", value[:, :inner]), ("up", value[:, inner:])):
                full = f"{at}ffn_{part}_exps.weight"
                add(full, np.ascontiguousarray(half), kind_for(kinds, full))
        elif name.endswith("experts.down_proj"):
            full = f"{at}ffn_down_exps.weight"
            add(full, value, kind_for(kinds, full))
        elif not (tied and name == "lm_head.weight"):
            small = value.ndim == 1 or "ffn_gate_inp" in at
            if "ffn_gate_inp_shexp" in at:
                value = value.reshape(-1)
            add(at, value, "F32" if small else dense)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
