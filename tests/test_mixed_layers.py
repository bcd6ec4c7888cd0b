"""Layers whose experts differ in number, width, format or shards give what the plain model gives."""

import itertools
import tempfile
from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

import fake_cuda
import gguf_files
import hybrimoe
from hybrimoe.errors import RoutingError
from hybrimoe.kernels.gpu import torch_experts
from hybrimoe.policy.presets import PRESETS
from hybrimoe.runtime.devices.cuda import TorchAccelerator
from hybrimoe.runtime.devices.emulated import EmulatedAccelerator
from mixed_models import (
    IDS,
    PRUNED,
    Layer,
    generated,
    logits,
    nmse,
    pruned,
    states,
    text_and_vision,
)
from small_model import wrap_on

pytestmark = pytest.mark.filterwarnings("ignore:the experts were stored as")

EXACT = 1e-10
"""NMSE within which float32 models compute the same."""
ROUNDED = 1e-3
"""The same where activations are rounded to int8: one that tips over moves all that follow."""
WAYS = {
    "cpu": {},
    "disk": {"ram": 0.5},
    "accelerator": {"device": "emulated", "vram": 0.4},
    "both": {"device": "emulated", "vram": 0.4, "ram": 0.5},
    "all there": {"device": "emulated", "vram": 1.0},
}


@pytest.fixture(scope="module")
def plain():
    """What the plain model gives: logits and greedy tokens."""
    model = pruned()
    return logits(model), generated(model)


def assert_same(model, plain):
    wanted, tokens = plain
    assert nmse(logits(model), wanted) < EXACT
    assert torch.equal(generated(model), tokens)
    assert nmse(logits(model), wanted) < EXACT  # with whatever lies in the slots now


@pytest.mark.parametrize("way", WAYS)
def test_pruned_layers_give_what_the_plain_model_gives(plain, way):
    assert_same(hybrimoe.wrap(pruned(), **WAYS[way]), plain)


@pytest.mark.parametrize("name", [name for name in PRESETS if name != "hybrimoe"])
def test_pruned_layers_under_every_preset(plain, name):
    model = hybrimoe.wrap(pruned(), device="emulated", vram=0.4, preset=name)
    assert_same(model, plain)
    cache = model.hybrimoe.hybrid.cache
    for row, layer in zip(cache.slot, PRUNED):
        assert (row[layer.experts :] < 0).all()


def test_pruned_layers_as_a_cuda_device_computes_them(monkeypatch, plain):
    fake_cuda.install(monkeypatch)
    accelerator, model = TorchAccelerator("cpu"), pruned()
    accelerator.kernels = torch_experts
    wrap_on(monkeypatch, model, accelerator, vram=0.4, deterministic=True)
    assert_same(model, plain)
    hidden, ids = torch.randn(2, 64), torch.tensor([[1, 3], [3, 3]])
    blank = torch.tensor([[0.5, 0.0], [0.0, 0.0]])
    layer = model.hybrimoe.layers[1]  # of three experts
    alone = layer(hidden[:1], ids[:1, :1], blank[:1, :1])
    torch.testing.assert_close(layer(hidden, ids, blank), torch.cat([alone, alone * 0]))
    with pytest.raises(RoutingError, match=r"\[0, 3\), got 3"):
        layer(hidden, torch.full_like(ids, 3), torch.ones_like(blank))


def test_every_layer_is_planned_in_its_own_shards_and_bytes():
    model = hybrimoe.wrap(pruned(), device="emulated", vram=0.4)
    hybrid, layers = model.hybrimoe.hybrid, model.hybrimoe.layers
    layouts = [layer.packed.layout for layer in layers]
    costs = [hybrid.cost.of(index) for index in range(len(layers))]

    assert len({layout.shards for layout in layouts}) > 2
    assert [cost.shards for cost in costs] == [layout.shards for layout in layouts]
    assert [cost.expert_bytes for cost in costs] == [layout.expert_bytes for layout in layouts]
    assert hybrid.cost.expert_bytes == max(layout.expert_bytes for layout in layouts)
    generated(model)
    stats = model.hybrimoe.stats()["hybrid"]
    assert stats["link_bytes"] <= stats["uploads"] * hybrid.cost.expert_bytes


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_rounded_layers_give_on_an_accelerator_what_they_give_on_the_cpu(weights):
    wanted = logits(hybrimoe.wrap(pruned(), weights=weights))
    for way in ("disk", "accelerator", "both"):
        got = logits(hybrimoe.wrap(pruned(), weights=weights, **WAYS[way]))
        assert nmse(got, wanted) < ROUNDED, way


@pytest.mark.parametrize("way", WAYS)
def test_text_and_vision_experts_of_one_model(way):
    model = text_and_vision()
    wanted = states(model)
    hybrimoe.wrap(model, **WAYS[way])
    assert nmse(states(model), wanted) < EXACT
    hybrimoe.unwrap(model)
    assert torch.equal(states(model), wanted)


def test_forecasts_for_layers_that_do_not_run_lose_trust_and_are_not_kept():
    """While text is written, vision experts have nothing to do."""
    model = hybrimoe.wrap(text_and_vision(), device="emulated", vram=0.4)
    kinds = torch.zeros(1, 1, dtype=torch.int32)
    for step in range(30):
        with torch.no_grad():
            model(IDS[:1, step % 9][None], moe_mm_token_type_ids=kinds, use_cache=False)
    trust = model.hybrimoe.hybrid.engine.trust
    assert all(len(pending) <= trust.found.size for pending in trust._pending.values())


def test_recorded_routing_of_layers_with_other_numbers_of_experts():
    model = pruned([layer._replace(top_k=1) for layer in PRUNED])
    with hybrimoe.record(model) as trace:
        generated(model, 4)
    assert trace.experts == max(layer.experts for layer in PRUNED)
    for index, layer in enumerate(PRUNED):
        assert trace.ids[:, index, : trace.top_k].max() < layer.experts


# Files whose layers keep their experts in different types.


def gguf_model(inner):
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        num_hidden_layers=2, hidden_size=256, moe_intermediate_size=inner, num_experts=4,
        num_experts_per_tok=2, vocab_size=96, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, norm_topk_prob=True, intermediate_size=512, architectures=["Qwen3MoeForCausalLM"],
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).eval()


def assert_file_gives_the_same(inner, first, second, ways, presets=("hybrimoe",)):
    up = "Q4_K" if "K" in first + second else "Q4_0"

    def kinds(name):
        return up if "down" not in name else first if name.startswith("blk.0") else second

    with tempfile.TemporaryDirectory() as folder:
        gguf_files.write(Path(folder) / "model.gguf", gguf_model(inner), kinds)
        wanted = logits(hybrimoe.from_pretrained(folder, gguf_file="model.gguf"))
        for way, preset in itertools.product(ways, presets):
            given = WAYS[way] | ({"preset": preset} if "device" in WAYS[way] else {})
            model = hybrimoe.from_pretrained(folder, gguf_file="model.gguf", **given)
            assert nmse(logits(model), wanted) < ROUNDED, (way, preset)


def test_a_file_with_down_projections_of_two_types():
    """Four shards in one layer and two in the other."""
    assert_file_gives_the_same(512, "Q4_K", "Q8_0", ("disk", "accelerator", "both"))


# The wide grid.


WIDTHS = [(16, 48), (96, 32), (160, 224, 32), (384, 128), (768, 1536), (32, 33, 1)]
COUNTS = [(8, 8, 8), (1, 16, 3), (24, 2, 5)]


@pytest.mark.wide
@pytest.mark.parametrize("widths", WIDTHS)
@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_grid_of_widths_counts_and_presets(widths, counts, dtype):
    layers = [
        Layer(count, min(count, 1 + i), width)
        for i, (count, width) in enumerate(zip(counts, itertools.cycle(widths)))
    ]
    wanted = logits(pruned(layers, dtype))
    limit = (
        EXACT if dtype == torch.float32 else 2e-2
    )  # half of the mantissa: another expert may win
    for way, name in itertools.product(WAYS, PRESETS):
        if name == "hybrimoe" or "device" in WAYS[way]:
            given = WAYS[way] | ({"preset": name} if "device" in WAYS[way] else {})
            model = hybrimoe.wrap(pruned(layers, dtype), **given)
            generated(model, 6)
            assert nmse(logits(model), wanted) < limit, (way, name)


@pytest.mark.wide
@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("name", PRESETS)
def test_a_grid_of_integer_formats(weights, name):
    wanted = logits(hybrimoe.wrap(pruned(), weights=weights))
    for way in ("accelerator", "both", "all there"):
        model = hybrimoe.wrap(pruned(), weights=weights, preset=name, **WAYS[way])
        generated(model, 6)
        assert nmse(logits(model), wanted) < ROUNDED, way


@pytest.mark.wide
@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("vram", [0.2, 0.5, 0.9])
def test_whatever_order_the_streams_take(monkeypatch, plain, seed, vram):
    model, accelerator = pruned(), EmulatedAccelerator(seed=seed, bandwidth=2e8)
    wrap_on(monkeypatch, model, accelerator, vram=vram, ram=0.5 if seed % 2 else None)
    assert_same(model, plain)


@pytest.mark.wide
@pytest.mark.parametrize(
    "widths", [(32, 16), (48, 16), (64, 32), (384, 128), (1536, 512), (768, 384)]
)
def test_text_and_vision_experts_of_many_widths(widths):
    wanted = states(text_and_vision(*widths))
    for way, name in itertools.product(WAYS, PRESETS):
        given = WAYS[way] | ({"preset": name} if "device" in WAYS[way] else {})
        model = hybrimoe.wrap(text_and_vision(*widths), **given)
        assert nmse(states(model), wanted) < EXACT, (way, name)


@pytest.mark.wide
@pytest.mark.parametrize("inner", [256, 512, 768, 1024])
@pytest.mark.parametrize("second", ["Q4_K", "Q6_K", "Q8_0"])
@pytest.mark.parametrize("first", ["Q4_K", "Q8_0"])
def test_files_with_down_projections_of_many_types(inner, first, second):
    presets = ("hybrimoe", "llamacpp", "ondemand", "adapmoe")
    ways = ("disk", "accelerator", "both", "all there")
    assert_file_gives_the_same(inner, first, second, ways, presets)
