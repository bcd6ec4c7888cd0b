"""Triton's kernels for many pairs (prefill): tiles of pairs that share a slot, on tensor cores.

A tile dequantizes its weights once for `tl.dot`; a third launch sums each token's pairs in order, so
a run always gives the same bits. `table` holds int32 rows of all pairs in order of slots: token,
slot, weight (its bits), first shard, last shard; behind them the places of the pairs in order of
tokens, where each token's begin there, and the first pair of each tile.
"""

from __future__ import annotations

from hybrimoe.kernels.gpu.triton_units import entry, float_at, gate, matrix, tl

SLOT, WEIGHT, LOW, HIGH = (1, 2, 3, 4) if tl is None else map(tl.constexpr, range(1, 5))
ORDER, BEGIN = (5, 6) if tl is None else map(tl.constexpr, range(5, 7))


@entry
def up_tiles(
    words, x, table, h, pairs, tokens, alpha, limit, offset,
    CODES: tl.constexpr, KIND: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SHARDS: tl.constexpr, MATRICES: tl.constexpr,
    UP_BLOCK: tl.constexpr, DOWN_BLOCK: tl.constexpr, DOWN_AT: tl.constexpr, BIAS_AT: tl.constexpr,
    SHARD: tl.constexpr, EXPERT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """h [P, F] of up to TILE pairs of one slot; grid (16 BLOCKS columns of F, tile)."""
    first = tl.load(table + BEGIN * pairs + tokens + 1 + tl.program_id(1))
    slot = tl.load(table + SLOT * pairs + first)
    low, high = tl.load(table + LOW * pairs + first), tl.load(table + HIGH * pairs + first)
    p = first + tl.arange(0, TILE)
    mine = tl.load(table + SLOT * pairs + p, mask=p < pairs, other=-1) == slot
    t = tl.load(table + p, mask=mine, other=0).to(tl.int64)
    unit = tl.arange(0, BLOCKS * GROUPS)
    block = tl.program_id(0) * BLOCKS + unit // GROUPS
    shard = block // (WIDTH * 2)
    inside = (shard >= low) & (shard < high)
    start = slot.to(tl.int64) * EXPERT
    ups = start + shard * SHARD + block % (WIDTH * 2) * MATRICES * UP_BLOCK
    g = tl.zeros([TILE, BLOCKS * 16], tl.float32)
    u = tl.zeros([TILE, BLOCKS * 16], tl.float32)
    for group in range(0, COLUMNS, GROUPS):
        at = ups + (group + unit % GROUPS) * UNIT
        live = inside & (group + unit % GROUPS < COLUMNS)
        d = group * 32 + tl.arange(0, GROUPS * 32)[None, :]
        xs = tl.load(x + t[:, None] * D + d, mask=mine[:, None] & (d < D), other=0)
        xs = xs.to(h.dtype.element_ty)
        w = matrix(words, at, live, BLOCKS, GROUPS, CODES, N).to(h.dtype.element_ty)
        g = tl.dot(xs, w, g, input_precision=PRECISION)
        if MATRICES == 2:
            w = matrix(words, at + UP_BLOCK, live, BLOCKS, GROUPS, CODES, N)
            u = tl.dot(xs, w.to(h.dtype.element_ty), u, input_precision=PRECISION)
    f = tl.program_id(0) * (BLOCKS * 16) + tl.arange(0, BLOCKS * 16)
    real = f < SHARDS * WIDTH * 32
    if BIAS_AT:
        at = start + f // (WIDTH * 32) * SHARD + BIAS_AT + f % (WIDTH * 32)
        g += float_at(words, at, real)[None, :]
        if MATRICES == 2:
            u += float_at(words, at + WIDTH * 32, real)[None, :]
    if MATRICES == 1:
        u += 1.0
    value = gate(g, u, alpha, limit, offset, KIND).to(h.dtype.element_ty)
    place = h + p.to(tl.int64)[:, None] * (SHARDS * WIDTH * 32) + f[None, :]
    tl.store(place, value, mask=mine[:, None] & real[None, :])


@entry
def down_tiles(
    words, h, table, y, pairs, tokens,
    CODES: tl.constexpr, KIND: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SHARDS: tl.constexpr, MATRICES: tl.constexpr,
    UP_BLOCK: tl.constexpr, DOWN_BLOCK: tl.constexpr, DOWN_AT: tl.constexpr, BIAS_AT: tl.constexpr,
    SHARD: tl.constexpr, EXPERT: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    TILE: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """y [P, D], weighted, of up to TILE pairs of one slot; grid (16 BLOCKS columns of D, tile)."""
    first = tl.load(table + BEGIN * pairs + tokens + 1 + tl.program_id(1))
    slot = tl.load(table + SLOT * pairs + first)
    low, high = tl.load(table + LOW * pairs + first), tl.load(table + HIGH * pairs + first)
    p = first + tl.arange(0, TILE)
    mine = tl.load(table + SLOT * pairs + p, mask=p < pairs, other=-1) == slot
    unit = tl.arange(0, BLOCKS * GROUPS)
    block = tl.program_id(0) * BLOCKS + unit // GROUPS
    start = slot.to(tl.int64) * EXPERT
    downs = start + DOWN_AT + block * DOWN_BLOCK
    total = tl.zeros([TILE, BLOCKS * 16], tl.float32)
    for group in range(low * WIDTH, high * WIDTH, GROUPS):
        column = group + unit % GROUPS
        live = (block < COLUMNS * 2) & (column < high * WIDTH)
        at = downs + column // WIDTH * SHARD + column % WIDTH * UNIT
        f = group * 32 + tl.arange(0, GROUPS * 32)[None, :]
        place = h + p.to(tl.int64)[:, None] * (SHARDS * WIDTH * 32) + f
        hs = tl.load(place, mask=mine[:, None] & (f < high * WIDTH * 32), other=0)
        w = matrix(words, at, live, BLOCKS, GROUPS, CODES, N).to(h.dtype.element_ty)
        total = tl.dot(hs, w, total, input_precision=PRECISION)
    d = tl.program_id(0) * (BLOCKS * 16) + tl.arange(0, BLOCKS * 16)
    if BIAS_AT:  # it belongs to the first shard
        at = start + BIAS_AT + MATRICES * WIDTH * 32 + d
        biased = tl.where((low <= 0) & (high > 0), D, 0)
        total += float_at(words, at, d < biased)[None, :]
    total *= float_at(table, WEIGHT * pairs + p, mine)[:, None]
    place = y + p.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(place, total, mask=mine[:, None] & (d < D)[None, :])


@entry
def sum_pairs(y, table, out, pairs, D: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, D] += the rows of y [P, D] of each token, in order; grid (token, block of D)."""
    t = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for r in range(tl.load(table + BEGIN * pairs + t), tl.load(table + BEGIN * pairs + t + 1)):
        row = tl.load(table + ORDER * pairs + r).to(tl.int64)
        total += tl.load(y + row * D + d, mask=d < D, other=0)
    place = out + t.to(tl.int64) * D + d
    tl.store(place, tl.load(place, mask=d < D) + total, mask=d < D)
