"""Dense layers that read one input: one launch for one token, and never another's result."""

import threading

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import hybrimoe
from hybrimoe.kernels.workspace import Workspace
from hybrimoe.runtime import siblings
from hybrimoe.runtime.linears import FoundLinear
from paths import TINY_MOE

NAMES = ("q_proj", "k_proj", "v_proj")


def make(sizes=(96, 33, 40), inputs=96, bias=False):
    """Three packed layers of one parent, called q, k and v."""
    parent, found = nn.Module(), []
    torch.manual_seed(0)
    for name, size in zip(NAMES, sizes, strict=True):
        linear = nn.Linear(inputs, size, bias=bias and name != "k_proj")
        setattr(parent, name, linear)
        found.append(FoundLinear(name, parent, name, linear, "int4", tied=False))
    layers = list(siblings.pack(found, Workspace(), 1))
    for layer in layers:
        layer.install()
    return layers


@pytest.fixture
def launches(monkeypatch):
    """The rows of each launch."""
    seen = []
    run = siblings.multiply
    monkeypatch.setattr(
        siblings, "multiply", lambda m, *args: (seen.append(m.shape[0]), run(m, *args))[1]
    )
    return seen


@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_siblings_compute_the_same_bits_together_as_alone(launches, bias):
    layers = make(bias=bias)
    x = torch.randn(1, 1, 96)
    together = [layer(x) for layer in layers]
    assert launches == [96 + 64 + 64]
    for layer, y in zip(layers, together, strict=True):
        assert y.is_contiguous()
        assert torch.equal(y, layer.compute(x))


@torch.no_grad()
def test_each_token_is_computed_anew(launches):
    layers = make()
    for _ in range(3):
        x = torch.randn(1, 96)
        for layer in layers:
            assert torch.equal(layer(x), layer.compute(x))
    assert len(launches) == 3


@torch.no_grad()
def test_another_or_a_changed_input_never_gets_what_was_computed_before():
    for change in (lambda x: x.clone().neg_(), lambda x: x.neg_()):
        layers = make()
        x = torch.randn(1, 96)
        layers[0](x)
        x = change(x)
        for layer in layers:
            assert torch.equal(layer(x), layer.compute(x))
        assert not layers[0].siblings.together


@torch.no_grad()
def test_a_sibling_that_is_never_called_or_called_twice_ends_it(launches):
    for order in ((0, 1, 0), (0, 1, 1), (1, 0)):
        layers = make()
        x = torch.randn(1, 96)
        for which in order:
            assert torch.equal(layers[which](x), layers[which].compute(x))
        assert not layers[0].siblings.together


@torch.no_grad()
def test_a_result_is_handed_out_once_so_that_writing_into_it_harms_nobody():
    layers = make()
    x = torch.randn(1, 96)
    expected = [layer.compute(x) for layer in layers]
    for layer, y in zip(layers, expected, strict=True):
        got = layer(x)
        assert torch.equal(got, y)
        got.zero_()


def test_prompts_gradients_and_inference_tensors_are_computed_alone(launches):
    layers = make()
    x = torch.randn(5, 96)
    with torch.no_grad():
        assert [layer(x).shape for layer in layers] == [(5, 96), (5, 33), (5, 40)]
    x = torch.randn(1, 96, requires_grad=True)
    sum(layer(x).sum() for layer in layers).backward()
    assert x.grad is not None
    with torch.inference_mode():
        x = torch.randn(1, 96)
        for layer in layers:
            assert torch.equal(layer(x), layer.compute(x))
    assert not launches
    assert layers[0].siblings.together


@torch.no_grad()
def test_two_threads_do_not_share_results():
    layers = make()
    first, second = torch.randn(1, 96), torch.randn(1, 96)
    layers[0](first)
    thread = threading.Thread(target=torch.no_grad()(layers[0]), args=(second,))
    thread.start()
    thread.join()
    assert torch.equal(layers[1](first), layers[1].compute(first))
    assert torch.equal(layers[2](first), layers[2].compute(first))
    assert layers[0].siblings.together


def test_only_layers_of_one_format_and_input_size_are_siblings():
    def found(name, inputs=96, fmt="int4", parent=nn.Module()):  # noqa: B008
        return FoundLinear(name, parent, name, nn.Linear(inputs, 32), fmt, tied=False)

    same = [found(name) for name in (*NAMES, "o_proj", "up_proj")]
    odd = [found("q_proj"), found("k_proj", inputs=64), found("v_proj")]
    mixed = [found("gate_proj"), found("up_proj", fmt="int8")]
    sizes = [[len(family) for family in siblings.families(case)] for case in (same, odd, mixed)]
    assert sizes == [[3, 1, 1], [1, 1, 1], [1, 1]]


def test_a_wrapped_model_decodes_with_one_launch_for_queries_keys_and_values(launches):
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()
    hybrimoe.wrap(model, device="cpu", linear="int8")
    groups = {layer.siblings for layer in model.hybrimoe.linears if layer.siblings}
    model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
    assert groups
    assert all(group.together for group in groups)
    assert len(launches) == 3 * len(groups)
