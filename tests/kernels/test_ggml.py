"""Matrices of ggml types laid out as blobs hold the numbers that the gguf package reads from them."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants

from hybrimoe.formats.gate import Gate
from hybrimoe.formats.layout import expert_layout
from hybrimoe.kernels.cpu import relay as ggml
from hybrimoe.models import weights as formats
from hybrimoe.models.weights import ExpertWeights

EXACT = [
    (ggml.Q4_0, 4), (ggml.Q4_0, 8), (ggml.Q5_0, 8), (ggml.IQ4_NL, 8), (ggml.Q8_0, 8),
]  # fmt: skip


def random_blocks(kind: int, count: int) -> np.ndarray:
    """Blocks [count, bytes] with any integers and sensible scales."""
    rng = np.random.default_rng(kind)
    if kind == ggml.F32:
        return rng.standard_normal((count, 32)).astype(np.float32).view(np.uint8)
    raw = rng.integers(0, 256, (count, ggml.BLOCK[kind]), np.uint8)
    scale = rng.uniform(-0.01, 0.01, count).astype(np.float16)
    raw[:, :2] = scale.view(np.uint8).reshape(-1, 2)
    if kind == ggml.Q8_0:
        raw[:, 2:][raw[:, 2:] == 128] = 127
    return raw


def relay(kind, bits, raw, experts, matrix, size, inner, hidden, threads=2):
    """The matrix as it can be read from the blobs, and what the kernel counted."""
    fmt = f"int{bits}"
    layout = expert_layout(fmt, hidden, inner, True, False)
    blobs = np.full((experts, layout.expert_bytes), 0xAA, np.uint8)
    scratch, sums = np.empty((threads, 32), np.float32), np.zeros((threads, 3))
    work = np.zeros(8, np.int64)
    # fmt: off
    ggml.relay_experts(kind, bits, threads, layout, matrix, size, raw.reshape(-1), blobs, scratch,
                       sums, work)
    # fmt: on
    up, down = torch.zeros(experts, 2, inner, hidden), torch.zeros(experts, hidden, inner)
    formats.unpack(fmt, layout, blobs, ExpertWeights(up, down, Gate(0, 1.0, float("inf"), 0.0)))
    got = down if matrix == 2 else up[:, matrix]
    return got.numpy(), sums.sum(0), work, blobs, layout


def read_with_gguf(kind, raw, experts, size):
    rows = raw.reshape(experts * size[0], -1)
    if kind == ggml.F32:
        return rows.view(np.float32).reshape(experts, *size)
    return quants.dequantize(rows, GGMLQuantizationType(kind)).reshape(experts, *size)


@pytest.mark.parametrize("matrix", [0, 1, 2])
@pytest.mark.parametrize(("inner", "hidden"), [(64, 96), (96, 32), (160, 224), (768, 64)])
@pytest.mark.parametrize(("kind", "bits"), EXACT)
def test_types_with_a_scale_per_32_numbers_lose_nothing(kind, bits, inner, hidden, matrix):
    size = (hidden, inner) if matrix == 2 else (inner, hidden)
    raw = random_blocks(kind, 3 * size[0] * size[1] // 32)
    got, sums, work, _, _ = relay(kind, bits, raw, 3, matrix, size, inner, hidden)

    assert np.array_equal(got, read_with_gguf(kind, raw, 3, size))
    assert not sums.any()
    assert work[ggml.NOT_FINITE] == 0


@pytest.mark.parametrize("matrix", [0, 1, 2])
def test_floats_are_rounded_to_int8_and_the_error_is_measured(matrix):
    kind, inner, hidden = ggml.F32, 256, 512
    size = (hidden, inner) if matrix == 2 else (inner, hidden)
    raw = random_blocks(kind, 2 * size[0] * size[1] // 32)
    got, (groups, error, square), _, _, _ = relay(kind, 8, raw, 2, matrix, size, inner, hidden)
    wanted = read_with_gguf(kind, raw, 2, size).astype(np.float64)

    assert groups == wanted.size // 32
    assert error == pytest.approx(np.square(got - wanted).sum(), rel=1e-3)
    assert square == pytest.approx(np.square(wanted).sum(), rel=1e-5)
    assert 0 < error / square < 4e-5


def test_one_minus_128_has_its_group_rounded_and_no_other():
    raw = random_blocks(ggml.Q8_0, 64 * 64 // 32)
    raw[5, 2 + 7] = 0x80
    got, (groups, _, _), _, _, _ = relay(ggml.Q8_0, 8, raw, 1, 0, (64, 64), 64, 64)
    wanted = read_with_gguf(ggml.Q8_0, raw, 1, (64, 64))
    differs = (got != wanted).reshape(-1, 32).any(1)

    assert groups == 1
    assert np.flatnonzero(differs).tolist() == [5]
    assert np.allclose(got, wanted, atol=np.abs(wanted).max() / 127)


@pytest.mark.parametrize(("kind", "bits"), [*EXACT, (ggml.F32, 8)])
def test_a_scale_that_is_not_finite_is_counted(kind, bits):
    raw = random_blocks(kind, 256 * 256 // 32)
    bad = np.float32(np.nan) if kind == ggml.F32 else np.float16(np.nan)
    raw[3, : bad.nbytes] = np.frombuffer(bad.tobytes(), np.uint8)
    _, _, work, _, _ = relay(kind, bits, raw, 1, 0, (256, 256), 256, 256)

    assert work[ggml.NOT_FINITE] > 0


@pytest.mark.parametrize("bits", [4, 8])
def test_padding_is_zero_and_the_other_matrices_are_left_alone(bits):
    inner, hidden = 32, 160  # the last of four shards pads nothing here, rows of D do
    raw = random_blocks(ggml.Q4_0, inner * hidden // 32)
    _, _, _, blobs, layout = relay(ggml.Q4_0, bits, raw, 1, 1, (inner, hidden), inner, hidden)
    blocks = blobs[0, : layout.down_at].reshape(-1, 2, layout.up_block)

    assert (blocks[:, 0] == 0xAA).all()  # gate
    assert (blobs[0, layout.down_at : layout.shard_bytes] == 0xAA).all()
    padded = (layout.inner - inner) // 16
    written = blocks[:, 1]
    assert (written != 0xAA).any()
    assert padded == 0 or not written[-padded:, 256 if bits == 4 else 0 :][:, :32].any()
