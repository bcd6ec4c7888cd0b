"""Models that were loaded quantized are refused, with what their method has to offer instead."""

import re

import pytest
import torch
import transformers
from torch import nn
from transformers.integrations import Mxfp4GptOssExperts, finegrained_fp8

import families
import hybrimoe
from hybrimoe.errors import UnsupportedModelError


def as_fp8(model: nn.Module) -> None:
    said = transformers.FineGrainedFP8Config()
    finegrained_fp8.replace_with_fp8_linear(model, ["lm_head"], said, pre_quantized=True)
    model.to_empty(device="cpu")


def as_mxfp4(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.mlp.experts = Mxfp4GptOssExperts(model.config)


class Linear4bit(nn.Linear):
    """What bitsandbytes puts in the place of a linear layer."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        packed = torch.zeros(plain.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)


def with_packed_attention(model: nn.Module) -> None:
    for layer in model.model.layers:
        layer.self_attn.q_proj = Linear4bit(layer.self_attn.q_proj)


LOADED = {
    "qwen3_moe.Qwen3MoeExperts": (as_fp8, "quantized by fp8 (FP8Experts)", "FineGrainedFP8Config("),
    "gpt_oss.GptOssExperts": (as_mxfp4, "quantized by mxfp4 (Mxfp4GptOssExperts)", "Mxfp4Config("),
}


@pytest.mark.parametrize("verb", [hybrimoe.wrap, hybrimoe.plan])
@pytest.mark.parametrize("family", LOADED)
def test_experts_that_a_quantizer_replaced_are_refused(family, verb):
    replace, what, hint = LOADED[family]
    model = families.build(family)
    replace(model)
    with pytest.raises(UnsupportedModelError, match=re.escape(what)) as caught:
        verb(model)

    assert hint in str(caught.value)
    assert not hasattr(model, "hybrimoe")


def test_the_configuration_of_a_loaded_model_names_the_method():
    model = families.build("qwen3_moe.Qwen3MoeExperts")
    as_fp8(model)
    model.config.quantization_config = transformers.FineGrainedFP8Config()
    with pytest.raises(UnsupportedModelError, match=r"quantized by fp8 \(FP8Experts\)"):
        hybrimoe.wrap(model)


def test_experts_cast_to_integers_are_refused():
    model = families.build("qwen3_moe.Qwen3MoeExperts")
    experts = families.experts(model)[1]
    experts.up = nn.Parameter(experts.down_proj.data.to(torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedModelError, match=r"is quantized .*use an unquantized"):
        hybrimoe.wrap(model)


def test_dense_layers_that_a_quantizer_replaced_cannot_be_packed():
    model = families.build("qwen3_moe.Qwen3MoeExperts")
    with_packed_attention(model)
    with pytest.raises(
        UnsupportedModelError, match=r"by bitsandbytes \(Linear4bit\).*leave out li"
    ):
        hybrimoe.wrap(model, linear="int8")

    hybrimoe.wrap(model)  # the experts are plain, and the others stay as they are
    assert isinstance(model.model.layers[0].self_attn.q_proj, Linear4bit)
    hybrimoe.unwrap(model)
