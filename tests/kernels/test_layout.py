"""Where the numbers of a packed expert lie."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hybrimoe.formats import registry
from hybrimoe.formats.base import GROUP, LINE, ROWS, SUPER
from hybrimoe.formats.layout import (
    expert_layout,
    is_integer,
    join,
    only_files_bring,
    shard_count,
    split,
)
from hybrimoe.formats.registry import named

SIZES = st.integers(1, 20_000)
FORMATS = st.sampled_from([*registry.FORMATS, "q4_k+q6_k", "q4_k+int8", "int4+int8"])


@given(FORMATS, SIZES, SIZES, st.booleans(), st.booleans())
def test_shards_cover_the_expert(fmt, hidden, inner, gated, bias):
    layout = expert_layout(fmt, hidden, inner, gated, bias)
    assert layout.inner >= inner
    assert layout.hidden >= hidden > layout.hidden - named(split(fmt)[0]).columns
    assert layout.width % GROUP == layout.hidden % GROUP == 0
    assert layout.expert_bytes == layout.shards * layout.shard_bytes


@given(FORMATS, SIZES, SIZES, st.booleans(), st.booleans())
def test_every_block_and_shard_starts_on_a_cache_line(fmt, hidden, inner, gated, bias):
    layout = expert_layout(fmt, hidden, inner, gated, bias)
    offsets = layout.up_block, layout.down_block, layout.down_at, layout.shard_bytes
    assert all(offset % LINE == 0 for offset in offsets)
    assert layout.bias_at % 4 == 0


@given(FORMATS, SIZES, SIZES, st.booleans(), st.booleans())
def test_parts_of_a_shard_follow_each_other_without_overlap(fmt, hidden, inner, gated, bias):
    layout = expert_layout(fmt, hidden, inner, gated, bias)
    ups = layout.matrices * layout.width // ROWS * layout.up_block
    downs = layout.hidden // ROWS * layout.down_block
    biases = 4 * (layout.matrices * layout.width + layout.hidden) if bias else 0
    assert layout.down_at == ups
    assert layout.bias_at == (ups + downs if bias else 0)
    assert 0 <= layout.shard_bytes - (ups + downs + biases) < LINE


@given(FORMATS, st.integers(1, 400), st.integers(1, 400), st.booleans())
def test_padding_wastes_little(fmt, hidden_units, inner_units, gated):
    unit = (
        SUPER if only_files_bring(fmt) else GROUP
    )  # rows of K types are whole blocks in every file
    hidden, inner = hidden_units * unit, inner_units * unit
    layout = expert_layout(fmt, hidden, inner, gated, False)
    up, down = (named(part).block_bytes(1 << 14) / ROWS / (1 << 14) for part in split(fmt))
    needed = (layout.matrices * up + down) * inner * hidden
    steps = inner // named(split(fmt)[1]).columns
    spread = 1.08 if steps > 10 else 1.2  # over shards of equal width
    assert layout.inner <= spread * inner
    assert layout.expert_bytes <= 1.3 * needed + 64 * (layout.inner + hidden) / ROWS * 3


@pytest.mark.parametrize(
    ("inner", "shards"), [(768, 4), (1408, 4), (14336, 4), (2880, 5), (32, 1), (96, 3), (160, 5)]
)
def test_models_in_use_are_split_without_padding(inner, shards):
    assert shard_count(inner // GROUP) == shards
    assert expert_layout("int4", 2048, inner, True, False).inner == inner


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [
        ("int4", 4.5),
        ("int8", 8.5),
        ("bfloat16", 16),
        ("q4_k", 4.625),
        ("q5_k", 5.625),
        ("q6_k", 6.5625),
    ],
)
def test_a_block_takes_the_bits_per_weight_of_its_format(fmt, bits):
    assert named(fmt).block_bytes(2048) == 2048 * ROWS * bits / 8


@pytest.mark.parametrize(("inner", "shards"), [(256, 1), (512, 2), (768, 3), (1536, 3), (2048, 4)])
def test_shards_of_a_down_projection_in_a_k_type_are_whole_blocks(inner, shards):
    for fmt in ("q4_k", "int4+q6_k"):
        layout = expert_layout(fmt, 2048, inner, True, False)
        assert (layout.inner, layout.shards) == (inner, shards)
    assert expert_layout("q4_k+int8", 2048, 768, True, False).shards == 4


def test_a_format_of_two_parts_is_split_and_joined():
    assert split("int4") == ("int4", "int4")
    assert split("q4_k+q6_k") == ("q4_k", "q6_k")
    for fmt in ("int4", "q4_k+q6_k"):
        assert join(*split(fmt)) == fmt
    assert [only_files_bring(fmt) for fmt in ("int8", "int4+int8", "int4+q6_k")] == [
        False,
        False,
        True,
    ]
    assert [is_integer(fmt) for fmt in ("bfloat16", "int8", "q4_k+int8")] == [False, True, True]


def test_a_native_expert_takes_no_more_than_its_checkpoint():
    assert expert_layout("bfloat16", 2048, 768, True, False).expert_bytes == 3 * 2048 * 768 * 2
