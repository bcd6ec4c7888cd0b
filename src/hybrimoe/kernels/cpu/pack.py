"""Weights to blobs and back, a layer's experts at a time; `layout.py` says where each number goes."""

from typing import NamedTuple

import numpy as np

from hybrimoe.formats.registry import pack_group, unpack_group
from hybrimoe.simd.dtypes import narrow, widen
from hybrimoe.simd.jit import inner, kernel
from hybrimoe.simd.threads import fork_join
from hybrimoe.simd.vectors import take

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

    fmt: the formats of gate and up, and of down; blocks of formats that only files bring are left alone.
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
