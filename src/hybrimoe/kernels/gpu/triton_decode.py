"""Triton's kernels for few pairs (decode): two launches, and every pair reads its own weights.

Products and sums are float32. Nothing is reduced across programs, so a run always gives the same
bits. `table` holds int32 rows of all pairs in order of tokens: token, slot, weight (its bits), first
shard, last shard; behind them lies where each token's pairs begin.
"""

from __future__ import annotations

from hybrimoe.kernels.gpu.triton_units import add_units, entry, float_at, gate, tl

SLOT, WEIGHT, LOW, HIGH, BEGIN = (1, 2, 3, 4, 5) if tl is None else map(tl.constexpr, range(1, 6))


@entry
def up_pairs(
    words, x, table, h, pairs, alpha, limit, offset,
    CODES: tl.constexpr, KIND: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SHARDS: tl.constexpr, MATRICES: tl.constexpr,
    UP_BLOCK: tl.constexpr, DOWN_BLOCK: tl.constexpr, DOWN_AT: tl.constexpr, BIAS_AT: tl.constexpr,
    SHARD: tl.constexpr, EXPERT: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """h [P, F]: 16 columns of one pair, times its weight; grid (pair, block of 16 columns of F)."""
    p, block = tl.program_id(0), tl.program_id(1)
    shard, row = block // (WIDTH * 2), block % (WIDTH * 2)
    # Nothing to read outside the range of shards; the next launch reads nothing of it either.
    inside = (shard >= tl.load(table + LOW * pairs + p)) & (
        shard < tl.load(table + HIGH * pairs + p)
    )
    columns = tl.where(inside, COLUMNS, 0)
    t = tl.load(table + p).to(tl.int64)
    start = tl.load(table + SLOT * pairs + p).to(tl.int64) * EXPERT + shard * SHARD
    ups = start + row * MATRICES * UP_BLOCK
    g = tl.zeros([UNITS, 32 // N, 16], tl.float32)
    u = tl.zeros([UNITS, 32 // N, 16], tl.float32)
    for first in range(0, columns, UNITS):
        unit = first + tl.arange(0, UNITS)
        live = unit < COLUMNS
        at, row_x = ups + unit * UNIT, x + t * D
        g = add_units(g, words, at, live, row_x, unit * 32, D, CODES, N)
        if MATRICES == 2:
            u = add_units(u, words, at + UP_BLOCK, live, row_x, unit * 32, D, CODES, N)
    acted, up = tl.sum(tl.sum(g, 1), 0), tl.sum(tl.sum(u, 1), 0)
    lane = tl.arange(0, 16)
    f = row * 16 + lane
    if BIAS_AT:
        acted += float_at(words, start + BIAS_AT + f, f >= 0)
        if MATRICES == 2:
            up += float_at(words, start + BIAS_AT + WIDTH * 32 + f, f >= 0)
    if MATRICES == 1:
        up += 1.0
    value = gate(acted, up, alpha, limit, offset, KIND)
    value *= float_at(table, WEIGHT * pairs + p, p >= 0)
    tl.store(h + p.to(tl.int64) * (SHARDS * WIDTH * 32) + block * 16 + lane, value)


@entry
def down_tokens(
    words, table, h, out, pairs,
    CODES: tl.constexpr, KIND: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SHARDS: tl.constexpr, MATRICES: tl.constexpr,
    UP_BLOCK: tl.constexpr, DOWN_BLOCK: tl.constexpr, DOWN_AT: tl.constexpr, BIAS_AT: tl.constexpr,
    SHARD: tl.constexpr, EXPERT: tl.constexpr, UNIT: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """out [T, D] += 16 outputs of one token, over all units of its pairs; grid (token, block)."""
    t, block = tl.program_id(0), tl.program_id(1)
    begin = tl.load(table + BEGIN * pairs + t)
    end = tl.load(table + BEGIN * pairs + t + 1)
    total = tl.zeros([UNITS, 32 // N, 16], tl.float32)
    for first in range(begin * (SHARDS * WIDTH), end * (SHARDS * WIDTH), UNITS):
        unit = first + tl.arange(0, UNITS)
        live = unit < end * (SHARDS * WIDTH)
        shard, p = unit // WIDTH % SHARDS, unit // (SHARDS * WIDTH)
        live &= shard >= tl.load(table + LOW * pairs + p, mask=live, other=0)
        live &= shard < tl.load(table + HIGH * pairs + p, mask=live, other=0)
        slot = tl.load(table + SLOT * pairs + p, mask=live, other=0).to(tl.int64)
        at = slot * EXPERT + DOWN_AT + block * DOWN_BLOCK + shard * SHARD + unit % WIDTH * UNIT
        stop = end * (SHARDS * WIDTH * 32)
        total = add_units(total, words, at, live, h, unit * 32, stop, CODES, N)
    d = block * 16 + tl.arange(0, 16)
    value = tl.sum(tl.sum(total, 1), 0)
    if BIAS_AT:
        for p in range(begin, end):
            at = tl.load(table + SLOT * pairs + p).to(tl.int64) * EXPERT + BIAS_AT + d
            low, high = tl.load(table + LOW * pairs + p), tl.load(table + HIGH * pairs + p)
            biased = tl.where((low <= 0) & (high > 0), D, 0)  # it belongs to the first shard
            bias = float_at(words, at + MATRICES * WIDTH * 32, d < biased)
            value += float_at(table, WEIGHT * pairs + p, p >= 0) * bias
    y = out + t.to(tl.int64) * D + d
    tl.store(y, tl.load(y, mask=d < D) + value, mask=d < D)
