"""Sixteen output rows times a few tokens: the inner loop of every format.

`rows(fmt, isa, total, blob, at, groups, x, x_at)` adds to the tile `total` the product of the block
at byte `at` of `blob` with `groups` groups of 32 activations at byte `x_at` of each row in `x`.
Activations are blocks of 40 bytes per group for integer formats (32 int8, their float32 scale, and 4
bytes on their sum: see `quantize`) and plain float32 for the native formats.
"""

import numpy as np
from numba.extending import overload

from hybrimoe.formats.k_types import q4_k, q5_k, q6_k
from hybrimoe.formats.layout import is_integer
from hybrimoe.simd.isa import dot_bytes, dot_nibbles, start_bytes, start_nibbles
from hybrimoe.simd.jit import INLINED, inlined
from hybrimoe.simd.vectors import (
    Tag,
    add_product,
    add_scaled,
    add_tiles,
    high_nibbles,
    load_bf16_even,
    load_bf16_odd,
    load_bytes,
    load_f16,
    load_f32,
    low_nibbles,
    zeros_like,
)

ACTIVATION_GROUP = 40
"""Bytes of 32 quantized activations: 32 int8, their scale, and what a format needs of their sum."""
HIGHEST, NAN = np.finfo(np.float32).max, np.float32(np.nan)


def activation_bytes(fmt: str, columns: int) -> int:
    """Bytes of one row of `columns` activations as `rows` wants them."""
    return columns // 32 * ACTIVATION_GROUP if is_integer(fmt) else columns * 4


def rows(fmt, isa, total, blob, at, groups, x, x_at):
    """The Python face of the compiled loops below; see the module docstring."""
    raise TypeError("rows runs only inside a kernel")


def _int4(fmt, isa, total, blob, at, groups, x, x_at):
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


def _int8(fmt, isa, total, blob, at, groups, x, x_at):
    for g in range(groups):
        gx, here = x_at + g * 40, at + g * 544
        ints = start_bytes(isa, x, gx + 36)
        for j in range(8):
            ints = dot_bytes(isa, ints, load_bytes(blob, here + j * 64), x, gx + j * 4)
        total = add_scaled(total, ints, load_f16(blob, here + 512), x, gx + 32)
    return total


def _bfloat16(fmt, isa, total, blob, at, groups, x, x_at):
    # Pairs of columns lie in one 32-bit lane, so both widen by a shift or a mask, never a shuffle.
    # Two sums: one would wait for its own last addition, at 28 GB/s per core.
    odd = zeros_like(total)
    for k in range(groups * 16):
        total = add_product(total, load_bf16_even(blob, at + k * 64), x, x_at + k * 8)
        odd = add_product(odd, load_bf16_odd(blob, at + k * 64), x, x_at + k * 8 + 4)
    return add_tiles(total, odd)


def _float16(fmt, isa, total, blob, at, groups, x, x_at):
    for k in range(groups * 32):
        total = add_product(total, load_f16(blob, at + k * 32), x, x_at + k * 4)
    return total


def _float32(fmt, isa, total, blob, at, groups, x, x_at):
    for k in range(groups * 32):
        total = add_product(total, load_f32(blob, at + k * 64), x, x_at + k * 4)
    return total


_LOOPS = {
    "int4": _int4,
    "int8": _int8,
    "bfloat16": _bfloat16,
    "float16": _float16,
    "float32": _float32,
    "q4_k": q4_k,
    "q5_k": q5_k,
    "q6_k": q6_k,
}
FORMATS = {name: Tag("format", name) for name in _LOOPS}


@overload(rows, jit_options=INLINED)
def _choose_loop(fmt, isa, total, blob, at, groups, x, x_at):
    return _LOOPS[fmt.value]


def quantize(fmt, source, at, rows, row_at, group):
    """Write source[at : at + 32] as one activation group of the row at byte `row_at`.

    Behind the integers and their scale lies what takes back the offset of weights: int32 minus 8
    times the sum of the integers (int4, int8), float32 minus their sum times the scale (q4_k, q5_k),
    or int16 minus the sums of either half (q6_k).
    """
    raise TypeError("quantize runs only inside a kernel")


@inlined
def _quantized(source, at, rows, start):
    """Write 32 integers and their scale at byte `start`; the scale and the sums of both halves."""
    ints, floats = rows.view(np.int8), rows.view(np.float32)
    largest, finite = np.float32(1e-30), True
    for i in range(32):
        magnitude = abs(source[at + i])
        largest = magnitude if magnitude > largest else largest
        finite &= magnitude <= HIGHEST  # not a sum of x - x: `reassoc` makes that zero even for NaN
    inverse, first, second = np.float32(127) / largest, np.int32(0), np.int32(0)
    for i in range(16):
        q = np.int32(np.rint(source[at + i] * inverse))
        r = np.int32(np.rint(source[at + 16 + i] * inverse))
        ints[start + i], ints[start + 16 + i] = q, r
        first, second = first + q, second + r
    scale = largest / np.float32(127) if finite else NAN
    floats[(start + 32) // 4] = scale
    return scale, first, second


def _with_sum(fmt, source, at, rows, row_at, group):
    start = row_at + group * 40
    _, first, second = _quantized(source, at, rows, start)
    rows.view(np.int32)[(start + 36) // 4] = np.int32(-8) * (first + second)


def _with_least(fmt, source, at, rows, row_at, group):
    start = row_at + group * 40
    scale, first, second = _quantized(source, at, rows, start)
    rows.view(np.float32)[(start + 36) // 4] = np.float32(-(first + second)) * scale


def _with_halves(fmt, source, at, rows, row_at, group):
    start = row_at + group * 40
    _, first, second = _quantized(source, at, rows, start)
    shorts = rows.view(np.int16)
    shorts[(start + 36) // 2], shorts[(start + 38) // 2] = -first, -second


def _plain(fmt, source, at, rows, row_at, group):
    """Copy source[at : at + 32] to the row at byte `row_at`."""
    floats, start = rows.view(np.float32), row_at // 4 + group * 32
    for i in range(32):
        floats[start + i] = source[at + i]


_QUANTIZERS = {
    "int4": _with_sum,
    "int8": _with_sum,
    "q4_k": _with_least,
    "q5_k": _with_least,
    "q6_k": _with_halves,
}


@overload(quantize, jit_options=INLINED)
def _choose_quantize(fmt, source, at, rows, row_at, group):
    return _QUANTIZERS.get(fmt.value, _plain)
