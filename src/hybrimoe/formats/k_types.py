"""The K types of GGUF files, with the file's own numbers.

A row's 256 columns share float16 scales, which are multiplied by a small integer per group. So a
block is, for each 256 columns, a head (the 16 scales d; but for q6_k the 16 scales dmin too) and 8
groups of 32 columns:

    q4_k  d * s * q - dmin * m   nibbles as int4 has them [256 bytes], uint8 s [16], uint8 m [16]
    q5_k  the same               nibbles, fifth bits [64], s, m
    q6_k  d * s * (q - 32)       for each 16 columns nibbles [128] and two bits more [64]; then int8 s
                                 [2, 16], one for each 16 columns

The bits beyond the nibbles lie such that a shift by a constant brings them above the nibbles: bit
4 + j of a byte belongs to the low nibble of load j, bit j to the high one; of pairs of bits, 4 + 2j
and 2j. Products of d and s are exact in float32.
"""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from hybrimoe.formats.activations import with_halves, with_product
from hybrimoe.formats.base import NIBBLES, BlobFormat
from hybrimoe.simd.dtypes import F16, widen
from hybrimoe.simd.isa import dot_nibbles
from hybrimoe.simd.jit import inlined
from hybrimoe.simd.vectors import (
    BYTES,
    FLOATS,
    I8,
    I16,
    I32,
    LANES,
    add_product,
    add_scaled,
    address,
    high_nibbles,
    int_tile,
    load,
    load_at,
    load_bytes,
    load_f16,
    low_nibbles,
    splat,
)

WORDS = ir.VectorType(I16, 32)


@intrinsic
def times_bytes(typing, floats, array, offset):
    """floats times 16 unsigned bytes at byte `offset` of a uint8 array."""
    return _times(floats, array, offset, "uitofp")


@intrinsic
def times_int8(typing, floats, array, offset):
    """floats times 16 signed bytes at byte `offset` of a uint8 array."""
    return _times(floats, array, offset, "sitofp")


def _times(floats, array, offset, convert):
    def codegen(context, builder, sig, args):
        place = address(context, builder, array, *args[1:])
        narrow = load(builder, place, ir.VectorType(I8, LANES))
        wide = getattr(builder, convert)(narrow, FLOATS.llvm)
        # A flag of its own keeps `reassoc` away: this product is exact, but in tiles of one token
        # LLVM would scale the activations first, and their sums would have other bits.
        return builder.fmul(args[0], wide, flags=("nsz",))

    return FLOATS(floats, array, types.intp), codegen


@intrinsic
def add_bits_above(typing, nibbles, bits, shift, mask):
    """Nibbles plus those of `bits` that `mask` leaves, shifted right, or left by minus `shift`.

    Shifts 16-bit words, as there is no byte shift on x86; the mask drops what crosses bytes.
    """

    def codegen(context, builder, sig, args):
        words, shift = builder.bitcast(args[1], WORDS), builder.trunc(args[2], I16)
        zero = I16(0)
        right = builder.select(builder.icmp_signed(">", shift, zero), shift, zero)
        left = builder.select(builder.icmp_signed("<", shift, zero), builder.sub(zero, shift), zero)
        words = builder.lshr(words, splat(builder, right, 32))
        words = builder.shl(words, splat(builder, left, 32))
        keep = splat(builder, builder.trunc(args[3], I8), 64)
        above = builder.and_(builder.bitcast(words, BYTES.llvm), keep)
        return builder.or_(args[0], above)

    return BYTES(nibbles, bits, types.intp, types.intp), codegen


@intrinsic
def zero_ints(typing, rows):
    """int_tile of zeros."""
    tile = int_tile(rows.tokens)
    return tile(rows), lambda context, builder, sig, args: ir.Constant(tile.llvm, None)


@intrinsic
def start_sixes(typing, rows, offset):
    """int_tile of 32 times the int16 at rows[t] + offset: what q - 32 takes from a sum over q."""
    tile = int_tile(rows.tokens)

    def codegen(context, builder, sig, args):
        result = ir.Constant(tile.llvm, ir.Undefined)
        for t in range(rows.tokens):
            half = load_at(builder, builder.extract_value(args[0], t), args[1], I16, 2)
            start = builder.shl(builder.sext(half, I32), I32(5))
            result = builder.insert_value(result, splat(builder, start), t)
        return result

    return tile(rows, types.intp), codegen


def rows_q4_k(fmt, isa, total, blob, at, groups, x, x_at):
    gx, here = x_at, at
    for _ in range(groups // 8):
        d, least = load_f16(blob, here), load_f16(blob, here + 32)
        here += 64
        for _ in range(8):
            ints = zero_ints(x)
            for j in range(4):
                packed = load_bytes(blob, here + j * 64)
                ints = dot_nibbles(isa, ints, low_nibbles(packed), x, gx + j * 8)
                ints = dot_nibbles(isa, ints, high_nibbles(packed), x, gx + j * 8 + 4)
            total = add_scaled(total, ints, times_bytes(d, blob, here + 256), x, gx + 32)
            total = add_product(total, times_bytes(least, blob, here + 272), x, gx + 36)
            gx, here = gx + 40, here + 288
    return total


def rows_q5_k(fmt, isa, total, blob, at, groups, x, x_at):
    gx, here = x_at, at
    for _ in range(groups // 8):
        d, least = load_f16(blob, here), load_f16(blob, here + 32)
        here += 64
        for _ in range(8):
            ints, fifth = zero_ints(x), load_bytes(blob, here + 256)
            for j in range(4):
                packed = load_bytes(blob, here + j * 64)
                low = add_bits_above(low_nibbles(packed), fifth, j, 16)
                high = add_bits_above(high_nibbles(packed), fifth, j - 4, 16)
                ints = dot_nibbles(isa, ints, low, x, gx + j * 8)
                ints = dot_nibbles(isa, ints, high, x, gx + j * 8 + 4)
            total = add_scaled(total, ints, times_bytes(d, blob, here + 320), x, gx + 32)
            total = add_product(total, times_bytes(least, blob, here + 336), x, gx + 36)
            gx, here = gx + 40, here + 352
    return total


def rows_q6_k(fmt, isa, total, blob, at, groups, x, x_at):
    gx, here = x_at, at
    for _ in range(groups // 8):
        d = load_f16(blob, here)
        here += 32
        for _ in range(8):
            for half in range(2):
                ints = start_sixes(x, gx + 36 + half * 2)
                first, upper = here + half * 192, load_bytes(blob, here + half * 192 + 128)
                for j in range(2):
                    packed = load_bytes(blob, first + j * 64)
                    low = add_bits_above(low_nibbles(packed), upper, 2 * j, 48)
                    high = add_bits_above(high_nibbles(packed), upper, 2 * j - 4, 48)
                    ints = dot_nibbles(isa, ints, low, x, gx + half * 16 + j * 8)
                    ints = dot_nibbles(isa, ints, high, x, gx + half * 16 + j * 8 + 4)
                scale = times_int8(d, blob, here + 384 + half * 16)
                total = add_scaled(total, ints, scale, x, gx + 32)
            gx, here = gx + 40, here + 416
    return total


def unpack_q4_k(fmt, row, blob, at, lane, g):
    start = at + g // 8 * 2368 + 64 + g % 8 * 288
    scale, least = _scale_and_least(blob, at + g // 8 * 2368, start + 256, lane)
    for i in range(32):
        row[i] = scale * np.float32(_nibble(blob, start, lane, i)) - least


def unpack_q5_k(fmt, row, blob, at, lane, g):
    start = at + g // 8 * 2880 + 64 + g % 8 * 352
    scale, least = _scale_and_least(blob, at + g // 8 * 2880, start + 320, lane)
    for i in range(32):
        bits = np.int32(blob[start + 256 + lane * 4 + i % 4])
        fifth = (bits >> (i // 8 + (4 if i % 8 < 4 else 0))) & 1
        row[i] = scale * np.float32(_nibble(blob, start, lane, i) | fifth << 4) - least


def unpack_q6_k(fmt, row, blob, at, lane, g):
    head = at + g // 8 * 3360
    start, ints = head + 32 + g % 8 * 416, blob.view(np.int8)
    d = widen(F16, blob.view(np.uint16)[head // 2 + lane])
    for i in range(32):
        half, j = i // 16, i % 16 // 8
        bits = np.int32(blob[start + half * 192 + 128 + lane * 4 + i % 4])
        upper = (bits >> (2 * j + (4 if i % 8 < 4 else 0))) & 3
        q = _nibble(blob, start + half * 192, lane, i % 16) | upper << 4
        scale = d * np.float32(ints[start + 384 + half * 16 + lane])
        row[i] = scale * np.float32(q - 32)


@inlined
def _nibble(blob, start, lane, i):
    """Number i of a lane of a group: a byte holds numbers that lie 4 apart."""
    pair = np.int32(blob[start + i // 8 * 64 + lane * 4 + i % 4])
    return pair & 15 if i % 8 < 4 else pair >> 4


@inlined
def _scale_and_least(blob, head, at, lane):
    """What a group of q4_k or q5_k multiplies its integers by, and what it subtracts; exact."""
    halves = blob.view(np.uint16)
    scale = widen(F16, halves[head // 2 + lane]) * np.float32(blob[at + lane])
    return scale, widen(F16, halves[head // 2 + 16 + lane]) * np.float32(blob[at + 16 + lane])


# fmt: off
Q4_K = BlobFormat(
    "q4_k", NIBBLES, rows_q4_k, with_product, unpack_q4_k,
    read_share=0.79, ggml_type=12, shared=2, scale="uint8", minimum=True,
)
Q5_K = BlobFormat(
    "q5_k", NIBBLES, rows_q5_k, with_product, unpack_q5_k,
    read_share=0.79, ggml_type=13, extra_bits=1, shared=2, scale="uint8", minimum=True,
)
Q6_K = BlobFormat(
    "q6_k", NIBBLES, rows_q6_k, with_halves, unpack_q6_k,
    read_share=0.83, ggml_type=14, zero=32, extra_bits=2, shared=1, parts=2, scale="int8",
)
# fmt: on
