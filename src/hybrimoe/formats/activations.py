"""Activations as the loops of each format want them: rounded to int8 in groups of 32, or as floats."""

import numpy as np

from hybrimoe.simd.jit import inlined

ACTIVATION_GROUP = 40
"""Bytes of 32 quantized activations: 32 int8, their scale, and what a format needs of their sum."""
HIGHEST, NAN = np.finfo(np.float32).max, np.float32(np.nan)


@inlined
def round_group(source, at, rows, start):
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


def with_sum(fmt, source, at, rows, row_at, group):
    """Behind the scale: int32 minus 8 times the sum of the integers, the offset of nibbles."""
    start = row_at + group * 40
    _, first, second = round_group(source, at, rows, start)
    rows.view(np.int32)[(start + 36) // 4] = np.int32(-8) * (first + second)


def with_product(fmt, source, at, rows, row_at, group):
    """Behind the scale: float32 minus their sum times the scale, what a minimum is multiplied by."""
    start = row_at + group * 40
    scale, first, second = round_group(source, at, rows, start)
    rows.view(np.float32)[(start + 36) // 4] = np.float32(-(first + second)) * scale


def with_halves(fmt, source, at, rows, row_at, group):
    """Behind the scale: int16 minus the sums of either half, the offset of codes with two scales."""
    start = row_at + group * 40
    _, first, second = round_group(source, at, rows, start)
    shorts = rows.view(np.int16)
    shorts[(start + 36) // 2], shorts[(start + 38) // 2] = -first, -second


def as_floats(fmt, source, at, rows, row_at, group):
    """Copy source[at : at + 32] to the row at byte `row_at`."""
    floats, start = rows.view(np.float32), row_at // 4 + group * 32
    for i in range(32):
        floats[start + i] = source[at + i]
