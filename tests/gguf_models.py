"""Tiny models and their GGUF files without a config.json; what a load of them must give."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    PreTrainedModel,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

import gguf_files
import hybrimoe
from hybrimoe.errors import CheckpointError

NAME = "model.gguf"
TOKENS = torch.arange(1, 19).view(2, 9)
Change = Callable[[dict[str, Any]], dict[str, Any]]


def qwen3(**changes: Any) -> PreTrainedModel:
    """A Qwen3 MoE of 2 layers, which normalises the weights of its experts as its files mean it."""
    changes = {"head_dim": 16, "norm_topk_prob": True, **changes}
    return _built(Qwen3MoeForCausalLM, Qwen3MoeConfig, **changes)


def qwen2(**changes: Any) -> PreTrainedModel:
    """A Qwen2 MoE of 2 layers with a shared expert."""
    changes = {"shared_expert_intermediate_size": 48, **changes}
    return _built(Qwen2MoeForCausalLM, Qwen2MoeConfig, **changes)


def _built(model_class: Any, config_class: Any, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "moe_intermediate_size": 32,
        "num_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 512,
    }  # fmt: skip
    config = config_class(**{**sizes, **changes})
    config._experts_implementation = "eager"
    model = model_class(config)
    for parameter in model.parameters():
        parameter.data.normal_(1 if parameter.dim() == 1 else 0, 0.1)
    return model.eval()


def write(folder: Path, model: PreTrainedModel, kinds: Any = "F32", **options: Any) -> Path:
    """The folder that now has the file of a model."""
    gguf_files.write(folder / NAME, model, kinds, **options)
    return folder


def load(folder: Path, name: str = NAME, **options: Any) -> PreTrainedModel:
    return hybrimoe.from_pretrained(folder, gguf_file=name, **options)


def logits_of(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def nmse(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((got - wanted).square().sum() / wanted.square().sum())


def assert_computes(folder: Path, wanted: PreTrainedModel, name: str = NAME) -> PreTrainedModel:
    """A file is the model that it was written from, and `plan` sees the same."""
    loaded = load(folder, name)
    planned = hybrimoe.plan(folder, gguf_file=name)

    assert len(loaded.hybrimoe.layers) == len(planned.layers)
    assert planned.parts["experts"] == loaded.hybrimoe.pool.nbytes
    assert nmse(logits_of(loaded), logits_of(wanted)) < 1e-10
    return loaded


def assert_refused(folder: Path, reason: str, name: str = NAME) -> CheckpointError:
    """A load and a plan say the same; the error is returned."""
    with pytest.raises(CheckpointError, match=reason) as planned:
        hybrimoe.plan(folder, gguf_file=name)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load(folder, name)
    assert str(caught.value) == str(planned.value)
    assert str(folder) in str(caught.value.path)
    return caught.value
