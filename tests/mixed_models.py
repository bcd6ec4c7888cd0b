"""Tiny models whose layers have experts of different number, width and top-k."""

from typing import NamedTuple

import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.ernie4_5_vl_moe import Ernie4_5_VLMoeTextConfig
from transformers.models.ernie4_5_vl_moe.modeling_ernie4_5_vl_moe import Ernie4_5_VLMoeTextModel


class Layer(NamedTuple):
    """Experts of a layer: how many, how many of them per token, and how wide."""

    experts: int
    top_k: int
    inner: int


PRUNED = (Layer(8, 2, 32), Layer(3, 3, 160), Layer(16, 1, 96), Layer(1, 1, 224), Layer(5, 4, 64))
"""One, five, three, seven and two groups of 32 columns: other shard counts in every layer."""


def pruned(layers=PRUNED, dtype=torch.float32):
    """A model as pruning leaves it: of each layer, what was worth keeping."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=96, hidden_size=64, num_hidden_layers=len(layers), num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, intermediate_size=64, moe_intermediate_size=32,
        num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = Qwen3MoeForCausalLM(config).eval()
    model.config._experts_implementation = "eager"
    for block, (experts, top_k, inner) in zip(model.model.layers, layers):
        routed, gate = block.mlp.experts, block.mlp.gate
        routed.gate_up_proj = nn.Parameter(torch.randn(experts, 2 * inner, 64) * 0.2)
        routed.down_proj = nn.Parameter(torch.randn(experts, 64, inner) * 0.2)
        gate.weight = nn.Parameter(torch.randn(experts, 64) * 0.4)
        routed.num_experts = gate.num_experts = block.mlp.num_experts = experts
        routed.intermediate_dim, gate.top_k = inner, top_k
    return model.to(dtype)


def text_and_vision(wide=192, narrow=64):
    """A model with two kinds of experts in every layer, for the tokens of two kinds."""
    torch.manual_seed(0)
    config = Ernie4_5_VLMoeTextConfig(
        vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, intermediate_size=64, moe_intermediate_size=[wide, narrow],
        moe_num_experts=8, moe_k=2, moe_num_shared_experts=1, mlp_layer_types=["sparse", "sparse"],
        rope_parameters={"rope_type": "default", "rope_theta": 1e4, "mrope_section": [3, 3, 2]},
        pad_token_id=0,
    )  # fmt: skip
    model = Ernie4_5_VLMoeTextModel(config).eval()
    model.config._experts_implementation = "eager"
    return model


IDS = torch.randint(1, 96, (3, 9), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def logits(model):
    """Of a batch of three prompts."""
    return model(IDS).logits.float()


@torch.no_grad()
def generated(model, count=12):
    """Greedy tokens after these prompts, all of them, whatever they are."""
    return model.generate(
        IDS, max_new_tokens=count, min_new_tokens=count, do_sample=False, pad_token_id=0
    )


@torch.no_grad()
def states(model, ids=IDS):
    """Of the model with two kinds of tokens: every third one is a vision token, then there is none."""
    vision = (torch.arange(ids.shape[1]) % 3 == 0).int().expand(len(ids), -1)
    kinds = vision, torch.zeros_like(vision)
    return torch.cat([model(ids, moe_mm_token_type_ids=k).last_hidden_state for k in kinds])


def nmse(got, wanted):
    """Normalised mean squared error."""
    return float((got - wanted).square().mean() / wanted.square().mean())
