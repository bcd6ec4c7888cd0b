"""How many expert slots a budget gives, and what the KV cache takes of it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import families
import hybrimoe
from hybrimoe import session
from hybrimoe.errors import ConfigError
from hybrimoe.models.bytes import KV_TOKEN, cache_bytes
from hybrimoe.models.releases import cache_in
from hybrimoe.runtime.devices.emulated import EmulatedAccelerator
from hybrimoe.runtime.slot_budget import (
    SPARE,
    Experts,
    Reserve,
    reserve,
    slot_count,
)
from small_model import EXPERTS, GIB, LAYERS, SLOT, load_small, tokens, wrap_on


@pytest.fixture(scope="module")
def plain():
    return load_small()


@pytest.fixture
def model(plain):
    yield plain
    hybrimoe.unwrap(plain)


@pytest.fixture(scope="module")
def expected(plain):
    return tokens(plain)


# What the KV cache takes.


@pytest.mark.parametrize(
    "name",
    [
        "deepseek_v3.DeepseekV3Experts",  # compressed keys
        "glm4_moe.Glm4MoeExperts",
        "gpt_oss.GptOssExperts",  # sliding windows
        "inkling.InklingExperts",  # sliding windows with heads of their own
        "mimo_v2_flash.MiMoV2FlashExperts",
        "qwen3_next.Qwen3NextExperts",  # linear attention
    ],
)
@torch.no_grad()
def test_a_real_cache_takes_at_most_what_is_reserved(name):
    if name not in families.decorated():
        pytest.skip(f"this transformers has no {name}")
    model = families.build(name)
    given = families.inputs(name, model)
    layers = cache_in(model(**given, use_cache=True)).layers
    states = [getattr(layer, part, None) for layer in layers for part in ("keys", "values")]
    used = sum(state.nbytes for state in states if isinstance(state, torch.Tensor))

    assert 0 < used <= cache_bytes(model, given["input_ids"].numel())


@torch.no_grad()
def test_plain_attention_is_counted_to_the_byte(plain):
    ids = torch.arange(20)[None]
    layers = cache_in(plain(ids, use_cache=True)).layers

    assert cache_bytes(plain, 20) == sum(
        layer.keys.nbytes + layer.values.nbytes for layer in layers
    )


@pytest.mark.wide
@pytest.mark.parametrize("name", families.decorated())
def test_the_runtime_reserves_what_the_plan_says(name):
    model = families.build(name)

    assert cache_bytes(model, 300) == hybrimoe.plan(model, context=300).parts["kv_cache"]


def test_compressed_keys_count_compressed():
    """As the formula of plain attention would have it, DeepSeek-V3 took 71 times as much."""
    model = families.build("deepseek_v3.DeepseekV3Experts")
    config = model.config
    width = config.kv_lora_rank + config.qk_rope_head_dim

    assert cache_bytes(model, 50) <= 2 * config.num_hidden_layers * 50 * width * 4


def test_a_model_that_transformers_cannot_build_counts_a_stated_size():
    assert cache_bytes(nn.Linear(1, 1), 1000) == 1000 * KV_TOKEN


# How many slots a budget gives.


@given(
    st.integers(1, 200 * GIB),
    st.integers(0, 8 * GIB),
    st.integers(1, 64),
    st.integers(1, 64),
    st.integers(1 << 16, 1 << 29),
)
def test_what_is_free_holds_the_slots_and_the_reserve(free, kv, layers, each, size):
    kept = reserve(free, kv)
    experts = Experts(layers * each, layers, size)
    slots = slot_count(None, experts, free, kept)

    assert slots == 0 or layers <= slots <= layers * each
    assert slots == 0 or (slots + SPARE) * size + kv + kept.workspace <= free
    one_more = (slots + 1 + SPARE) * size + kv + kept.workspace > free
    assert slots == layers * each or one_more or slots == 0
    assert kept.workspace >= GIB


@pytest.mark.parametrize(
    ("vram", "slots"), [(None, 25), (0.5, 50), (1.0, 100), ("640", 64), (10_000, 100), (650, 65)]
)
def test_a_budget_is_bytes_a_size_or_a_fraction_and_a_quarter_without_limits(vram, slots):
    assert slot_count(vram, Experts(100, 4, 10), None, Reserve(0, 0)) == slots


def test_a_budget_below_one_slot_per_layer_is_refused_with_the_numbers():
    with pytest.raises(ConfigError, match="at least one expert of 10 bytes per layer, that is 40"):
        slot_count(39, Experts(100, 4, 10), None, Reserve(0, 0))


def test_without_a_budget_slots_leave_room_for_the_kv_cache(monkeypatch, model, expected):
    slots = {}
    for length in (4096, 8192):
        capacity = GIB + cache_bytes(model, 4096) + (60 + SPARE) * SLOT
        accelerator = EmulatedAccelerator(capacity)
        assert not wrap_on(monkeypatch, model, accelerator, max_new_tokens=length)[1:]
        slots[length] = model.hybrimoe.stats()["hybrid"]["slots"]
        assert tokens(model) == expected
        hybrimoe.unwrap(model)

    assert slots[4096] == 60
    assert slots[8192] == max(60 - -(-cache_bytes(model, 4096) // SLOT), 0)


def test_the_dense_part_is_there_before_what_is_free_is_counted(monkeypatch, model):
    accelerator = EmulatedAccelerator(2 * GIB)
    original = session.move_dense

    def move(model, device):
        accelerator.ballast = GIB
        original(model, device)

    monkeypatch.setattr(session, "move_dense", move)
    [warning] = wrap_on(monkeypatch, model, accelerator)
    assert "no expert slots" in warning


def test_the_emulated_accelerator_has_no_limit_and_takes_a_quarter(model):
    hybrimoe.wrap(model, device="emulated")

    assert model.hybrimoe.stats()["hybrid"]["slots"] == LAYERS * EXPERTS // 4
