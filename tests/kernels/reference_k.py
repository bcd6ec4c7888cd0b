"""NumPy twin of the K types: a block of 16 rows as `k_types.py` describes it, read back."""

import numpy as np

ROWS = 16
K_GROUP = {"q4_k": 288, "q5_k": 352, "q6_k": 416}
"""Bytes of 16 rows' groups of 32 elements."""
K_HEAD = {"q4_k": 64, "q5_k": 64, "q6_k": 32}
"""Bytes of what 256 elements of each of the 16 rows share, in front of their 8 groups."""


def k_block_bytes(fmt, columns):
    """Bytes of 16 rows of so many columns, in whole cache lines."""
    return -(-(columns // 256 * (K_HEAD[fmt] + 8 * K_GROUP[fmt])) // 64) * 64


def unpack_k_block(fmt, block):
    """float32 [16, C] of a block's bytes."""
    head, group = K_HEAD[fmt], K_GROUP[fmt]
    size = head + 8 * group
    supers = block[: len(block) // size * size].reshape(-1, size)  # [B, bytes]
    shared = supers[:, :head].copy().view(np.float16).astype(np.float32)
    shared = shared.reshape(len(supers), -1, 1, ROWS, 1)  # [B, 1 or 2, 1, 16, 1]
    groups = supers[:, head:].reshape(len(supers), 8, group)
    scales = groups[:, :, -2 * ROWS :].reshape(len(supers), 8, 2, ROWS, 1)
    values = shared[:, 0] * _scaled(fmt, groups[:, :, : -2 * ROWS], scales)
    if fmt != "q6_k":
        values -= shared[:, 1] * scales[:, :, 1].astype(np.float32)
    return values.transpose(2, 0, 1, 3).reshape(ROWS, -1)  # [B, 8, 16, 32] before


def _scaled(fmt, weights, scales):
    """Integers times those of their groups, float32 [B, 8, 16, 32]."""
    if fmt == "q6_k":
        halves = weights.reshape(*weights.shape[:2], 2, 192)
        q = _nibbles(halves[..., :128]) | _above(halves[..., 128:], 2) << 4  # [B, 8, 2, 16, 16]
        scaled = (q.astype(np.float32) - 32) * scales.view(np.int8).astype(np.float32)
        return scaled.swapaxes(2, 3).reshape(*q.shape[:2], ROWS, 32)
    q = _nibbles(weights[..., :256])
    if fmt == "q5_k":
        q = q | _above(weights[..., 256:], 1) << 4
    return q.astype(np.float32) * scales[:, :, 0].astype(np.float32)


def _nibbles(loads):
    """Loads of 64 bytes, 4 per row: the low nibbles of a row's 4 bytes, then the high ones."""
    loads = loads.reshape(*loads.shape[:-1], -1, ROWS, 4)  # [..., J, 16, 4]
    return np.moveaxis(np.concatenate([loads & 15, loads >> 4], -1), -2, -3).reshape(
        *loads.shape[:-3], ROWS, -1
    )


def _above(plane, bits):
    """The bits above those nibbles, in the same order, from 64 bytes."""
    plane, loads = plane.reshape(*plane.shape[:-1], ROWS, 4), 4 // bits
    mask = (1 << bits) - 1
    parts = []
    for j in range(loads):
        parts += [plane >> (4 + bits * j) & mask, plane >> (bits * j) & mask]
    return np.concatenate(parts, -1)
