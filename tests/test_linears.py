"""Dense layers packed for the CPU: which ones, what they compute, and the way back."""

import copy
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import hybrimoe
import parity
from hybrimoe.config import Config
from hybrimoe.errors import ConfigError, WrappedModelError
from hybrimoe.models.releases import cache_argument, cache_in
from hybrimoe.modules.packed_linear import PackedLinear
from paths import TINY_MOE


@pytest.fixture(scope="module")
def inputs():
    return AutoTokenizer.from_pretrained(TINY_MOE)("def main(", return_tensors="pt")


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()


def unwrap(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return hybrimoe.unwrap(model)


def packed(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, PackedLinear)}


def test_attention_shared_experts_and_head_are_packed_and_routers_are_not(model):
    routers = {name: m for name, m in model.named_modules() if name.endswith("mlp.gate")}
    hybrimoe.wrap(model, device="cpu", linear="int4")
    names = packed(model)
    assert {name.split(".")[-1] for name in names} == {
        *("q_proj", "k_proj", "v_proj", "o_proj", "lm_head"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    assert all(model.get_submodule(name) is router for name, router in routers.items())
    assert {m.matrix.fmt for name, m in names.items() if name != "lm_head"} == {"int4"}
    assert names["lm_head"].matrix.fmt == "int8"


@pytest.mark.parametrize(("linear", "bound"), [("int8", 1e-4), ("int4", 5e-2)])
def test_the_logits_stay_close_to_the_plain_models(model, inputs, linear, bound):
    with torch.no_grad():
        expected = model(**inputs).logits
        hybrimoe.wrap(model, device="cpu", linear=linear)
        got = model(**inputs).logits
    assert ((got - expected) ** 2).sum() / (expected**2).sum() < bound


def test_what_is_packed_computes_a_token_alone_as_among_others(model, inputs):
    """To the bit, so that prefill and decode differ by no more than torch's own operations do."""
    hybrimoe.wrap(model, device="cpu", linear="int8")
    calls = {}
    for part in model.hybrimoe.packed:
        part.register_forward_hook(lambda *call: calls.update({call[0]: call[1:]}))
    with torch.no_grad():
        model(**inputs)
        differing = {part.name for part, call in calls.items() if not rows_alone_equal(part, *call)}

    assert len(calls) == len(model.hybrimoe.packed)
    assert differing == set()


def rows_alone_equal(part, args, out):
    """Whether a module gives each row of its arguments the very output it gave to all at once."""
    flat = [x.reshape(-1, x.shape[-1]) for x in args]
    rows = [part.forward(*(x[n : n + 1] for x in flat)) for n in range(len(flat[0]))]
    return torch.equal(torch.cat(rows), out.reshape(-1, out.shape[-1]))


def test_prefill_and_decode_agree(model, inputs):
    """As closely as rounded activations allow: torch sums another way for one token than for many,
    and then a value on the edge is rounded to the next of 255 steps."""
    hybrimoe.wrap(model, device="cpu", linear="int8")
    with torch.no_grad():
        whole = model(**inputs).logits[:, -1]
        ids = inputs.input_ids
        cache = cache_in(model(ids[:, :-1]))
        step = model(ids[:, -1:], **cache_argument(model, cache)).logits[:, -1]
    assert parity.nmse(step, whole) < 1e-5


def test_unwrap_brings_the_same_modules_back_with_rounded_weights(model):
    before = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    weights = {name: m.weight.detach().clone() for name, m in before.items()}
    hybrimoe.wrap(model, device="cpu", linear="int8")
    with pytest.warns(UserWarning, match="dense layers were stored as int8"):
        hybrimoe.unwrap(model)
    for name, module in before.items():
        assert model.get_submodule(name) is module
        assert (module.weight - weights[name]).abs().max() <= weights[name].abs().max() / 250


def test_the_state_dict_keeps_its_keys_and_shapes(model):
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    hybrimoe.wrap(model, device="cpu", linear="int4")
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before


def test_a_tied_head_is_packed_and_the_embedding_stays_exact(model, inputs):
    model.lm_head.weight = model.model.embed_tokens.weight
    embedding = model.model.embed_tokens.weight.detach().clone()
    hybrimoe.wrap(model, device="cpu", linear="int4")
    assert "lm_head" in packed(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.state_dict()["lm_head.weight"], embedding)
    unwrap(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(model.lm_head.weight, embedding)


def test_the_gradient_of_the_input_is_that_of_the_packed_weight(model):
    hybrimoe.wrap(model, device="cpu", linear="int8")
    layer = model.model.layers[0].self_attn.q_proj
    x = torch.randn(3, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    expected = torch.ones(3, layer.out_features) @ layer.unpacked()
    torch.testing.assert_close(x.grad, expected)


def test_what_would_break_packed_layers_is_refused(model):
    hybrimoe.wrap(model, device="cpu", linear="int8")
    layer = model.model.layers[0].self_attn.q_proj
    with pytest.raises(WrappedModelError):
        layer.half()
    with pytest.raises(WrappedModelError):
        copy.deepcopy(layer)
    with pytest.raises(AttributeError, match=r"packed as int8; hybrimoe\.unwrap"):
        _ = layer.weight


@pytest.mark.parametrize("device", ["cuda", "emulated"])
def test_dense_layers_are_packed_for_the_cpu_only(device):
    with pytest.raises(ConfigError, match=f"device='{device}'.*got 'int4'"):
        Config(linear="int4", device=device)
    with pytest.raises(ConfigError, match="linear must be one of int8, int4, got 'int3'"):
        Config(linear="int3")


def test_a_weight_that_is_not_finite_rolls_everything_back(model, inputs):
    model.lm_head.weight.data[3, 5] = torch.nan
    before = {name: id(module) for name, module in model.named_modules()}
    with pytest.raises(hybrimoe.FormatError, match="finite"):
        hybrimoe.wrap(model, device="cpu", linear="int8")
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert not hasattr(model, "hybrimoe")
