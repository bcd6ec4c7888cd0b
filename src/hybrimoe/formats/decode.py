"""Blocks of K types as numbers, by torch operations: a block is what `k_rows.py` describes."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrimoe.formats.layout import K_GROUP, K_HEAD, ROWS


def k_numbers(fmt: str, blocks: Tensor, supers: int) -> Tensor:
    """float32 [..., g, 4, 16, 8] of blocks [..., block bytes]: column 8 j + n of group g, exactly."""
    head, group = K_HEAD[fmt], K_GROUP[fmt]
    units = blocks[..., : supers * (head + 8 * group)].unflatten(-1, (supers, -1))
    halves = units[..., :head].view(torch.float16).float()
    d, *dmin = halves.unflatten(-1, (-1, 1, 1, ROWS, 1)).unbind(-5)  # [..., b, 1, 1, 16, 1] each
    groups = units[..., head:].unflatten(-1, (8, group))  # [..., b, 8, bytes]
    weights, scales = groups[..., : -2 * ROWS], groups[..., -2 * ROWS :]
    if fmt == "q6_k":
        numbers = d * _sixes(weights, scales)
    else:
        scale, least = scales.float().unflatten(-1, (2, 1, ROWS, 1)).unbind(-4)
        numbers = d * scale * _fours_and_fives(weights) - dmin[0] * least
    return numbers.flatten(-5, -4)  # b and its 8 groups


def _fours_and_fives(weights: Tensor) -> Tensor:
    """Integers [..., 4, 16, 8] of groups [..., bytes] of q4_k or q5_k."""
    ints = _nibbles(weights[..., :256])
    if weights.shape[-1] > 256:
        ints = ints | _above(weights[..., 256:], 1) << 4
    return ints


def _sixes(weights: Tensor, scales: Tensor) -> Tensor:
    """Integers times the scales of their 16 columns, [..., 4, 16, 8], of groups of q6_k."""
    halves = weights.unflatten(-1, (2, -1))
    ints = _nibbles(halves[..., :128]) | _above(halves[..., 128:], 2) << 4  # [..., 2, 2, 16, 8]
    scale = scales.view(torch.int8).float().unflatten(-1, (2, 1, ROWS, 1))
    return ((ints.float() - 32) * scale).flatten(-4, -3)


def _nibbles(loads: Tensor) -> Tensor:
    """Four bytes of a row: their low nibbles, then their high nibbles; [..., J, 16, 8]."""
    raw = loads.unflatten(-1, (-1, ROWS, 4))
    return torch.cat([raw & 15, raw >> 4], -1)


def _above(plane: Tensor, bits: int) -> Tensor:
    """The bits above those nibbles, in the same order, from 64 bytes."""
    raw, mask = plane.unflatten(-1, (ROWS, 4)), (1 << bits) - 1
    loads = [
        torch.cat([raw >> (4 + bits * j) & mask, raw >> (bits * j) & mask], -1)
        for j in range(4 // bits)
    ]
    return torch.stack(loads, -3)
