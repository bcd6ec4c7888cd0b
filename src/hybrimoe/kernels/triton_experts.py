"""Experts on a GPU from the packed blobs, by Triton.

Few pairs (decode): two launches whatever the number of experts. `_up_pairs` computes 16 hidden
columns of one pair, `_down_tokens` 16 outputs of one token over all its pairs. Weights stream
through once per pair, products and sums are float32, and nothing is reduced across programs, so a
run always gives the same bits. Many pairs (prefill): tiles of pairs that share a slot, weights
dequantized once per tile for `tl.dot`, and a third launch that sums each token's pairs in order.

A unit is 32 columns of the 16 rows of a block: what `_words` reads, as 32-bit words that hold
consecutive rows, so 16-byte loads fill whole cache lines. Written for Ada and Hopper, compiled for
both and checked in Triton's interpreter; speed is unmeasured, and `TILES` and the constants beside
it are estimates. Prefill in float32 (or in a half that is not the weights') avoids tensor cores and
spills registers: right, but slow.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from hybrimoe.errors import HybriMoEError
from hybrimoe.kernels.activations import Gate
from hybrimoe.kernels.layout import BLOCK_BYTES, GROUP, QUANTIZED, ROWS, Layout

try:
    import triton
    import triton.language as tl
except ImportError:  # importing must work without; `run` then says what is missing
    triton = tl = None

_jit = (lambda kernel: kernel) if triton is None else triton.jit

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
MOST_PAIRS = 128
"""Up to here every pair reads its own weights; beyond, pairs of a slot share them in tiles."""
UNITS = {"int4": 32, "int8": 16, "bfloat16": 8, "float16": 8, "float32": 4}
"""Units a decode program has in flight: 8 kB of weights, 64 bytes for each of its 128 threads."""
NUMBERS = {"int4": 8, "int8": 4, "bfloat16": 2, "float16": 1, "float32": 1}
"""Columns of one row that lie side by side before the next of the 16 interleaved rows."""
BLOCKS, GROUPS = 4, 2
"""Blocks of 16 rows in a prefill tile, and groups of 32 columns in one step of its product."""
TILES = ((16, 16, 4), (64, 32, 4), (1 << 62, 64, 8))
"""(mean pairs per slot up to which, pairs per tile, warps)."""


class TritonMissingError(HybriMoEError, ImportError):
    """Triton cannot be imported; `torch_experts` computes the same without it."""


class Plan(NamedTuple):
    """The tiles of a prefill, all tensors on the device; slots without pairs have none."""

    first: Tensor  # [N] first pair of each tile; P where there are fewer than N tiles
    order: Tensor  # [P] pairs sorted by token
    begin: Tensor  # [T + 1] where each token's pairs begin in `order`
    size: int
    warps: int


def available() -> bool:
    """Whether `run` can be called at all: Triton is installed."""
    return triton is not None


def run(
    fmt: str,
    layout: Layout,
    gate: Gate,
    blobs: Tensor,
    x: Tensor,
    token: Tensor,
    slot: Tensor,
    weight: Tensor,
    out: Tensor,
    shards: Tensor | None = None,
    counts: list[int] | None = None,
    tiled: bool | None = None,
) -> None:
    """out[token[p]] += weight[p] * expert(slot[p])(x[token[p]]) for every pair p.

    blobs [S, expert_bytes] uint8, starting on 16 bytes; x [T, D] in any float dtype; token, slot
    [P] int32, sorted by slot; weight [P] float32; out [T, D] float32; shards [S, 2] int32 or None:
    the range of shards of each slot's expert to sum. All contiguous and on torch's current device,
    whose current stream is used; shapes and ids are the caller's to check. Nothing here waits for
    the device.
    counts: pairs of each slot, [S] on the host; spares a prefill its empty tiles.
    tiled: which path to take; None decides by the number of pairs.
    """
    if triton is None:
        raise TritonMissingError("triton_experts.run needs Triton: pip install triton")
    if not len(slot):
        return
    if blobs.data_ptr() % 16:
        raise ValueError("blobs must start on a multiple of 16 bytes")
    tiled = len(slot) > MOST_PAIRS if tiled is None else tiled
    launch = _run_tiles if tiled else _run_pairs
    words = blobs.view(torch.int32)
    tables = (token, slot, weight, slot if shards is None else shards)
    constants = _constants(fmt, layout, gate, x, shards is not None)
    launch(layout, (gate.alpha, gate.limit, gate.offset), words, x, tables, out, constants, counts)


def _run_pairs(layout, params, words, x, tables, out, constants, counts):
    token, slot, weight, shards = tables
    pairs, device = len(slot), x.device
    h = torch.empty((pairs, layout.inner), dtype=torch.float32, device=device)
    sorted_slot = torch.empty(pairs, dtype=torch.int32, device=device)
    sorted_weight = torch.empty(pairs, dtype=torch.float32, device=device)
    most = triton.next_power_of_2(max(pairs, MOST_PAIRS))
    units = UNITS[constants["FMT"]]
    # A token's outputs make few programs, so each of them gets twice the threads.
    _up_pairs[(pairs, layout.inner // ROWS)](
        words, x, token, slot, weight, shards, h, sorted_slot, sorted_weight, pairs, *params,
        **constants, PAIRS=most, UNITS=units, num_warps=4,
    )  # fmt: skip
    _down_tokens[(len(x), layout.hidden // ROWS)](
        words, token, shards, h, sorted_slot, sorted_weight, out, pairs,
        **constants, PAIRS=most, UNITS=2 * units, num_warps=8,
    )  # fmt: skip


def _run_tiles(layout, params, words, x, tables, out, constants, counts):
    token, slot, weight, shards = tables
    pairs, device = len(slot), x.device
    plan = plan_tiles(token, slot, len(x), len(words), counts)
    dot = _dot_dtype(constants["FMT"], x)
    h = torch.empty((pairs, layout.inner), dtype=dot, device=device)
    y = torch.empty((pairs, out.shape[1]), dtype=torch.float32, device=device)
    rows = BLOCKS * ROWS
    shape = {"TILE": plan.size, "BLOCKS": BLOCKS, "GROUPS": GROUPS, "num_warps": plan.warps}
    _up_tiles[(triton.cdiv(layout.inner, rows), len(plan.first))](
        words, x, token, slot, shards, h, plan.first, pairs, *params, **constants, **shape
    )
    _down_tiles[(triton.cdiv(layout.hidden, rows), len(plan.first))](
        words, h, slot, weight, shards, y, plan.first, pairs, **constants, **shape
    )
    block = 512
    _sum_pairs[(len(x), triton.cdiv(out.shape[1], block))](
        y, plan.order, plan.begin, out, D=out.shape[1], BLOCK=block, num_warps=4
    )


def plan_tiles(
    token: Tensor, slot: Tensor, tokens: int, slots: int, counts: list[int] | None
) -> Plan:
    """Cut the pairs of each slot into tiles, on the device: the host knows an upper bound only."""
    pairs, device = len(slot), slot.device
    active = min(slots, pairs) if counts is None else sum(count > 0 for count in counts)
    size, warps = next((s, w) for most, s, w in TILES if pairs / active <= most)
    if counts is None:
        tiles = min(pairs, pairs // size + active)
    else:
        tiles = sum(-(-count // size) for count in counts)
    index = torch.arange(pairs, device=device, dtype=torch.int32)
    opens = (index - torch.searchsorted(slot, slot, out_int32=True)) % size == 0
    # Pairs that open no tile all write to one spare element behind the table.
    place = torch.where(opens, opens.cumsum(0) - 1, tiles)
    first = torch.full((tiles + 1,), pairs, device=device, dtype=torch.int32)
    first[place] = torch.where(opens, index, pairs)
    by_token, order = torch.sort(token, stable=True)
    begin = torch.searchsorted(
        by_token, torch.arange(tokens + 1, device=device, dtype=token.dtype), out_int32=True
    )
    return Plan(first[:tiles], order, begin, size, warps)


def _dot_dtype(fmt: str, x: Tensor) -> torch.dtype:
    """Halves where tensor cores lose nothing of native weights, else float32."""
    halves = x.dtype != torch.float32 and (fmt in QUANTIZED or DTYPES[fmt] == x.dtype)
    if halves and x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        return torch.float32  # the interpreter multiplies bfloat16 as its bits
    return x.dtype if halves else torch.float32


def _constants(fmt: str, layout: Layout, gate: Gate, x: Tensor, partial: bool) -> dict[str, Any]:
    """What is compiled in: constant strides tell Triton that 16-byte loads are aligned.

    COLUMNS and WIDTH count groups of 32 of D and of a shard's F; all strides count words.
    """
    return {
        "FMT": fmt,
        "KIND": gate.kind,
        "N": NUMBERS[fmt],
        "D": x.shape[1],
        "COLUMNS": layout.hidden // GROUP,
        "WIDTH": layout.width // GROUP,
        "SHARDS": layout.shards,
        "MATRICES": layout.matrices,
        "UP_BLOCK": layout.up_block // 4,
        "DOWN_BLOCK": layout.down_block // 4,
        "DOWN_AT": layout.down_at // 4,
        "BIAS_AT": layout.bias_at // 4,
        "SHARD": layout.shard_bytes // 4,
        "EXPERT": layout.expert_bytes // 4,
        "UNIT": (ROWS * BLOCK_BYTES[fmt] + (2 * ROWS if fmt in QUANTIZED else 0)) // 4,
        "PARTIAL": partial,
    }


@_jit
def _words(words, at, live, FMT: tl.constexpr, N: tl.constexpr):
    """Units [U] at words `at`, zero unless `live`: int32 [U, J, 16], float16 in that format."""
    j, lane = tl.arange(0, 32 // N)[None, :, None], tl.arange(0, 16)[None, None, :]
    if FMT == "float16":
        halves = words.to(tl.pointer_type(tl.float16), bitcast=True)
        return tl.load(halves + at[:, None, None] * 2 + j * 16 + lane, live[:, None, None], 0)
    else:
        return tl.load(words + at[:, None, None] + j * 16 + lane, live[:, None, None], 0)


@_jit
def _numbers(packed, n, FMT: tl.constexpr):
    """Number n of each word, without its scale, as float32; n broadcasts against the words."""
    if FMT == "int4":  # the low nibbles of four bytes, then the high ones
        nibble = (packed >> (n % 4 * 8 + n // 4 * 4)) & 15
        # Bits of 2**23 + q: a subtraction makes the float, where a conversion has half the rate.
        return (nibble | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    elif FMT == "int8":
        return ((packed << (24 - n * 8)) >> 24).to(tl.float32)
    elif FMT == "bfloat16":
        return ((packed >> (n * 16)) << 16).to(tl.float32, bitcast=True)
    elif FMT == "float16":
        return packed.to(tl.float32)
    else:
        return packed.to(tl.float32, bitcast=True)


@_jit
def _scales(words, at, live, FMT: tl.constexpr):
    """Scales of units [U]: float32 [U, 1, 16]; lies behind the weights. One in native formats."""
    if FMT == "int4" or FMT == "int8":
        halves = words.to(tl.pointer_type(tl.float16), bitcast=True)
        start: tl.constexpr = 128 if FMT == "int4" else 256
        at = at[:, None, None] * 2 + start + tl.arange(0, 16)[None, None, :]
        return tl.load(halves + at, mask=live[:, None, None], other=0).to(tl.float32)
    else:
        return tl.full([1, 1, 1], 1.0, tl.float32)


@_jit
def _add_units(total, words, at, live, x, column, end, FMT: tl.constexpr, N: tl.constexpr):
    """total [U, J, 16] plus units times x[column + N j + n], zero from `end` on, summed over n.

    One number of all words at a time: a fourth axis for n would spread it over threads.
    """
    packed = _words(words, at, live, FMT, N)
    part = tl.zeros_like(total)
    d = column[:, None] + tl.arange(0, 32 // N)[None, :] * N
    for n in tl.static_range(N):
        xs = tl.load(x + d + n, mask=live[:, None] & (d + n < end), other=0).to(tl.float32)
        part += _numbers(packed, n, FMT) * xs[:, :, None]
    return total + part * _scales(words, at, live, FMT)


@_jit
def _matrix(words, at, live, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, FMT: tl.constexpr,
            N: tl.constexpr):  # fmt: skip
    """Units [BLOCKS * GROUPS], groups innermost, with scales, as float32 [32 GROUPS, 16 BLOCKS]."""
    n = tl.arange(0, N)[None, None, None, :]
    numbers = _numbers(_words(words, at, live, FMT, N)[:, :, :, None], n, FMT)
    numbers *= _scales(words, at, live, FMT)[:, :, :, None]
    numbers = tl.reshape(numbers, (BLOCKS, GROUPS, 32 // N, 16, N))
    return tl.reshape(tl.permute(numbers, (1, 2, 4, 0, 3)), (GROUPS * 32, BLOCKS * 16))


@_jit
def _float(words, at, mask):
    """Biases are float32 among the words."""
    return tl.load(words + at, mask=mask, other=0).to(tl.float32, bitcast=True)


@_jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@_jit
def _tanh(x):
    return 1 - 2 / (1 + tl.exp(2 * x))


@_jit
def _gate(g, u, alpha, limit, offset, KIND: tl.constexpr):
    """The formula of `Gate`, in the order of its NAMES; written so that NaN passes every clamp."""
    if KIND == 5:
        return alpha * _tanh(g / alpha) * _sigmoid(g) * limit * _tanh(u / limit)
    else:
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, u)
        u = tl.where(u < -limit, -limit, u) + offset
        if KIND == 0:
            act = g * _sigmoid(alpha * g)
        elif KIND == 1:
            act = 0.5 * g * (1 + tl.erf(g * 0.7071067811865476))
        elif KIND == 2:
            act = 0.5 * g * (1 + _tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)))
        else:
            act = tl.where(g < 0, 0.0, g)
            if KIND == 4:
                act = act * act
        return act * u


@_jit
def _up_pairs(
    words, x, token, slot, weight, shards, h, sorted_slot, sorted_weight, pairs,
    alpha, limit, offset,
    FMT: tl.constexpr, KIND: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SHARDS: tl.constexpr, MATRICES: tl.constexpr,
    UP_BLOCK: tl.constexpr, DOWN_BLOCK: tl.constexpr, DOWN_AT: tl.constexpr, BIAS_AT: tl.constexpr,
    SHARD: tl.constexpr, EXPERT: tl.constexpr, UNIT: tl.constexpr, PARTIAL: tl.constexpr,
    PAIRS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """16 columns of h for one pair, times its weight; grid (pair, block of 16 columns of F).

    h [P, F], sorted_slot and sorted_weight [P] are in token order, which the next launch wants.
    """
    p, block = tl.program_id(0), tl.program_id(1)
    t, from_slot, scale = tl.load(token + p), tl.load(slot + p), tl.load(weight + p)
    q = tl.arange(0, PAIRS)
    others = tl.load(token + q, mask=q < pairs, other=2147483647)
    rank = tl.sum(((others < t) | ((others == t) & (q < p))).to(tl.int32), 0)
    if block == 0:
        tl.store(sorted_slot + rank, from_slot)
        tl.store(sorted_weight + rank, scale)
    shard, row, columns = block // (WIDTH * 2), block % (WIDTH * 2), COLUMNS
    if PARTIAL:  # nothing to sum outside the range; the next launch reads nothing of it either
        inside = (shard >= tl.load(shards + from_slot * 2)) & (
            shard < tl.load(shards + from_slot * 2 + 1)
        )
        columns = tl.where(inside, COLUMNS, 0)
    start = from_slot.to(tl.int64) * EXPERT + shard * SHARD
    ups = start + row * MATRICES * UP_BLOCK
    g = tl.zeros([UNITS, 32 // N, 16], tl.float32)
    u = tl.zeros([UNITS, 32 // N, 16], tl.float32)
    for first in range(0, columns, UNITS):
        unit = first + tl.arange(0, UNITS)
        live = unit < COLUMNS
        at, row_x = ups + unit * UNIT, x + t.to(tl.int64) * D
        g = _add_units(g, words, at, live, row_x, unit * 32, D, FMT, N)
        if MATRICES == 2:
            u = _add_units(u, words, at + UP_BLOCK, live, row_x, unit * 32, D, FMT, N)
    gate, up = tl.sum(tl.sum(g, 1), 0), tl.sum(tl.sum(u, 1), 0)
    lane = tl.arange(0, 16)
    f = row * 16 + lane
    if BIAS_AT:
        gate += _float(words, start + BIAS_AT + f, f >= 0)
        if MATRICES == 2:
            up += _float(words, start + BIAS_AT + WIDTH * 32 + f, f >= 0)
    if MATRICES == 1:
        up += 1.0
    value = _gate(gate, up, alpha, limit, offset, KIND) * scale
    tl.store(h + rank.to(tl.int64) * (SHARDS * WIDTH * 32) + block * 16 + lane, value)


@_jit
def _down_tokens(
    words, token, shards, h, sorted_slot, sorted_weight, out, pairs,
    FMT: tl.constexpr, KIND: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SHARDS: tl.constexpr, MATRICES: tl.constexpr,
    UP_BLOCK: tl.constexpr, DOWN_BLOCK: tl.constexpr, DOWN_AT: tl.constexpr, BIAS_AT: tl.constexpr,
    SHARD: tl.constexpr, EXPERT: tl.constexpr, UNIT: tl.constexpr, PARTIAL: tl.constexpr,
    PAIRS: tl.constexpr, UNITS: tl.constexpr,
):  # fmt: skip
    """16 outputs of one token, over all units of all its pairs; grid (token, block of 16 of D)."""
    t, block = tl.program_id(0), tl.program_id(1)
    q = tl.arange(0, PAIRS)
    others = tl.load(token + q, mask=q < pairs, other=2147483647)
    begin = tl.sum((others < t).to(tl.int32), 0)
    end = tl.sum((others <= t).to(tl.int32), 0)
    total = tl.zeros([UNITS, 32 // N, 16], tl.float32)
    for first in range(begin * (SHARDS * WIDTH), end * (SHARDS * WIDTH), UNITS):
        unit = first + tl.arange(0, UNITS)
        live = unit < end * (SHARDS * WIDTH)
        shard = unit // WIDTH % SHARDS
        from_slot = tl.load(sorted_slot + unit // (SHARDS * WIDTH), mask=live, other=0)
        if PARTIAL:
            live &= shard >= tl.load(shards + from_slot * 2)
            live &= shard < tl.load(shards + from_slot * 2 + 1)
        at = from_slot.to(tl.int64) * EXPERT + shard * SHARD + unit % WIDTH * UNIT
        at += DOWN_AT + block * DOWN_BLOCK
        total = _add_units(
            total, words, at, live, h, unit * 32, end * (SHARDS * WIDTH * 32), FMT, N
        )
    d = block * 16 + tl.arange(0, 16)
    value = tl.sum(tl.sum(total, 1), 0)
    if BIAS_AT:
        for r in range(begin, end):
            from_slot = tl.load(sorted_slot + r).to(tl.int64)
            has = d < D
            if PARTIAL:  # the bias belongs to the first shard
                has &= tl.load(shards + from_slot * 2) <= 0
                has &= tl.load(shards + from_slot * 2 + 1) > 0
            at = from_slot * EXPERT + BIAS_AT + MATRICES * WIDTH * 32 + d
            value += tl.load(sorted_weight + r) * _float(words, at, has)
    y = out + t.to(tl.int64) * D + d
    tl.store(y, tl.load(y, mask=d < D) + value, mask=d < D)


@_jit
def _up_tiles(
    words, x, token, slot, shards, h, tiles, pairs, alpha, limit, offset,
    FMT: tl.constexpr, KIND: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SHARDS: tl.constexpr, MATRICES: tl.constexpr,
    UP_BLOCK: tl.constexpr, DOWN_BLOCK: tl.constexpr, DOWN_AT: tl.constexpr, BIAS_AT: tl.constexpr,
    SHARD: tl.constexpr, EXPERT: tl.constexpr, UNIT: tl.constexpr, PARTIAL: tl.constexpr,
    TILE: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """h [P, F] of up to TILE pairs of one slot; grid (16 BLOCKS columns of F, tile)."""
    first = tl.load(tiles + tl.program_id(1))
    if first >= pairs:
        return
    from_slot = tl.load(slot + first)
    p = first + tl.arange(0, TILE)
    mine = tl.load(slot + p, mask=p < pairs, other=-1) == from_slot
    t = tl.load(token + p, mask=mine, other=0).to(tl.int64)
    low, high = 0, SHARDS
    if PARTIAL:
        low, high = tl.load(shards + from_slot * 2), tl.load(shards + from_slot * 2 + 1)
    unit = tl.arange(0, BLOCKS * GROUPS)
    block = tl.program_id(0) * BLOCKS + unit // GROUPS
    shard = block // (WIDTH * 2)
    inside = (shard >= low) & (shard < high)
    start = from_slot.to(tl.int64) * EXPERT
    ups = start + shard * SHARD + block % (WIDTH * 2) * MATRICES * UP_BLOCK
    g = tl.zeros([TILE, BLOCKS * 16], tl.float32)
    u = tl.zeros([TILE, BLOCKS * 16], tl.float32)
    for group in range(0, COLUMNS, GROUPS):
        at = ups + (group + unit % GROUPS) * UNIT
        live = inside & (group + unit % GROUPS < COLUMNS)
        d = group * 32 + tl.arange(0, GROUPS * 32)[None, :]
        xs = tl.load(x + t[:, None] * D + d, mask=mine[:, None] & (d < D), other=0)
        xs = xs.to(h.dtype.element_ty)
        w = _matrix(words, at, live, BLOCKS, GROUPS, FMT, N).to(h.dtype.element_ty)
        g = tl.dot(xs, w, g, input_precision="ieee")
        if MATRICES == 2:
            w = _matrix(words, at + UP_BLOCK, live, BLOCKS, GROUPS, FMT, N)
            u = tl.dot(xs, w.to(h.dtype.element_ty), u, input_precision="ieee")
    f = tl.program_id(0) * (BLOCKS * 16) + tl.arange(0, BLOCKS * 16)
    real = f < SHARDS * WIDTH * 32
    if BIAS_AT:
        at = start + f // (WIDTH * 32) * SHARD + BIAS_AT + f % (WIDTH * 32)
        g += _float(words, at, real)[None, :]
        if MATRICES == 2:
            u += _float(words, at + WIDTH * 32, real)[None, :]
    if MATRICES == 1:
        u += 1.0
    value = _gate(g, u, alpha, limit, offset, KIND).to(h.dtype.element_ty)
    place = h + p.to(tl.int64)[:, None] * (SHARDS * WIDTH * 32) + f[None, :]
    tl.store(place, value, mask=mine[:, None] & real[None, :])


@_jit
def _down_tiles(
    words, h, slot, weight, shards, y, tiles, pairs,
    FMT: tl.constexpr, KIND: tl.constexpr, N: tl.constexpr, D: tl.constexpr,
    COLUMNS: tl.constexpr, WIDTH: tl.constexpr, SHARDS: tl.constexpr, MATRICES: tl.constexpr,
    UP_BLOCK: tl.constexpr, DOWN_BLOCK: tl.constexpr, DOWN_AT: tl.constexpr, BIAS_AT: tl.constexpr,
    SHARD: tl.constexpr, EXPERT: tl.constexpr, UNIT: tl.constexpr, PARTIAL: tl.constexpr,
    TILE: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """y [P, D], weighted, of up to TILE pairs of one slot; grid (16 BLOCKS columns of D, tile)."""
    first = tl.load(tiles + tl.program_id(1))
    if first >= pairs:
        return
    from_slot = tl.load(slot + first)
    p = first + tl.arange(0, TILE)
    mine = tl.load(slot + p, mask=p < pairs, other=-1) == from_slot
    low, high = 0, SHARDS
    if PARTIAL:
        low, high = tl.load(shards + from_slot * 2), tl.load(shards + from_slot * 2 + 1)
    unit = tl.arange(0, BLOCKS * GROUPS)
    block = tl.program_id(0) * BLOCKS + unit // GROUPS
    start = from_slot.to(tl.int64) * EXPERT
    downs = start + DOWN_AT + block * DOWN_BLOCK
    total = tl.zeros([TILE, BLOCKS * 16], tl.float32)
    for group in range(low * WIDTH, high * WIDTH, GROUPS):
        column = group + unit % GROUPS
        live = (block < COLUMNS * 2) & (column < high * WIDTH)
        at = downs + column // WIDTH * SHARD + column % WIDTH * UNIT
        f = group * 32 + tl.arange(0, GROUPS * 32)[None, :]
        place = h + p.to(tl.int64)[:, None] * (SHARDS * WIDTH * 32) + f
        hs = tl.load(place, mask=mine[:, None] & (f < high * WIDTH * 32), other=0)
        w = _matrix(words, at, live, BLOCKS, GROUPS, FMT, N).to(h.dtype.element_ty)
        total = tl.dot(hs, w, total, input_precision="ieee")
    d = tl.program_id(0) * (BLOCKS * 16) + tl.arange(0, BLOCKS * 16)
    if BIAS_AT:
        at = start + BIAS_AT + MATRICES * WIDTH * 32 + d
        total += _float(words, at, (d < D) & (low <= 0) & (high > 0))[None, :]
    total *= tl.load(weight + p, mask=mine, other=0)[:, None]
    place = y + p.to(tl.int64)[:, None] * D + d[None, :]
    tl.store(place, total, mask=mine[:, None] & (d < D)[None, :])


@_jit
def _sum_pairs(y, order, begin, out, D: tl.constexpr, BLOCK: tl.constexpr):
    """out [T, D] += the rows of y [P, D] of each token, in order; grid (token, block of D)."""
    t = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for r in range(tl.load(begin + t), tl.load(begin + t + 1)):
        total += tl.load(y + tl.load(order + r).to(tl.int64) * D + d, mask=d < D, other=0)
    place = out + t.to(tl.int64) * D + d
    tl.store(place, tl.load(place, mask=d < D) + total, mask=d < D)
