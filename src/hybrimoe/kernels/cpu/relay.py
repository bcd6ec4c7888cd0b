"""Experts as ggml files store them, laid out anew as blobs.

A ggml matrix is rows of blocks: 32 or 256 numbers of one row, with their scales. A blob interleaves
16 rows. Q4_0 (as int4 or int8), Q5_0, Q8_0 and IQ4_NL (as int8) keep their integers and their scale;
K types have blob formats of their own, which `relay_k.py` fills. What comes as float32 is rounded to
int8 groups, and what that adds is measured.
"""

import numpy as np

from hybrimoe.formats.activations import HIGHEST
from hybrimoe.formats.integer import Q4_0
from hybrimoe.simd.dtypes import F16, narrow, widen
from hybrimoe.simd.jit import inner, kernel
from hybrimoe.simd.threads import fork_join
from hybrimoe.simd.vectors import take

Q5_0, Q8_0, IQ4_NL, F32 = 6, 8, 20, 0
"""Types by their number in the file; formats say which they take as they are."""
BLOCK = {F32: 128, Q4_0: 18, Q5_0: 22, Q8_0: 34, IQ4_NL: 18}
"""Bytes of 32 numbers, of the types that `relay_experts` reads; F32 has no blocks."""
_LEVELS = np.array(
    (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113), np.float32
)
TAKEN, NOT_FINITE = 0, 1


@kernel
def relay_experts(kind, bits, threads, layout, matrix, size, raw, blobs, rows, sums, work):
    """Fill one matrix of some experts in `blobs` [n, expert_bytes] uint8 from `raw` uint8.

    kind: a type of `BLOCK`; raw holds n matrices of size = (rows, columns). matrix: 0 gate, 1 up,
    2 down. bits: 4 or 8, what the blobs hold. rows: [threads, 32] float32 scratch. sums: [threads,
    3] float64, to which are added how many groups were rounded, their squared errors and the squares
    of their numbers. work: [8] int64 zeros; work[1] is not zero if some group is not finite. Q8_0
    groups that hold -128 are rounded.
    """
    fork_join(
        threads,
        _relay_worker,
        (kind, bits, layout, matrix, size, raw, blobs, rows, sums, work),
    )


@inner
def _relay_worker(kind, bits, layout, matrix, size, raw, blobs, rows, sums, work):
    thread = take(work, 2)
    flat, row = blobs.reshape(-1), rows[thread]
    count = (layout.hidden if matrix == 2 else layout.width) // 16  # blocks of a shard
    tile, tiles = take(work, TAKEN), blobs.shape[0] * layout.shards * count
    rounded, error, square = 0, np.float64(0), np.float64(0)
    while tile < tiles:
        e, first, column, groups, at = tile_of(layout, matrix, count, tile)
        for lane in range(16):
            n = e * size[0] + first + lane
            for g in range(groups):
                if first + lane < size[0] and (column + g) * 32 < size[1]:
                    source = n * (size[1] // 32) + column + g
                    if kind == Q4_0 and bits == 4:
                        _move_nibbles(raw, source * 18, flat, at + g * 288, lane, work)
                        continue
                    if kind == Q8_0 and _move_bytes(
                        raw, source * 34, flat, at + g * 544, lane, work
                    ):
                        continue
                    scale = _read(kind, raw, source, row)
                    if kind in (Q4_0, Q5_0, IQ4_NL):
                        _put(bits, flat, at, lane, g, row, scale, np.float32(1), work)
                    else:
                        e2, s2 = _round(bits, flat, at, lane, g, row, scale, work)
                        rounded, error, square = rounded + 1, error + e2, square + s2
                else:
                    row[:] = 0
                    _put(bits, flat, at, lane, g, row, np.float32(0), np.float32(1), work)
        tile = take(work, TAKEN)
    sums[thread, 0] += rounded
    sums[thread, 1] += error
    sums[thread, 2] += square


@inner
def tile_of(layout, matrix, count, tile):
    """A block of 16 rows: its expert, its first row, its first and its number of groups, its byte.

    count: blocks of a shard.
    """
    e, s, b = tile // count // layout.shards, tile // count % layout.shards, tile % count
    at = e * layout.expert_bytes + s * layout.shard_bytes
    if matrix == 2:
        at += layout.down_at + b * layout.down_block
        return e, b * 16, s * layout.width // 32, layout.width // 32, at
    at += (b * layout.matrices + matrix) * layout.up_block
    return e, s * layout.width + b * 16, 0, layout.hidden // 32, at


@inner
def _move_nibbles(raw, source, blob, at, lane, work):
    """Q4_0 to int4: the same integers, four of them per half word, and the same scale.

    The file keeps numbers i and i + 16 in one byte, a blob i and i + 4.
    """
    halves, words = raw.view(np.uint16), blob.view(np.uint32)
    move_scale(halves[source // 2], blob, (at + 256) // 2 + lane, work)
    mask = np.uint32(0x0F0F0F0F)
    for j in range(2):
        first = word_at(halves, source // 2 + 1 + j * 4)
        second = word_at(halves, source // 2 + 3 + j * 4)
        words[at // 4 + j * 16 + lane] = (first & mask) | (second & mask) << np.uint32(4)
        words[at // 4 + (j + 2) * 16 + lane] = ((first >> np.uint32(4)) & mask) | (second & ~mask)


@inner
def _move_bytes(raw, source, blob, at, lane, work):
    """Q8_0 to int8: the same bytes and scale; False if one is -128, which the kernels cannot take."""
    halves, words, lowest = raw.view(np.uint16), blob.view(np.uint32), False
    for j in range(8):
        word = word_at(halves, source // 2 + 1 + j * 2)
        words[at // 4 + j * 16 + lane] = word
        # A byte is 0x80 where, its top bit turned, it is zero.
        turned = word ^ np.uint32(0x80808080)
        lowest |= ((turned - np.uint32(0x01010101)) & ~turned & np.uint32(0x80808080)) != 0
    if not lowest:
        move_scale(halves[source // 2], blob, (at + 512) // 2 + lane, work)
    return not lowest


@inner
def word_at(halves, at):
    return np.uint32(halves[at]) | np.uint32(halves[at + 1]) << np.uint32(16)


@inner
def move_scale(half, blob, at, work):
    blob.view(np.uint16)[at] = half
    if half & np.uint16(0x7C00) == np.uint16(0x7C00):  # infinite or NaN
        work[NOT_FINITE] += 1


@inner
def _put(bits, blob, at, lane, g, row, scale, inverse, work):
    """Write group g of one lane of a block: integers rint(row * inverse) and their scale."""
    half = narrow(F16, scale)
    if not abs(widen(F16, half)) <= HIGHEST:
        work[NOT_FINITE] += 1
    if bits == 4:
        blob.view(np.uint16)[(at + g * 288 + 256) // 2 + lane] = half
        start = at + g * 288 + lane * 4
        for j in range(4):
            for b in range(4):
                low = np.int32(np.rint(row[j * 8 + b] * inverse)) + 8
                high = np.int32(np.rint(row[j * 8 + 4 + b] * inverse)) + 8
                blob[start + j * 64 + b] = (low & 15) | (high << 4)
    else:
        blob.view(np.uint16)[(at + g * 544 + 512) // 2 + lane] = half
        start, ints = at + g * 544 + lane * 4, blob.view(np.int8)
        for i in range(32):
            q = np.int32(np.rint(row[i] * inverse))
            ints[start + i // 4 * 64 + i % 4] = max(-127, min(127, q))


@inner
def _round(bits, blob, at, lane, g, row, scale, work):
    """Write a group as int8 whose numbers are row * scale; the squares of the error and of all."""
    extreme, finite = np.float32(0), True
    for i in range(32):
        row[i] *= scale
        extreme = max(extreme, abs(row[i]))
        finite &= abs(row[i]) <= HIGHEST  # false for NaN too
    stored = widen(F16, narrow(F16, extreme / np.float32(127)))
    inverse = np.float32(0) if stored == 0 else np.float32(1) / stored
    if not finite:
        work[NOT_FINITE] += 1
    _put(bits, blob, at, lane, g, row, stored, inverse, work)
    error, square = np.float32(0), np.float32(0)
    for i in range(32):
        off = row[i] - np.rint(row[i] * inverse) * stored
        error += off * off
        square += row[i] * row[i]
    return np.float64(error), np.float64(square)


@inner
def _half(raw, at):
    return widen(F16, raw.view(np.uint16)[at // 2])


@inner
def _read(kind, raw, group, row):
    """row[:32] = one group of a matrix, up to the scale that is returned."""
    if kind in (Q4_0, Q5_0, Q8_0, IQ4_NL):
        return _read_simple(kind, raw, group, row)
    floats = raw.view(np.float32)
    for i in range(32):
        row[i] = floats[group * 32 + i]
    return np.float32(1)


@inner
def _read_simple(kind, raw, group, row):
    """Integers with one scale in front: the second half of a group lies in the upper nibbles."""
    if kind == Q8_0:
        at = group * 34
        for i in range(32):
            row[i] = np.int8(raw[at + 2 + i])
    elif kind == Q5_0:
        at = group * 22
        high = np.uint32(raw.view(np.uint16)[at // 2 + 1])
        high |= np.uint32(raw.view(np.uint16)[at // 2 + 2]) << np.uint32(16)
        for i in range(16):
            pair = np.int32(raw[at + 6 + i])
            row[i] = ((pair & 15) | np.int32((high >> np.uint32(i)) & np.uint32(1)) << 4) - 16
            row[i + 16] = (
                (pair >> 4) | np.int32((high >> np.uint32(i + 16)) & np.uint32(1)) << 4
            ) - 16
    else:
        at = group * 18
        for i in range(16):
            pair = np.int32(raw[at + 2 + i])
            if kind == Q4_0:
                row[i], row[i + 16] = (pair & 15) - 8, (pair >> 4) - 8
            else:
                row[i], row[i + 16] = _LEVELS[pair & 15], _LEVELS[pair >> 4]
    return _half(raw, at)
