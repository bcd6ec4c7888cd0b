"""All CPU experts of one layer in one call.

Two parallel sweeps over tiles: gate, up and activation by (expert, 32 rows of F), then the down
projection and the weighted sum by rows of D. A tile is taken by whichever thread is free, but what
it computes depends neither on the thread, nor on the number of threads, nor on the other tokens of
the batch: outputs are bit-identical in all these cases.
"""

from typing import NamedTuple

import numpy as np

from hybrimoe.formats.registry import quantize, rows
from hybrimoe.kernels.cpu.gates import apply_gate
from hybrimoe.simd.dtypes import narrow, widen
from hybrimoe.simd.jit import inlined, inner, kernel
from hybrimoe.simd.threads import fork_join
from hybrimoe.simd.vectors import (
    Tag,
    add_weighted,
    following_rows,
    load_f32,
    no_floats,
    prefetch,
    splat_tile,
    store_tile,
    take,
    token_rows,
)

T1, T2, T4, T8 = (Tag("tokens", n) for n in (1, 2, 4, 8))
MAX_TILE_TOKENS = 8
"""Tokens of the deepest tile: 8 float and 8 integer sums fill half of AVX-512's 32 registers."""
UP_AT = MAX_TILE_TOKENS * 32
"""Where `Scratch.block` keeps the up rows; the gate rows come first."""


class Scratch(NamedTuple):
    """Buffers of one launch; `P` = T * K routed pairs, sorted by expert."""

    counters: np.ndarray  # [8] int64: the next tile of each sweep, and the next worker
    offsets: np.ndarray  # [E + 1] int32: pairs of expert e are offsets[e] : offsets[e + 1]
    active: np.ndarray  # [E] int32: experts with pairs and shards to compute
    token: np.ndarray  # [P] int32
    weight: np.ndarray  # [P] float32
    x: np.ndarray  # [T * activation_bytes(D)] uint8, as the format of gate and up wants it
    h: np.ndarray  # [P * activation_bytes(F)] uint8, as the format of down wants it
    sums: np.ndarray  # [T, D] float32
    block: np.ndarray  # [threads, 2 * MAX_TILE_TOKENS * 32] float32


class Strides(NamedTuple):
    """Bytes of one row of `Scratch.x` and of `Scratch.h`, and 16-row blocks per down tile."""

    x: int
    h: int
    chunk: int


@kernel
def run_experts(
    isa, fmt, dtype, threads, layout, strides, gate, blobs, place, x, ids, weights, shards, out, add,
    scratch,
):  # fmt: skip
    """out[t] = sum over k of weights[t, k] * expert[ids[t, k]](x[t]).

    fmt: the formats of gate and up, and of down.
    blobs [N, expert_bytes] uint8; place [E] int32, the row of each expert that has work; x, out
    [T, D] in `dtype` (bfloat16 and float16 as uint16 bits); ids [T, K] int64, every id in [0, E);
    weights [T, K] float32; shards [E, 2] int32, the range of shards of each expert to sum. All
    C-contiguous. add: 1 to go on from what `out` holds, 0 to begin at zero.
    """
    up, down = fmt
    scratch.counters[:] = 0
    sort_pairs(ids, weights, scratch)
    active = list_active(shards, scratch)
    few = min(threads, x.shape[0] // 8 + 1)
    fork_join(few, prepare_worker, (up, dtype, layout, strides, x, scratch))
    sweep = (isa, fmt, layout, strides, gate, blobs, place, shards, active, scratch)
    fork_join(threads, gate_up_worker, sweep)
    join = (isa, down, dtype, layout, strides, blobs, place, shards, active, out, add, scratch)
    fork_join(threads, down_worker, join)


@kernel
def ids_in_range(ids, experts):
    """Whether every id [T, K] int64 lies in [0, experts)."""
    for t in range(ids.shape[0]):
        for j in range(ids.shape[1]):
            if ids[t, j] < 0 or ids[t, j] >= experts:
                return False
    return True


@inner
def sort_pairs(ids, weights, scratch):
    """Counting sort of the routed pairs by expert; tokens stay in order within an expert."""
    offsets, (tokens, k) = scratch.offsets, ids.shape
    offsets[:] = 0
    for t in range(tokens):
        for j in range(k):
            offsets[ids[t, j] + 1] += 1
    for e in range(offsets.size - 1):
        offsets[e + 1] += offsets[e]
    for t in range(tokens - 1, -1, -1):
        for j in range(k - 1, -1, -1):
            offsets[ids[t, j] + 1] -= 1
            p = offsets[ids[t, j] + 1]
            scratch.token[p], scratch.weight[p] = t, weights[t, j]
    for e in range(offsets.size - 1):  # offsets[e + 1] now is where expert e starts
        offsets[e] = offsets[e + 1]
    offsets[offsets.size - 1] = tokens * k


@inner
def list_active(shards, scratch):
    """Fill `scratch.active` and return how many experts have work here."""
    active = 0
    for e in range(shards.shape[0]):
        if scratch.offsets[e] < scratch.offsets[e + 1] and shards[e, 0] < shards[e, 1]:
            scratch.active[active] = e
            active += 1
    return active


@inner
def prepare_worker(fmt, dtype, layout, strides, x, scratch):
    """Put activations into the form `rows` wants, padded with zeros; one tile is one token."""
    t, tokens = take(scratch.counters, 0), x.shape[0]
    floats = scratch.sums.reshape(-1)  # free until the down sweep
    while t < tokens:
        at, columns = t * layout.hidden, x.shape[1]
        for d in range(columns):
            floats[at + d] = widen(dtype, x[t, d])
        floats[at + columns : at + layout.hidden] = 0
        for g in range(layout.hidden // 32):
            quantize(fmt, floats, at + g * 32, scratch.x, t * strides.x, g)
        t = take(scratch.counters, 0)


@inner
def gate_up_worker(isa, fmt, layout, strides, gate, blobs, place, shards, active, scratch):
    """One tile is 32 rows of F of one expert, for all its tokens."""
    block = scratch.block[take(scratch.counters, 1)]
    groups = layout.width // 32
    tile, tiles = take(scratch.counters, 2), active * layout.shards * groups
    while tile < tiles:
        e, s = scratch.active[tile // groups // layout.shards], tile // groups % layout.shards
        if shards[e, 0] <= s < shards[e, 1]:
            at = place[e] * layout.expert_bytes + s * layout.shard_bytes
            gate_up_tile(
                isa, fmt, layout, strides, gate, blobs, at, e, s, tile % groups, block, scratch
            )
        tile = take(scratch.counters, 2)


@inner
def gate_up_tile(isa, fmt, layout, strides, gate, blobs, at, e, s, g, block, scratch):
    """h of 32 rows of F (group g of shard s), in the form `rows` wants, into `scratch.h`."""
    p, end = scratch.offsets[e], scratch.offsets[e + 1]
    while p < end:
        tokens = deepest(end - p)
        if tokens == 8:
            gate_up(T8, isa, fmt[0], layout, strides, blobs, at, g, p, block, scratch)
        elif tokens == 4:
            gate_up(T4, isa, fmt[0], layout, strides, blobs, at, g, p, block, scratch)
        elif tokens == 2:
            gate_up(T2, isa, fmt[0], layout, strides, blobs, at, g, p, block, scratch)
        else:
            gate_up(T1, isa, fmt[0], layout, strides, blobs, at, g, p, block, scratch)
        for t in range(tokens):
            gate_row = block[t * 32 : t * 32 + 32]
            up_row = block[UP_AT + t * 32 : UP_AT + t * 32 + 32]
            apply_gate(gate, layout.matrices == 2, gate_row, up_row)
            h_group = s * (layout.width // 32) + g
            quantize(fmt[1], block, t * 32, scratch.h, (p + t) * strides.h, h_group)
        p += tokens


@inlined
def deepest(left):
    """Tokens of the next tile: 8, 4, 2 or 1."""
    return 8 if left >= 8 else 4 if left >= 4 else 2 if left >= 2 else 1


@inlined
def gate_up(tag, isa, fmt, layout, strides, blobs, at, g, p, block, scratch):
    """Gate and up rows, [2, MAX_TILE_TOKENS, 32] float32, of the pairs p, p + 1, ... into `block`."""
    x = token_rows(tag, scratch.x, scratch.token, p, strides.x)
    blob = blobs.reshape(-1)
    for half in range(2):
        for m in range(layout.matrices):
            bias = no_floats()
            if layout.bias_at:
                bias_at = at + layout.bias_at + (m * layout.width + g * 32 + half * 16) * 4
                bias = load_f32(blob, bias_at)
            start = at + ((2 * g + half) * layout.matrices + m) * layout.up_block
            total = splat_tile(tag, bias)
            total = rows(fmt, isa, total, blob, start, layout.hidden // 32, x, 0)
            store_tile(total, block, m * UP_AT * 4 + half * 64, 128)


@inner
def down_worker(isa, fmt, dtype, layout, strides, blobs, place, shards, active, out, add, scratch):
    """One tile is a chunk of 16-row blocks of D, summed over all experts and tokens."""
    chunks = -(-(layout.hidden // 16) // strides.chunk)
    tile = take(scratch.counters, 3)
    while tile < chunks:
        first = tile * strides.chunk
        end = min(first + strides.chunk, layout.hidden // 16)
        scratch.sums[: out.shape[0], first * 16 : end * 16] = 0
        if add:
            for t in range(out.shape[0]):
                for d in range(first * 16, min(end * 16, out.shape[1])):
                    scratch.sums[t, d] = widen(dtype, out[t, d])
        for a in range(active):
            e = scratch.active[a]
            for s in range(shards[e, 0], shards[e, 1]):
                prefetch_run(blobs, place, layout, shards, scratch, active, a, s, first)
                at = place[e] * layout.expert_bytes + s * layout.shard_bytes
                for row_block in range(first, end):
                    down_tile(isa, fmt, layout, strides, blobs, at, e, s, row_block, scratch)
        for t in range(out.shape[0]):
            for d in range(first * 16, min(end * 16, out.shape[1])):
                out[t, d] = narrow(dtype, scratch.sums[t, d])
        tile = take(scratch.counters, 3)


@inlined
def prefetch_run(blobs, place, layout, shards, scratch, active, a, s, first):
    """Ask for the start of the run of down blocks that comes after shard s of active expert a.

    The hardware's prefetcher loses the stream at each jump; the first 4 KiB give it a new start,
    which made the down sweep 1.2x faster.
    """
    e, after = scratch.active[a], s + 1
    if after == shards[e, 1] and a + 1 < active:
        e = scratch.active[a + 1]
        after = shards[e, 0]
    at = place[e] * layout.expert_bytes + after * layout.shard_bytes
    at += layout.down_at + first * layout.down_block
    for line in range(64):
        prefetch(blobs.reshape(-1), at + line * 64)


@inlined
def down_tile(isa, fmt, layout, strides, blobs, at, e, s, row_block, scratch):
    p, end = scratch.offsets[e], scratch.offsets[e + 1]
    while p < end:
        tokens = deepest(end - p)
        if tokens == 8:
            down(T8, isa, fmt, layout, strides, blobs, at, s, row_block, p, scratch)
        elif tokens == 4:
            down(T4, isa, fmt, layout, strides, blobs, at, s, row_block, p, scratch)
        elif tokens == 2:
            down(T2, isa, fmt, layout, strides, blobs, at, s, row_block, p, scratch)
        else:
            down(T1, isa, fmt, layout, strides, blobs, at, s, row_block, p, scratch)
        p += tokens


@inlined
def down(tag, isa, fmt, layout, strides, blobs, at, s, row_block, p, scratch):
    """Add 16 rows of D of shard s, at byte `at`, to the sums of the tokens of pairs p, p + 1, ..."""
    blob = blobs.reshape(-1)
    h = following_rows(tag, scratch.h, p, strides.h)
    bias = no_floats()
    if layout.bias_at:
        bias_at = layout.bias_at + (layout.matrices * layout.width + row_block * 16) * 4
        bias = load_f32(blob, at + bias_at)
    start = at + layout.down_at + row_block * layout.down_block
    h_at = s * (strides.h // layout.shards)
    total = splat_tile(tag, bias)
    total = rows(fmt, isa, total, blob, start, layout.width // 32, h, h_at)
    sums = token_rows(tag, scratch.sums, scratch.token, p, layout.hidden * 4)
    add_weighted(total, sums, row_block * 64, scratch.weight, p)
