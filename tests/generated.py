"""Checkpoints made up to measure: the shape of Qwen3 MoE models in any size."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import Qwen3MoeConfig

HEADS, KV_HEADS = 8, 2


def shapes(config: Any) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor as a checkpoint on the hub names it: each expert's projections alone."""
    d, f, head = config.hidden_size, config.moe_intermediate_size, config.head_dim
    q, kv = config.num_attention_heads * head, config.num_key_value_heads * head
    yield "model.embed_tokens.weight", (config.vocab_size, d)
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}"
        for name, shape in (("q", (q, d)), ("k", (kv, d)), ("v", (kv, d)), ("o", (d, q))):
            yield f"{at}.self_attn.{name}_proj.weight", shape
        yield f"{at}.self_attn.q_norm.weight", (head,)
        yield f"{at}.self_attn.k_norm.weight", (head,)
        yield f"{at}.input_layernorm.weight", (d,)
        yield f"{at}.post_attention_layernorm.weight", (d,)
        yield f"{at}.mlp.gate.weight", (config.num_experts, d)
        for expert in range(config.num_experts):
            for name, shape in (("gate", (f, d)), ("up", (f, d)), ("down", (d, f))):
                yield f"{at}.mlp.experts.{expert}.{name}_proj.weight", shape
    yield "model.norm.weight", (d,)
    yield "lm_head.weight", (config.vocab_size, d)


def configuration(layers: int, hidden: int, inner: int, experts: int, vocabulary: int) -> Any:
    """A configuration with 8 heads, 2 of them for keys and values, and top-8 routing."""
    return Qwen3MoeConfig(
        num_hidden_layers=layers,
        hidden_size=hidden,
        moe_intermediate_size=inner,
        num_experts=experts,
        num_experts_per_tok=8,
        vocab_size=vocabulary,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=hidden // HEADS,
        dtype="bfloat16",
        architectures=["Qwen3MoeForCausalLM"],
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def write(folder: Path, config: Any, shards: int) -> Path:
    """A checkpoint whose weights are random, one matrix of each shape for all."""
    generator = torch.Generator().manual_seed(0)
    made: dict[tuple[int, ...], torch.Tensor] = {}

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        if shape not in made:
            made[shape] = 0.02 * torch.randn(shape, generator=generator).bfloat16()
        return made[shape].clone()  # safetensors refuses tensors that share memory

    for path, names in _divide(folder, config, shards):
        save_file({name: tensor(shape) for name, shape in names}, path, {"format": "pt"})
    return folder


def write_hollow(folder: Path, config: Any, shards: int) -> Path:
    """A checkpoint of true headers and sizes whose weights are holes: it takes no disk."""
    for path, names in _divide(folder, config, shards):
        header, at = {}, 0
        for name, shape in names:
            size = 2 * torch.Size(shape).numel()
            header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
            at += size
        text = json.dumps(header).encode()
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + at)
    return folder


def _divide(
    folder: Path, config: Any, shards: int
) -> Iterator[tuple[Path, list[tuple[str, tuple[int, ...]]]]]:
    """Each shard's path and tensors; writes the configuration and the index."""
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    names = list(shapes(config))
    files = [f"model-{n + 1:05d}-of-{shards:05d}.safetensors" for n in range(shards)]
    parts = [
        names[len(names) * n // shards : len(names) * (n + 1) // shards] for n in range(shards)
    ]
    placed = {name: file for file, part in zip(files, parts) for name, _ in part}
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    yield from ((folder / file, part) for file, part in zip(files, parts))
