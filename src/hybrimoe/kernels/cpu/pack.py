"""Weights to blobs and back, a layer's experts at a time; `layout.py` says where each number goes."""

from typing import NamedTuple

import numpy as np
from numba.extending import overload

from hybrimoe.formats.loops import HIGHEST
from hybrimoe.simd.dtypes import DTYPES, narrow, widen
from hybrimoe.simd.jit import INLINED, inlined, inner, kernel
from hybrimoe.simd.threads import fork_join
from hybrimoe.simd.vectors import take

F16 = DTYPES["float16"]
ONLY_UP, ONLY_DOWN = 1, 2
"""Which matrices to pack when they do not come together."""


class Strides(NamedTuple):
    """Where element (expert, matrix, row, column) of a flat weight tensor lies, in elements.

    matrix: 0 is gate and 1 is up; always 0 for down. Any storage order of transformers is such a
    view: transposed, interleaved or neither.
    """

    expert: int
    matrix: int
    row: int
    column: int


class Weights(NamedTuple):
    """Flat tensors of one layer (bfloat16 and float16 as uint16 bits) and their true D and F."""

    up: np.ndarray
    up_strides: Strides
    down: np.ndarray
    down_strides: Strides
    hidden: int
    inner: int


@kernel
def pack_experts(fmt, dtype, threads, layout, weights, blobs, rows, work):
    """Fill `blobs` [E, expert_bytes] uint8 from `weights`, biases aside.

    fmt: the formats of gate and up, and of down; blocks of K types are left alone.
    rows: [threads, 32] float32 scratch. work: [8] int64 zeros; work[1] tells how many groups could
    not be quantized, because a weight is not finite or its scale exceeds float16. work[3] set to
    ONLY_UP or ONLY_DOWN leaves the other matrices' bytes alone and does not read their weights.
    """
    fork_join(threads, _pack_worker, (fmt, dtype, layout, weights, blobs, rows, work))


@kernel
def unpack_experts(fmt, dtype, threads, layout, weights, blobs, rows, work):
    """Fill `weights` from `blobs`: the inverse of `pack_experts`, up to rounding."""
    fork_join(threads, _unpack_worker, (fmt, dtype, layout, weights, blobs, rows, work))


class Block(NamedTuple):
    """16 rows of one matrix of one shard, in a weight tensor and in a blob."""

    down: bool
    first: int  # element of the tensor
    row: int  # elements from row to row
    column: int  # elements from column to column
    rows: int  # real rows, at most 16; the others are padding
    columns: int  # real columns
    groups: int  # groups of 32 columns, padding included
    at: int  # byte of all blobs


@inner
def _pack_worker(fmt, dtype, layout, weights, blobs, rows, work):
    flat, row = blobs.reshape(-1), rows[take(work, 2)]
    tile, tiles = take(work, 0), blobs.shape[0] * _blocks(layout)
    while tile < tiles:
        block = _block(layout, weights, tile)
        if work[3] == 0 or block.down == (work[3] == ONLY_DOWN):
            tensor = weights.down if block.down else weights.up
            for lane in range(16):
                for g in range(block.groups):
                    _read_group(dtype, tensor, block, lane, g, row)
                    if block.down:
                        pack_group(fmt[1], row, flat, block.at, lane, g, work)
                    else:
                        pack_group(fmt[0], row, flat, block.at, lane, g, work)
        tile = take(work, 0)


@inner
def _unpack_worker(fmt, dtype, layout, weights, blobs, rows, work):
    flat, row = blobs.reshape(-1), rows[take(work, 2)]
    tile, tiles = take(work, 0), blobs.shape[0] * _blocks(layout)
    while tile < tiles:
        block = _block(layout, weights, tile)
        tensor = weights.down if block.down else weights.up
        for lane in range(block.rows):
            for g in range(block.groups):
                if block.down:
                    unpack_group(fmt[1], row, flat, block.at, lane, g)
                else:
                    unpack_group(fmt[0], row, flat, block.at, lane, g)
                _write_group(dtype, tensor, block, lane, g, row)
        tile = take(work, 0)


@inner
def _blocks(layout):
    """Blocks of 16 rows per expert."""
    return layout.shards * ((layout.matrices * layout.width + layout.hidden) // 16)


@inner
def _block(layout, weights, tile):
    ups, blocks = layout.matrices * layout.width // 16, _blocks(layout)
    e, s = tile // blocks, tile % blocks // (ups + layout.hidden // 16)
    b = tile % blocks % (ups + layout.hidden // 16)
    at = e * layout.expert_bytes + s * layout.shard_bytes
    if b < ups:
        strides, row = weights.up_strides, s * layout.width + b // layout.matrices * 16
        first = e * strides.expert + b % layout.matrices * strides.matrix + row * strides.row
        rows, columns, groups = weights.inner - row, weights.hidden, layout.hidden // 32
        at += b * layout.up_block
    else:
        strides, row, column = weights.down_strides, (b - ups) * 16, s * layout.width
        first = e * strides.expert + row * strides.row + column * strides.column
        rows, columns, groups = weights.hidden - row, weights.inner - column, layout.width // 32
        at += layout.down_at + (b - ups) * layout.down_block
    rows, columns = max(0, min(16, rows)), max(0, columns)
    return Block(b >= ups, first, strides.row, strides.column, rows, columns, groups, at)


@inner
def _read_group(dtype, tensor, block, lane, g, row):
    """row[:32] = one group of weights, zero where it is padding."""
    real = min(32, max(0, block.columns - g * 32)) if lane < block.rows else 0
    first = block.first + lane * block.row + g * 32 * block.column
    for i in range(real):
        row[i] = widen(dtype, tensor[first + i * block.column])
    for i in range(real, 32):
        row[i] = 0


@inner
def _write_group(dtype, tensor, block, lane, g, row):
    first = block.first + lane * block.row + g * 32 * block.column
    for i in range(min(32, max(0, block.columns - g * 32))):
        tensor[first + i * block.column] = narrow(dtype, row[i])


def pack_group(fmt, row, blob, at, lane, g, work):
    """The Python face of the packers below: row [32] float32 to group g of one lane of a block."""
    raise TypeError("pack_group runs only inside a kernel")


def unpack_group(fmt, row, blob, at, lane, g):
    """The Python face of the unpackers below."""
    raise TypeError("unpack_group runs only inside a kernel")


@inner
def _scale(row, levels, signed, blob, at, work):
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
def _inverse(scale):
    return np.float32(0) if scale == 0 else np.float32(1) / scale


def _pack_int4(fmt, row, blob, at, lane, g, work):
    scale = _scale(row, 8, True, blob, at + g * 288 + 256 + lane * 2, work)
    inverse, start = _inverse(scale), at + g * 288 + lane * 4
    for j in range(4):
        for b in range(4):
            low = max(0, min(np.int32(np.rint(row[j * 8 + b] * inverse)) + 8, 15))
            high = max(0, min(np.int32(np.rint(row[j * 8 + 4 + b] * inverse)) + 8, 15))
            blob[start + j * 64 + b] = low | (high << 4)


def _unpack_int4(fmt, row, blob, at, lane, g):
    scale = widen(F16, blob.view(np.uint16)[(at + g * 288 + 256) // 2 + lane])
    start = at + g * 288 + lane * 4
    for j in range(4):
        for b in range(4):
            pair = np.int32(blob[start + j * 64 + b])
            row[j * 8 + b] = np.float32((pair & 15) - 8) * scale
            row[j * 8 + 4 + b] = np.float32((pair >> 4) - 8) * scale


def _pack_int8(fmt, row, blob, at, lane, g, work):
    scale = _scale(row, 127, False, blob, at + g * 544 + 512 + lane * 2, work)
    inverse, start, ints = _inverse(scale), at + g * 544 + lane * 4, blob.view(np.int8)
    for i in range(32):
        q = np.int32(np.rint(row[i] * inverse))
        ints[start + i // 4 * 64 + i % 4] = max(-127, min(127, q))


def _unpack_int8(fmt, row, blob, at, lane, g):
    scale = widen(F16, blob.view(np.uint16)[(at + g * 544 + 512) // 2 + lane])
    start, ints = at + g * 544 + lane * 4, blob.view(np.int8)
    for i in range(32):
        row[i] = np.float32(ints[start + i // 4 * 64 + i % 4]) * scale


def _pack_bfloat16(fmt, row, blob, at, lane, g, work):
    halves, start = blob.view(np.uint16), at // 2 + g * 512 + lane * 2
    for i in range(32):
        halves[start + i // 2 * 32 + i % 2] = narrow(fmt, row[i])


def _unpack_bfloat16(fmt, row, blob, at, lane, g):
    halves, start = blob.view(np.uint16), at // 2 + g * 512 + lane * 2
    for i in range(32):
        row[i] = widen(fmt, halves[start + i // 2 * 32 + i % 2])


def _pack_float16(fmt, row, blob, at, lane, g, work):
    halves, start = blob.view(np.uint16), at // 2 + g * 512 + lane
    for i in range(32):
        halves[start + i * 16] = narrow(fmt, row[i])


def _unpack_float16(fmt, row, blob, at, lane, g):
    halves, start = blob.view(np.uint16), at // 2 + g * 512 + lane
    for i in range(32):
        row[i] = widen(fmt, halves[start + i * 16])


def _pack_float32(fmt, row, blob, at, lane, g, work):
    floats, start = blob.view(np.float32), at // 4 + g * 512 + lane
    for i in range(32):
        floats[start + i * 16] = row[i]


def _unpack_float32(fmt, row, blob, at, lane, g):
    floats, start = blob.view(np.float32), at // 4 + g * 512 + lane
    for i in range(32):
        row[i] = floats[start + i * 16]


def _unpack_q4_k(fmt, row, blob, at, lane, g):
    start = at + g // 8 * 2368 + 64 + g % 8 * 288
    scale, least = _scale_and_least(blob, at + g // 8 * 2368, start + 256, lane)
    for i in range(32):
        row[i] = scale * np.float32(_nibble(blob, start, lane, i)) - least


def _unpack_q5_k(fmt, row, blob, at, lane, g):
    start = at + g // 8 * 2880 + 64 + g % 8 * 352
    scale, least = _scale_and_least(blob, at + g // 8 * 2880, start + 320, lane)
    for i in range(32):
        bits = np.int32(blob[start + 256 + lane * 4 + i % 4])
        fifth = (bits >> (i // 8 + (4 if i % 8 < 4 else 0))) & 1
        row[i] = scale * np.float32(_nibble(blob, start, lane, i) | fifth << 4) - least


def _unpack_q6_k(fmt, row, blob, at, lane, g):
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


def _leave(fmt, row, blob, at, lane, g, work):
    """K types are made from no floats: what a file brought stays."""


_PACKERS = {
    "int4": _pack_int4,
    "int8": _pack_int8,
    "bfloat16": _pack_bfloat16,
    "float16": _pack_float16,
    "float32": _pack_float32,
}
_UNPACKERS = {
    "int4": _unpack_int4,
    "int8": _unpack_int8,
    "bfloat16": _unpack_bfloat16,
    "float16": _unpack_float16,
    "float32": _unpack_float32,
    "q4_k": _unpack_q4_k,
    "q5_k": _unpack_q5_k,
    "q6_k": _unpack_q6_k,
}


@overload(pack_group, jit_options=INLINED)
def _choose_packer(fmt, row, blob, at, lane, g, work):
    return _PACKERS.get(fmt.value, _leave)


@overload(unpack_group, jit_options=INLINED)
def _choose_unpacker(fmt, row, blob, at, lane, g):
    return _UNPACKERS[fmt.value]
