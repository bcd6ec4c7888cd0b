"""K types of ggml files: blobs hold the file's own numbers, and the kernels compute with them."""

import numpy as np
import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from k_cases import BLOCK, HALVES, K_TYPES, make_layer, random_blocks, read_with_gguf, relay
from kernel_cases import QUANTIZED, expected, make_batch, nmse, run, share_all_work, tolerance

from hybrimoe.formats.gate import Gate
from hybrimoe.formats.layout import expert_layout
from hybrimoe.kernels.cpu import relay as ggml
from hybrimoe.kernels.cpu import relay_k
from hybrimoe.models import weights as formats
from hybrimoe.models.weights import ExpertWeights
from hybrimoe.simd.isa import HOST_ISA, ISAS, runs_here

TOKENS = (1, 2, 3, 5, 8, 13, 32)
MIXED = ("q4_k+q6_k", "q4_k+int8", "int4+int8")
CASES = [
    *[(HOST_ISA, fmt, "float32") for fmt in (*K_TYPES, *MIXED)],
    # The loop of q4_k is that of q5_k without the fifth bits.
    *[(isa, fmt, "float32") for isa in ISAS if runs_here(isa) and isa != HOST_ISA
      for fmt in ("q5_k", "q6_k")],
    (HOST_ISA, "q4_k+q6_k", "bfloat16"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def shared(monkeypatch):
    share_all_work(monkeypatch)


def unpacked(fmt, layout, blobs, inner, hidden):
    """up [E, 2, F, D] and down [E, D, F] float32 by the kernel."""
    up, down = torch.zeros(len(blobs), 2, inner, hidden), torch.zeros(len(blobs), hidden, inner)
    formats.unpack(fmt, layout, blobs, ExpertWeights(up, down, Gate(0)))
    return up.numpy(), down.numpy()


@pytest.mark.parametrize("shape", [(256, 256), (512, 768)])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_layer_equals_the_reference(case, shape):
    isa, fmt, dtype = case
    layer, weights = make_layer(fmt, *shape)
    for tokens in TOKENS:
        batch = make_batch(tokens, shape[0], 5, 1 + tokens % 4, seed=tokens)
        got = run(layer, *batch, dtype, isa=isa)
        wanted = expected(layer, weights, *batch, dtype)
        assert nmse(got, wanted) <= tolerance(fmt, dtype), tokens


@pytest.mark.parametrize("fmt", [*K_TYPES, "q4_k+q6_k"])
def test_partial_sums_over_shards_add_up_to_the_whole(fmt):
    layer, weights = make_layer(fmt, 256, 1024)
    batch = make_batch(6, 256, 5, 3)
    cuts = np.random.default_rng(0).integers(0, layer.layout.shards + 1, 5).astype(np.int32)
    low = np.stack([np.zeros_like(cuts), cuts], 1)
    high = np.stack([cuts, np.full_like(cuts, layer.layout.shards)], 1)
    parts = [run(layer, *batch, shards=part) for part in (low, high)]

    assert layer.layout.shards == 4
    for part, shards in zip(parts, (low, high)):
        wanted = expected(layer, weights, *batch, shards=shards)
        assert nmse(part, wanted) <= tolerance(fmt, "float32")
    assert nmse(sum(parts), run(layer, *batch)) <= 1e-12


@pytest.mark.parametrize("fmt", [*K_TYPES, "q4_k+q6_k"])
def test_outputs_depend_on_neither_threads_nor_other_tokens(fmt):
    layer, _ = make_layer(fmt, 512, 768)
    x, ids, routing = make_batch(13, 512, 5, 2)
    alone = [run(layer, x[t : t + 1], ids[t : t + 1], routing[t : t + 1]) for t in range(13)]
    for threads in (1, 2, 5):
        assert np.array_equal(run(layer, x, ids, routing, threads=threads), np.concatenate(alone))


@pytest.mark.parametrize("fmt", K_TYPES)
def test_rounding_activations_costs_at_most_what_the_design_allows(fmt):
    layer, weights = make_layer(fmt, 512, 768)
    batch = make_batch(32, 512, 5, 4)
    assert nmse(run(layer, *batch), expected(layer, weights, *batch, rounded=False)) <= 2e-4


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("fmt", K_TYPES)
def test_an_activation_that_is_not_finite_shows_in_its_token_alone(fmt, bad):
    layer, _ = make_layer(fmt, 256, 256)
    x, ids, routing = make_batch(4, 256, 5, 2)
    x[2, 77] = bad
    finite = np.isfinite(run(layer, x, ids, routing)).any(1)

    assert finite.tolist() == [True, True, False, True]


def test_the_largest_integers_do_not_overflow():
    """Every integer and scale at its limit, and activations of one sign: what 16 bits would lose."""
    for fmt, kind in K_TYPES.items():
        layout = expert_layout(fmt, 256, 256, True, False)
        raw = np.full((256, BLOCK[kind]), 0xFF, np.uint8)
        if kind == relay_k.Q6_K:
            raw[:, 192:208] = 0x80
        for at in HALVES[kind]:
            raw[:, at : at + 2] = np.frombuffer(np.float16(1e-4).tobytes(), np.uint8)
        blobs = np.zeros((1, layout.expert_bytes), np.uint8)
        for matrix in range(3):
            relay(kind, raw, layout, blobs, matrix, (256, 256))
        values = read_with_gguf(kind, raw, 256, 256)
        weights = reference.Experts(np.stack([values, values])[None], values[None])
        layer = make_layer(fmt, 256, 256)[0]._replace(layout=layout, blobs=blobs)
        batch = (
            np.ones((9, 256), np.float32),
            np.zeros((9, 1), np.int64),
            np.ones((9, 1), np.float32),
        )
        for isa in (isa for isa in ISAS if runs_here(isa)):
            wanted = expected(layer, weights, *batch)
            assert nmse(run(layer, *batch, isa=isa), wanted) <= tolerance(fmt, "float32")


# From a file's blocks.


@settings(max_examples=25, deadline=None)
@given(
    fmt=st.sampled_from([*K_TYPES]),
    matrix=st.integers(0, 2),
    rows=st.integers(1, 70),
    supers=st.integers(1, 7),
    experts=st.integers(1, 3),
    threads=st.integers(1, 3),
    seed=st.integers(0, 1 << 20),
)
def test_blobs_hold_the_very_numbers_that_gguf_reads(
    fmt, matrix, rows, supers, experts, threads, seed
):
    kind, size = K_TYPES[fmt], (rows, 256 * supers)
    hidden, inner = (rows, size[1]) if matrix == 2 else (size[1], rows)
    both = f"int8+{fmt}" if matrix == 2 else f"{fmt}+int8"
    layout = expert_layout(both, hidden, inner, True, False)
    raw = random_blocks(kind, experts * rows * supers, seed, size=60000.0 if seed % 2 else 1e-3)
    blobs = np.zeros((experts, layout.expert_bytes), np.uint8)
    work = relay(kind, raw, layout, blobs, matrix, size, threads)
    wanted = read_with_gguf(kind, raw, experts, *size)

    assert work[ggml.NOT_FINITE] == 0
    up, down = unpacked(both, layout, blobs, inner, hidden)
    assert np.array_equal(down if matrix == 2 else up[:, matrix], wanted)
    for e in range(experts):
        twin = reference.unpack(both, layout, blobs[e], hidden, inner)
        assert np.array_equal(twin[1] if matrix == 2 else twin[0][matrix], wanted[e])


@pytest.mark.parametrize("matrix", [0, 2])
@pytest.mark.parametrize("fmt", K_TYPES)
def test_padding_is_zero_and_the_other_matrices_are_left_alone(fmt, matrix):
    hidden, inner = (48, 7 * 256) if matrix == 2 else (256, 40)
    both = f"int8+{fmt}" if matrix == 2 else f"{fmt}+int8"
    layout = expert_layout(both, hidden, inner, True, False)
    size = (hidden, inner) if matrix == 2 else (inner, hidden)
    raw = random_blocks(K_TYPES[fmt], size[0] * size[1] // 256)
    blobs = np.full((1, layout.expert_bytes), 0xAA, np.uint8)
    relay(K_TYPES[fmt], raw, layout, blobs, matrix, size)
    twin = reference.unpack(both, layout, blobs[0], layout.hidden, layout.inner)
    touched = twin[1] if matrix == 2 else twin[0][0]

    assert touched.shape[0] > size[0] or touched.shape[1] > size[1]
    assert not touched[size[0] :].any()
    assert not touched[:, size[1] :].any()
    shards = blobs.reshape(layout.shards, layout.shard_bytes)
    others = shards[:, : layout.down_at] if matrix == 2 else shards[:, layout.down_at :]
    assert (others == 0xAA).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("fmt", K_TYPES)
def test_a_scale_that_is_not_finite_is_counted(fmt, bad):
    kind = K_TYPES[fmt]
    layout = expert_layout(fmt, 256, 256, True, False)
    for at in HALVES[kind]:
        raw = random_blocks(kind, 256)
        raw[3, at : at + 2] = np.frombuffer(np.float16(bad).tobytes(), np.uint8)
        blobs = np.zeros((1, layout.expert_bytes), np.uint8)
        assert relay(kind, raw, layout, blobs, 0, (256, 256))[ggml.NOT_FINITE] > 0


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_mixed_formats_of_floats_are_packed_as_the_reference_packs_them(fmt):
    other = QUANTIZED[1 - QUANTIZED.index(fmt)]
    layer, weights = make_layer(f"{fmt}+{other}", 256, 512)
    blobs = np.zeros_like(layer.blobs)
    given_weights = ExpertWeights(*map(torch.from_numpy, weights[:2]), Gate(0))
    formats.pack(layer.fmt, layer.layout, given_weights, blobs)
    up, down = unpacked(layer.fmt, layer.layout, blobs, 512, 256)

    assert nmse(up, weights.up) < 1e-5  # the scale is rounded a second time
    assert nmse(down, weights.down) < 1e-5
