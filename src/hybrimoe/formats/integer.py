"""Weights rounded to 4 or 8 bits: groups of 32 integers share a float16 scale."""

import numpy as np

from hybrimoe.formats.activations import HIGHEST, with_sum
from hybrimoe.formats.base import BYTES, NIBBLES, BlobFormat
from hybrimoe.simd.dtypes import F16, narrow, widen
from hybrimoe.simd.isa import dot_bytes, dot_nibbles, start_bytes, start_nibbles
from hybrimoe.simd.jit import inner
from hybrimoe.simd.vectors import add_scaled, high_nibbles, load_bytes, load_f16, low_nibbles

HIGHEST_SCALE = 65504.0
"""The largest float16."""
Q4_0 = 2
"""The number in GGUF files of the type whose integers and scale int4 has."""


def rows_int4(fmt, isa, total, blob, at, groups, x, x_at):
    # Scales lie behind their group: one stream of memory, twice as fast here as two (LOG.md).
    for g in range(groups):
        gx, here = x_at + g * 40, at + g * 288
        ints = start_nibbles(isa, x, gx + 36)
        for j in range(4):
            packed = load_bytes(blob, here + j * 64)
            ints = dot_nibbles(isa, ints, low_nibbles(packed), x, gx + j * 8)
            ints = dot_nibbles(isa, ints, high_nibbles(packed), x, gx + j * 8 + 4)
        total = add_scaled(total, ints, load_f16(blob, here + 256), x, gx + 32)
    return total


def rows_int8(fmt, isa, total, blob, at, groups, x, x_at):
    for g in range(groups):
        gx, here = x_at + g * 40, at + g * 544
        ints = start_bytes(isa, x, gx + 36)
        for j in range(8):
            ints = dot_bytes(isa, ints, load_bytes(blob, here + j * 64), x, gx + j * 4)
        total = add_scaled(total, ints, load_f16(blob, here + 512), x, gx + 32)
    return total


@inner
def store_scale(row, levels, signed, blob, at, work):
    """Store the group's float16 scale at byte `at` and return it.

    signed: the element of largest magnitude maps to -levels exactly, which uses all of int4's range
    (llama.cpp's Q4_0) and halves the error there; else it maps to plus or minus `levels`.
    """
    extreme = np.float32(0)
    for i in range(32):
        extreme = row[i] if abs(row[i]) > abs(extreme) else extreme
    extreme = -extreme if signed else abs(extreme)
    bits = narrow(F16, extreme / np.float32(levels))
    blob.view(np.uint16)[at // 2] = bits
    scale = widen(F16, bits)
    finite = abs(scale) <= HIGHEST
    for i in range(32):
        finite &= abs(row[i]) <= HIGHEST  # false for NaN too
    if not finite:
        work[1] += 1
    return scale


@inner
def inverse_of(scale):
    """1 / scale, and 0 for a group of zeros."""
    return np.float32(0) if scale == 0 else np.float32(1) / scale


def pack_int4(fmt, row, blob, at, lane, g, work):
    scale = store_scale(row, 8, True, blob, at + g * 288 + 256 + lane * 2, work)
    inverse, start = inverse_of(scale), at + g * 288 + lane * 4
    for j in range(4):
        for b in range(4):
            low = max(0, min(np.int32(np.rint(row[j * 8 + b] * inverse)) + 8, 15))
            high = max(0, min(np.int32(np.rint(row[j * 8 + 4 + b] * inverse)) + 8, 15))
            blob[start + j * 64 + b] = low | (high << 4)


def unpack_int4(fmt, row, blob, at, lane, g):
    scale = widen(F16, blob.view(np.uint16)[(at + g * 288 + 256) // 2 + lane])
    start = at + g * 288 + lane * 4
    for j in range(4):
        for b in range(4):
            pair = np.int32(blob[start + j * 64 + b])
            row[j * 8 + b] = np.float32((pair & 15) - 8) * scale
            row[j * 8 + 4 + b] = np.float32((pair >> 4) - 8) * scale


def pack_int8(fmt, row, blob, at, lane, g, work):
    scale = store_scale(row, 127, False, blob, at + g * 544 + 512 + lane * 2, work)
    inverse, start, ints = inverse_of(scale), at + g * 544 + lane * 4, blob.view(np.int8)
    for i in range(32):
        q = np.int32(np.rint(row[i] * inverse))
        ints[start + i // 4 * 64 + i % 4] = max(-127, min(127, q))


def unpack_int8(fmt, row, blob, at, lane, g):
    scale = widen(F16, blob.view(np.uint16)[(at + g * 544 + 512) // 2 + lane])
    start, ints = at + g * 544 + lane * 4, blob.view(np.int8)
    for i in range(32):
        row[i] = np.float32(ints[start + i // 4 * 64 + i % 4]) * scale


# fmt: off
INT8 = BlobFormat(
    "int8", BYTES, rows_int8, with_sum, unpack_int8, pack_int8,
    read_share=0.77, largest=127 * HIGHEST_SCALE, scale="float16",
)
INT4 = BlobFormat(
    "int4", NIBBLES, rows_int4, with_sum, unpack_int4, pack_int4,
    read_share=0.75, largest=8 * HIGHEST_SCALE, ggml_type=Q4_0, zero=8, scale="float16",
)
# fmt: on
