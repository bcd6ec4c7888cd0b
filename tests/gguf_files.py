"""GGUF files written from models, for the tests."""

import re
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
        ("mlp.gate_proj", "ffn_gate"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"),
        ("model.embed_tokens", "token_embd"), ("model.norm", "output_norm"),
        ("lm_head", "output"),
    ):  # fmt: skip
        name = name.replace(old, new)
    return name


def kind_for(kinds: Any, name: str) -> str:
    """The type of a tensor: kinds is one for all, or a function of its name."""
    return kinds(name) if callable(kinds) else kinds


def metadata_of(config: Any) -> dict[str, Any]:
    """What llama.cpp's converter says of a model, without the name of its architecture."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head_dim,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
        "expert_count": config.num_experts,
        "expert_used_count": config.num_experts_per_tok,
        "vocab_size": config.vocab_size,
    }


def add_value(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """A key of the architecture, of the type that its value asks for."""
    key = f"{writer.arch}.{key}"
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    kinds |= {str: writer.add_string, list: writer.add_array}
    kinds[type(value)](key, value)


def tensors_of(model: nn.Module, layout: str = "stacked") -> dict[str, np.ndarray]:
    """A model's weights under the names of llama.cpp.

    layout: "stacked" has a tensor for each matrix of all experts, "merged" gate above up in one,
    "single" a tensor for each expert.
    """
    found: dict[str, np.ndarray] = {}
    tied = getattr(model.config, "tie_word_embeddings", False)
    for name, parameter in model.named_parameters():
        value = parameter.detach().float().numpy()
        at = name_of(name).split("mlp.experts.")[0]
        if name.endswith("experts.gate_up_proj") and layout == "merged":
            found[f"{at}ffn_gate_up_exps.weight"] = value
        elif name.endswith("experts.gate_up_proj"):
            for part, half in zip(("gate", "up"), np.split(value, 2, axis=1)):
                add_experts(found, f"{at}ffn_{part}", half, layout)
        elif name.endswith("experts.down_proj"):
            add_experts(found, f"{at}ffn_down", value, layout)
        elif not (tied and name == "lm_head.weight"):
            found[at] = value.reshape(-1) if "ffn_gate_inp_shexp" in at else value
    return found


def add_experts(found: dict[str, np.ndarray], name: str, value: np.ndarray, layout: str) -> None:
    """One matrix of all experts [E, rows, columns]."""
    if layout == "single":
        found |= {f"{name}.{expert}.weight": value[expert] for expert in range(len(value))}
    else:
        found[f"{name}_exps.weight"] = np.ascontiguousarray(value)


def write(
    path: Path,
    model: nn.Module,
    kinds: Any,
    dense: str = "F32",
    tokenizer: tuple[list[str], list[str]] | None = None,
    layout: str = "stacked",
    change: Any = None,
    parts: int = 1,
    **values: Any,
) -> Path:
    """A file of a model's weights. kinds: the type of experts; dense: that of matrices.

    tokenizer: the tokens and merges of a byte-level one; None writes tokens that mean nothing.
    change: what makes other tensors of {name: values}. parts: of a split model; the first is returned.
    values: keys of the architecture, None for those that are left out.
    """
    config = model.config
    tensors = tensors_of(model, layout)
    tensors = change(tensors) if change else tensors
    most = -(-len(tensors) // parts) if parts > 1 else 0
    writer = gguf.GGUFWriter(path, ARCHITECTURES[config.model_type], split_max_tensors=most)
    for key, value in {**metadata_of(config), **values}.items():
        if value is not None:
            add_value(writer, key, value)
    if tokenizer is None:
        writer.add_token_list([f"t{n}" for n in range(config.vocab_size)])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(tokenizer[0])
        writer.add_token_merges(tokenizer[1])
        writer.add_eos_token_id(0)
    for name, tensor in tensors.items():
        add_tensor(writer, name, tensor, kind_of(name, tensor, kinds, dense))
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path if parts == 1 else path.with_name(f"{path.stem}-00001-of-{parts:05d}.gguf")


def kind_of(name: str, tensor: np.ndarray, kinds: Any, dense: str) -> str:
    """The type of a tensor: small ones are float32."""
    is_expert = re.search(r"ffn_(gate|up|down|gate_up)(_exps|\.\d+)\.weight", name)
    if is_expert:
        return kind_for(kinds, name)
    return "F32" if tensor.ndim == 1 or "ffn_gate_inp" in name else dense


def add_tensor(writer: gguf.GGUFWriter, name: str, tensor: np.ndarray, kind: str) -> None:
    """Bytes are taken as they are."""
    seed = len(name) + int(name.split(".")[1]) if "blk" in name else 0
    raw = tensor if tensor.dtype == np.uint8 else blocks(tensor, kind, seed)
    if kind in ("F32", "F16"):
        writer.add_tensor(name, np.ascontiguousarray(raw))
    else:
        stored = "Q8_0" if kind == "random" else kind
        writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType[stored])
