"""Blocks of any format as numbers, by torch operations: `base.py` says what lies where."""

from __future__ import annotations

import torch
from torch import Tensor

from hybrimoe.formats.base import BYTES, GROUP, NIBBLES, ROWS, BlobFormat


def decode(fmt: BlobFormat, blocks: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Numbers [..., g, J, 16, N] in `dtype` of blocks [..., block bytes] uint8 of so many columns.

    Column J N + n of group g lies at [g, J, :, n]; N is `fmt.neighbours`. Products of a code and its
    scale are made in `dtype`, but in float32, where they are exact, for formats with a head.
    """
    working = torch.float32 if fmt.shared else dtype
    count = columns // fmt.columns
    units = blocks[..., : count * fmt.unit_bytes].unflatten(-1, (count, fmt.unit_bytes))
    groups = units[..., fmt.head_bytes :].unflatten(-1, (fmt.columns // GROUP, fmt.group_bytes))
    codes = groups[..., : fmt.parts * fmt.part_bytes].unflatten(-1, (fmt.parts, fmt.part_bytes))
    values = _codes(fmt, codes).to(working)  # [..., u, g, p, J, 16, N]
    if fmt.zero:
        values = values - fmt.zero
    if fmt.scale is not None:
        values = values * _scales(fmt, groups).to(working)
    if fmt.shared:
        halves = units[..., : fmt.head_bytes].view(torch.float16).float()
        d, *least = halves.unflatten(-1, (fmt.shared, 1, 1, 1, ROWS, 1)).unbind(-6)
        values = d * values
        if fmt.minimum:
            minimums = groups[..., -ROWS:].float().unflatten(-1, (1, 1, ROWS, 1))
            values = values - least[0] * minimums
    return values.flatten(-4, -3).flatten(-5, -4).to(dtype)  # parts into J, units into g


def _codes(fmt: BlobFormat, raw: Tensor) -> Tensor:
    """Codes [..., J, 16, N] of parts [..., bytes]: integers, or numbers of the format's own dtype."""
    if fmt.codes == NIBBLES:
        return _nibbles(fmt, raw)
    kind = torch.int8 if fmt.codes == BYTES else getattr(torch, fmt.codes)
    return raw.contiguous().view(kind).unflatten(-1, (-1, ROWS, fmt.run))


def _nibbles(fmt: BlobFormat, raw: Tensor) -> Tensor:
    loads = raw[..., : fmt.nibble_bytes].unflatten(-1, (-1, ROWS, fmt.run))
    codes = torch.cat([loads & 15, loads >> 4], -1)
    if not fmt.extra_bits:
        return codes
    plane, bits = raw[..., fmt.nibble_bytes :].unflatten(-1, (ROWS, fmt.run)), fmt.extra_bits
    mask = (1 << bits) - 1
    above = [
        torch.cat([plane >> (4 + bits * j) & mask, plane >> (bits * j) & mask], -1)
        for j in range(loads.shape[-3])
    ]
    return codes | torch.stack(above, -3) << 4


def _scales(fmt: BlobFormat, groups: Tensor) -> Tensor:
    """[..., p, 1, 16, 1] of groups [..., bytes], in the dtype that they are stored in."""
    first = fmt.parts * fmt.part_bytes
    stored = groups[..., first : first + fmt.scale_bytes].contiguous()
    return stored.view(getattr(torch, str(fmt.scale))).unflatten(-1, (fmt.parts, 1, ROWS, 1))
