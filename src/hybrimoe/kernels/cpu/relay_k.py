"""Experts in the K types of GGUF files, laid out anew: the same bits, in the order of `k_types.py`.

A block of the file holds 256 numbers of one row. Its nibbles are pairs of groups of 32: of one byte,
the lower half belongs to the first group and the upper half to a later one; a blob has them 4 columns
apart. Bits beyond the nibbles lie in a plane of their own, one group per bit of a byte.
"""

import numpy as np

from hybrimoe.formats import k_types
from hybrimoe.kernels.cpu.relay import move_scale, tile_of, word_at
from hybrimoe.simd.jit import inlined, inner, kernel
from hybrimoe.simd.threads import fork_join
from hybrimoe.simd.vectors import take

Q4_K, Q5_K, Q6_K = (fmt.ggml_type for fmt in (k_types.Q4_K, k_types.Q5_K, k_types.Q6_K))
NIBBLES = np.uint32(0x0F0F0F0F)
UPPER = np.uint32(0xF0F0F0F0)


@kernel
def relay_k(kind, threads, layout, matrix, size, raw, blobs, work):
    """Fill one matrix of some experts in `blobs` [n, expert_bytes] uint8 from `raw` uint8.

    kind: Q4_K, Q5_K or Q6_K, which `layout` must be made for. The rest is as in `relay_experts`;
    nothing is rounded.
    """
    fork_join(threads, _worker, (kind, layout, matrix, size, raw, blobs, work))


@inner
def _worker(kind, layout, matrix, size, raw, blobs, work):
    flat = blobs.reshape(-1)
    count = (layout.hidden if matrix == 2 else layout.width) // 16  # blocks of a shard
    tile, tiles = take(work, 0), blobs.shape[0] * layout.shards * count
    group = 288 if kind == Q4_K else 352 if kind == Q5_K else 416
    head, stored = (32, 210) if kind == Q6_K else (64, 144 if kind == Q4_K else 176)
    while tile < tiles:
        e, first, column, groups, at = tile_of(layout, matrix, count, tile)
        across = size[1] // 256
        for b in range(groups // 8):
            for lane in range(16):
                here = column // 8 + b
                if first + lane >= size[0] or here >= across:
                    _clear(group, head, flat, at, lane)
                    continue
                source = ((e * size[0] + first + lane) * across + here) * stored
                if kind == Q6_K:
                    _move_6(raw, source, flat, at, lane, work)
                else:
                    _move_4_and_5(kind == Q5_K, raw, source, flat, at, lane, work)
            at += head + 8 * group
        tile = take(work, 0)


@inner
def _clear(group, head, blob, at, lane):
    """Padding: all zero, the scales too."""
    words, halves = blob.view(np.uint32), blob.view(np.uint16)
    for i in range(head // 32):
        halves[at // 2 + i * 16 + lane] = 0
    for g in range(8):
        start = at + head + g * group
        for j in range(group // 64):
            words[start // 4 + j * 16 + lane] = 0
        blob[start + group - 32 + lane] = blob[start + group - 16 + lane] = 0


@inlined
def _move_4_and_5(five, raw, source, blob, at, lane, work):
    """A block of Q4_K or Q5_K: d, dmin, 12 bytes of scales, fifth bits [32] if any, nibbles [128]."""
    stored, words, halves = raw.view(np.uint32), blob.view(np.uint32), raw.view(np.uint16)
    group, bits = 352 if five else 288, source // 4 + 4
    first, nibbles = at + 64, bits + (8 if five else 0)
    move_scale(halves[source // 2], blob, at // 2 + lane, work)
    move_scale(halves[source // 2 + 1], blob, at // 2 + 16 + lane, work)
    for g in range(8):
        scale, least = _scale_and_least(raw, source + 4, g)
        blob[first + g * group + group - 32 + lane] = scale
        blob[first + g * group + group - 16 + lane] = least
    for i in range(4):
        even = (first + 2 * i * group) // 4 + lane
        odd = even + group // 4
        for j in range(4):
            a, b = stored[nibbles + i * 8 + j * 2], stored[nibbles + i * 8 + j * 2 + 1]
            words[even + j * 16] = (a & NIBBLES) | (b & NIBBLES) << np.uint32(4)
            words[odd + j * 16] = (a >> np.uint32(4)) & NIBBLES | b & UPPER
    if five:
        one = np.uint32(0x01010101)
        for g in range(8):
            plane = np.uint32(0)
            for j in range(4):
                low = (stored[bits + j * 2] >> np.uint32(g)) & one
                high = (stored[bits + j * 2 + 1] >> np.uint32(g)) & one
                plane |= low << np.uint32(4 + j) | high << np.uint32(j)
            words[(first + g * group) // 4 + 64 + lane] = plane


@inlined
def _scale_and_least(raw, packed, g):
    """The two numbers of 6 bits each that group g has among 12 bytes."""
    if g < 4:
        return raw[packed + g] & np.uint8(63), raw[packed + g + 4] & np.uint8(63)
    both = raw[packed + g + 4]
    scale = both & np.uint8(15) | (raw[packed + g - 4] >> np.uint8(6)) << np.uint8(4)
    return scale, both >> np.uint8(4) | (raw[packed + g] >> np.uint8(6)) << np.uint8(4)


@inlined
def _move_6(raw, source, blob, at, lane, work):
    """A block of Q6_K: nibbles [128], pairs of bits [64], 16 int8 scales, d; 2-byte aligned."""
    halves, words = raw.view(np.uint16), blob.view(np.uint32)
    move_scale(halves[source // 2 + 104], blob, at // 2 + lane, work)
    pair = np.uint32(0x03030303)
    for g in range(8):
        start, k = at + 32 + g * 416, np.uint32(g % 4)
        low, high = source + g // 4 * 64 + g % 2 * 32, source + 128 + g // 4 * 32
        shift = k // np.uint32(2) * np.uint32(4)
        for half in range(2):
            blob[start + 384 + half * 16 + lane] = raw[source + 192 + g * 2 + half]
            plane, to = np.uint32(0), (start + half * 192) // 4 + lane
            for j in range(2):
                i = half * 8 + j * 4  # half words from the group's start
                a, b = word_at(halves, low // 2 + i), word_at(halves, low // 2 + i + 2)
                a, b = (a >> shift) & NIBBLES, (b >> shift) & NIBBLES
                words[to + j * 16] = a | b << np.uint32(4)
                a, b = word_at(halves, high // 2 + i), word_at(halves, high // 2 + i + 2)
                a, b = (a >> (k * np.uint32(2))) & pair, (b >> (k * np.uint32(2))) & pair
                plane |= a << np.uint32(4 + 2 * j) | b << np.uint32(2 * j)
            words[to + 32] = plane
