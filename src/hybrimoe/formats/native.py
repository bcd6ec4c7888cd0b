"""Weights as their dtype has them: bfloat16, float16 and float32, bit by bit."""

import numpy as np

from hybrimoe.formats.activations import as_floats
from hybrimoe.formats.base import BlobFormat
from hybrimoe.simd.dtypes import narrow, widen
from hybrimoe.simd.vectors import (
    add_product,
    add_tiles,
    load_bf16_even,
    load_bf16_odd,
    load_f16,
    load_f32,
    zeros_like,
)


def rows_bfloat16(fmt, isa, total, blob, at, groups, x, x_at):
    # Pairs of columns lie in one 32-bit lane, so both widen by a shift or a mask, never a shuffle.
    # Two sums: one would wait for its own last addition, at 28 GB/s per core.
    odd = zeros_like(total)
    for k in range(groups * 16):
        total = add_product(total, load_bf16_even(blob, at + k * 64), x, x_at + k * 8)
        odd = add_product(odd, load_bf16_odd(blob, at + k * 64), x, x_at + k * 8 + 4)
    return add_tiles(total, odd)


def pack_bfloat16(fmt, row, blob, at, lane, g, work):
    halves, start = blob.view(np.uint16), at // 2 + g * 512 + lane * 2
    for i in range(32):
        halves[start + i // 2 * 32 + i % 2] = narrow(fmt, row[i])


def unpack_bfloat16(fmt, row, blob, at, lane, g):
    halves, start = blob.view(np.uint16), at // 2 + g * 512 + lane * 2
    for i in range(32):
        row[i] = widen(fmt, halves[start + i // 2 * 32 + i % 2])


def rows_float16(fmt, isa, total, blob, at, groups, x, x_at):
    for k in range(groups * 32):
        total = add_product(total, load_f16(blob, at + k * 32), x, x_at + k * 4)
    return total


def pack_float16(fmt, row, blob, at, lane, g, work):
    halves, start = blob.view(np.uint16), at // 2 + g * 512 + lane
    for i in range(32):
        halves[start + i * 16] = narrow(fmt, row[i])


def unpack_float16(fmt, row, blob, at, lane, g):
    halves, start = blob.view(np.uint16), at // 2 + g * 512 + lane
    for i in range(32):
        row[i] = widen(fmt, halves[start + i * 16])


def rows_float32(fmt, isa, total, blob, at, groups, x, x_at):
    for k in range(groups * 32):
        total = add_product(total, load_f32(blob, at + k * 64), x, x_at + k * 4)
    return total


def pack_float32(fmt, row, blob, at, lane, g, work):
    floats, start = blob.view(np.float32), at // 4 + g * 512 + lane
    for i in range(32):
        floats[start + i * 16] = row[i]


def unpack_float32(fmt, row, blob, at, lane, g):
    floats, start = blob.view(np.float32), at // 4 + g * 512 + lane
    for i in range(32):
        row[i] = floats[start + i * 16]


BFLOAT16 = BlobFormat(
    "bfloat16",
    "bfloat16",
    rows_bfloat16,
    as_floats,
    unpack_bfloat16,
    pack_bfloat16,
    bound=1e-4,
    run=2,
)
FLOAT16 = BlobFormat(
    "float16", "float16", rows_float16, as_floats, unpack_float16, pack_float16, bound=1e-6, run=1
)
FLOAT32 = BlobFormat(
    "float32", "float32", rows_float32, as_floats, unpack_float32, pack_float32, bound=1e-9, run=1
)
