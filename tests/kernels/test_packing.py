"""Weights to blobs and back, against the reference's blobs."""

import numpy as np
import pytest
import reference
from kernel_cases import QUANTIZED, make_weights

from hybrimoe.formats.layout import expert_layout
from hybrimoe.formats.registry import TAGS
from hybrimoe.kernels.cpu import pack as packing
from hybrimoe.simd.dtypes import DTYPES

SHAPES = [(64, 128, True), (70, 250, True), (33, 90, True), (100, 31, False), (32, 160, False)]
SOURCES = [
    ("int4", "float32"),
    ("int4", "bfloat16"),
    ("int8", "float32"),
    ("bfloat16", "bfloat16"),
    ("float16", "float16"),
    ("float32", "float32"),
]
"""(format, dtype of the checkpoint)."""


def pack(fmt, dtype, up, down, threads=2, fill=0):
    """Blobs [E, expert_bytes] and how many groups were refused; up [E, M, F, D] of any strides."""
    layout, weights = describe(fmt, up, down)
    blobs = np.full((len(up), layout.expert_bytes), fill, np.uint8)
    work = launch(packing.pack_experts, fmt, dtype, layout, weights, blobs, threads)
    return blobs, work[1]


def unpack(fmt, dtype, blobs, up, down, threads=2):
    """Fill `up` and `down`, of any strides, from `blobs`."""
    layout, weights = describe(fmt, up, down)
    launch(packing.unpack_experts, fmt, dtype, layout, weights, blobs, threads)


def describe(fmt, up, down):
    _, matrices, inner, hidden = up.shape
    up_strides = packing.Strides(*(n // up.itemsize for n in up.strides))
    e, row, column = (n // down.itemsize for n in down.strides)
    down_strides = packing.Strides(e, 0, row, column)
    flats = storage(up), storage(down)
    layout = expert_layout(fmt, hidden, inner, matrices == 2, False)
    return layout, packing.Weights(flats[0], up_strides, flats[1], down_strides, hidden, inner)


def storage(view):
    """The flat memory behind a view that starts at its first element."""
    memory = view
    while memory.base is not None:
        memory = memory.base
    return memory.reshape(-1).view(view.dtype)


def launch(kernel, fmt, dtype, layout, weights, blobs, threads):
    rows, work = np.empty((threads, 32), np.float32), np.zeros(8, np.int64)
    kernel((TAGS[fmt],) * 2, DTYPES[dtype], threads, layout, weights, blobs, rows, work)
    return work


def source(dtype, hidden, inner, gated=True, scale=1.0):
    """Random weights as a checkpoint stores them: up [E, M, F, D], down [E, D, F]."""
    weights = make_weights("float32", hidden, inner, 3, gated)
    return [reference.to_bits(dtype, w * np.float32(scale)) for w in (weights.up, weights.down)]


def wanted_blobs(fmt, dtype, up, down):
    layout, _ = describe(fmt, up, down)
    floats = [reference.from_bits(dtype, np.ascontiguousarray(w)) for w in (up, down)]
    return np.stack([reference.pack(fmt, layout, *parts) for parts in zip(*floats)])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("fmt", "dtype"), SOURCES)
def test_blobs_equal_the_reference_byte_for_byte(fmt, dtype, shape):
    up, down = source(dtype, *shape)
    wanted = wanted_blobs(fmt, dtype, up, down)
    for threads in (1, 2):
        blobs, refused = pack(fmt, dtype, up, down, threads)
        assert np.array_equal(blobs, wanted)
        assert refused == 0


@pytest.mark.parametrize(("fmt", "dtype"), SOURCES)
def test_every_weight_is_written(fmt, dtype):
    up, down = source(dtype, 70, 250)
    layout, _ = describe(fmt, up, down)
    clean, dirty = (pack(fmt, dtype, up, down, fill=fill)[0] for fill in (0, 255))
    for blobs in zip(clean, dirty):
        both = [reference.unpack(fmt, layout, blob, layout.hidden, layout.inner) for blob in blobs]
        assert all(np.array_equal(a, b) for a, b in zip(*both))


@pytest.mark.parametrize("scale", [1e-8, 1e-7, 1e-6, 1e4])
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_scales_at_the_ends_of_float16_round_like_the_reference(fmt, scale):
    up, down = source("float32", 64, 128, scale=scale)
    assert np.array_equal(pack(fmt, "float32", up, down)[0], wanted_blobs(fmt, "float32", up, down))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("fmt", "dtype"), SOURCES[:1] + SOURCES[2:])
def test_unpacking_gives_what_the_format_keeps(fmt, dtype, shape):
    up, down = source(dtype, *shape)
    blobs, _ = pack(fmt, dtype, up, down)
    again = [np.full_like(w, 7) for w in (up, down)]
    unpack(fmt, dtype, blobs, *again)
    for e in range(3):
        layout, _ = describe(fmt, up, down)
        kept = reference.unpack(fmt, layout, blobs[e], shape[0], shape[1])
        for got, wanted in zip(again, kept):
            assert np.array_equal(got[e], reference.to_bits(dtype, wanted))
    if fmt not in QUANTIZED:
        assert np.array_equal(again[0], up)
        assert np.array_equal(again[1], down)


def stored_as(order, up, down):
    """Views equal to `up` and `down` on memory of another order."""
    transposed, interleaved = "transposed" in order, "interleaved" in order
    axes = [0, 2, 1, 3] if interleaved else [0, 1, 2, 3]  # F outside M: g0 u0 g1 u1 ...
    if transposed:
        axes = [0, 3, *axes[1:3]]
    memory = np.ascontiguousarray(up.transpose(axes)).reshape(-1)
    view = memory.reshape([up.shape[a] for a in axes]).transpose(np.argsort(axes))
    flipped = np.ascontiguousarray(down.swapaxes(1, 2)).reshape(-1)
    flipped = flipped.reshape(len(down), down.shape[2], down.shape[1]).swapaxes(1, 2)
    return view, flipped if transposed else down


@pytest.mark.parametrize("order", ["transposed", "interleaved", "transposed interleaved"])
@pytest.mark.parametrize(("fmt", "dtype"), [("int4", "float32"), ("bfloat16", "bfloat16")])
def test_storage_order_of_the_checkpoint_does_not_matter(fmt, dtype, order):
    up, down = source(dtype, 70, 90)
    views = stored_as(order, up, down)
    assert all(np.array_equal(view, plain) for view, plain in zip(views, (up, down)))
    blobs, _ = pack(fmt, dtype, *views)
    assert np.array_equal(blobs, wanted_blobs(fmt, dtype, up, down))
    if fmt not in QUANTIZED:
        empty = stored_as(order, np.zeros_like(up), np.zeros_like(down))
        unpack(fmt, dtype, blobs, *empty)
        assert all(np.array_equal(view, plain) for view, plain in zip(empty, (up, down)))


@pytest.mark.parametrize("matrix", [0, 1], ids=["up", "down"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, 9e6])
@pytest.mark.parametrize("fmt", QUANTIZED)
def test_weights_that_no_scale_can_hold_are_counted(fmt, bad, matrix):
    weights = source("float32", 70, 90)
    weights[matrix].reshape(3, -1)[1, 100] = bad
    assert pack(fmt, "float32", *weights)[1] == 1


@pytest.mark.parametrize("fmt", ["float32", "bfloat16", "float16"])
def test_native_formats_keep_weights_that_are_not_finite(fmt):
    up, down = source(fmt, 70, 90)
    values = reference.to_bits(fmt, np.array([np.nan, np.inf, -np.inf], np.float32))
    up[0, 0, 0, :3] = down[2, 69, 87:] = values
    blobs, refused = pack(fmt, fmt, up, down)
    again = [np.zeros_like(w) for w in (up, down)]
    unpack(fmt, fmt, blobs, *again)
    assert refused == 0
    assert all(a.tobytes() == w.tobytes() for a, w in zip(again, (up, down)))
