"""Sixteen output rows times a few tokens: the inner loop of every format.

`rows(fmt, isa, total, blob, at, groups, x, x_at)` adds to the tile `total` the product of the block
at byte `at` of `blob` with `groups` groups of 32 activations at byte `x_at` of each row in `x`.
Activations are blocks of 40 bytes per group for int4 and int8 (32 int8, float32 scale, int32 of
minus 8 times their sum) and plain float32 for the native formats.
"""

import numpy as np
from numba.extending import overload

from hybrimoe.kernels.dots import dot_bytes, dot_nibbles, start_bytes, start_nibbles
from hybrimoe.kernels.jit import INLINED
from hybrimoe.kernels.simd import (
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

FORMATS = {name: Tag("format", name) for name in ("int4", "int8", "bfloat16", "float16", "float32")}
ACTIVATION_GROUP = 40
"""Bytes of 32 quantized activations: 32 int8, their scale, minus 8 times their sum."""
HIGHEST, NAN = np.finfo(np.float32).max, np.float32(np.nan)


def activation_bytes(fmt: str, columns: int) -> int:
    """Bytes of one row of `columns` activations as `rows` wants them."""
    return columns // 32 * ACTIVATION_GROUP if fmt in ("int4", "int8") else columns * 4


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
}


@overload(rows, jit_options=INLINED)
def _choose_loop(fmt, isa, total, blob, at, groups, x, x_at):
    return _LOOPS[fmt.value]


def quantize(fmt, source, at, rows, row_at, group):
    """The Python face of `_quantized` and `_plain`."""
    raise TypeError("quantize runs only inside a kernel")


def _quantized(fmt, source, at, rows, row_at, group):
    """Write source[at : at + 32] as one activation group of the row at byte `row_at`."""
    start = row_at + group * 40
    ints, floats, quads = rows.view(np.int8), rows.view(np.float32), rows.view(np.int32)
    largest, finite = np.float32(1e-30), True
    for i in range(32):
        magnitude = abs(source[at + i])
        largest = magnitude if magnitude > largest else largest
        finite &= magnitude <= HIGHEST  # not a sum of x - x: `reassoc` makes that zero even for NaN
    inverse, total = np.float32(127) / largest, np.int32(0)
    for i in range(32):
        q = np.int32(np.rint(source[at + i] * inverse))
        ints[start + i] = q
        total += q
    floats[(start + 32) // 4] = largest / np.float32(127) if finite else NAN
    quads[(start + 36) // 4] = np.int32(-8) * total


def _plain(fmt, source, at, rows, row_at, group):
    """Copy source[at : at + 32] to the row at byte `row_at`."""
    floats, start = rows.view(np.float32), row_at // 4 + group * 32
    for i in range(32):
        floats[start + i] = source[at + i]


@overload(quantize, jit_options=INLINED)
def _choose_quantize(fmt, source, at, rows, row_at, group):
    return _quantized if fmt.value in ("int4", "int8") else _plain
