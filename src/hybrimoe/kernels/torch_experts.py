"""Experts on any torch device from the packed blobs, by torch operations alone.

The complete fallback where Triton is missing: a few slots at a time are unpacked by views and one
permute, then multiplied as one batch. Sums are taken slot by slot, so as long as no slot sees a
token twice, every run gives the same bits. Made to be right everywhere; its speed is unmeasured.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import gelu, pad, relu

from hybrimoe.kernels.activations import SOFTCAP, Gate
from hybrimoe.kernels.layout import BLOCK_BYTES, GROUP, QUANTIZED, ROWS, Layout

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
NUMBERS = {"int4": 8, "int8": 4, "bfloat16": 2, "float16": 1, "float32": 1}
"""Columns of one row that lie side by side before the next of the 16 interleaved rows."""
UNPACKED_BYTES = 256 << 20
"""Unpacked weights that one batch of slots may take."""
PADDING = 2
"""How often a batch may compute as many rows as there are pairs: slots pad to the busiest one."""


class Unpacked(NamedTuple):
    """Experts of A slots as plain matrices, D and F padded; F may be of a few shards only."""

    up: Tensor  # [A, M, F, D]
    down: Tensor  # [A, D, F]
    up_bias: Tensor | None  # [A, M, F] float32
    down_bias: Tensor | None  # [A, D] float32; zero but in the first shard


class Batch(NamedTuple):
    """Slots computed together, and where the pairs of each begin and how many there are."""

    slots: list[int]
    starts: list[int]
    counts: list[int]
    shards: tuple[int, int]


class Layer(NamedTuple):
    """What all batches of one call share."""

    fmt: str
    layout: Layout
    gate: Gate
    blobs: Tensor  # [S, expert_bytes] uint8
    dtype: torch.dtype  # of the products
    x: Tensor  # [T, D], padded, in `dtype`
    token: Tensor  # [P]
    weight: Tensor  # [P]
    masks: Tensor | None  # [S, 2], shards to keep after computing all


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
) -> None:
    """out[token[p]] += weight[p] * expert(slot[p])(x[token[p]]) for every pair p.

    blobs [S, expert_bytes] uint8; x [T, D] in any float dtype; token, slot [P] int32, sorted by
    slot; weight [P] float32; out [T, D] float32. Shapes and ids are the caller's to check.
    shards: [S, 2] int32, the range of shards of each slot's expert to sum. On the host, only these
    are unpacked; on another device, reading it would stall, so all are computed and some masked.
    counts: pairs of each slot, [S] on the host. Without it a device is asked, which stalls.
    """
    if not len(slot):
        return
    if counts is None:
        # sync: the host cuts the batches; callers that know their routing pass counts.
        counts = torch.bincount(slot, minlength=len(blobs)).tolist()
    dtype = compute_dtype(fmt, x)
    wide = pad(x, (0, layout.hidden - x.shape[1])).to(dtype)
    masks = None if shards is None or _on_host(shards) else shards
    ranges = None if shards is None or masks is not None else shards.tolist()
    layer = Layer(fmt, layout, gate, blobs, dtype, wide, token, weight, masks)
    for batch in cut_batches(layout, counts, ranges, dtype.itemsize):
        y = _run_batch(layer, batch)
        for row, start, count in zip(y, batch.starts, batch.counts):
            pairs = slice(start, start + count)
            out.index_add_(0, token[pairs], row[:count, : out.shape[1]])


def compute_dtype(fmt: str, x: Tensor) -> torch.dtype:
    """Halves on an accelerator, where their products sum in float32; float32 wherever they would
    lose bits of native weights, and on the CPU, where few machines multiply halves fast."""
    halves = x.dtype in (torch.bfloat16, torch.float16) and x.device.type != "cpu"
    return x.dtype if halves and (fmt in QUANTIZED or DTYPES[fmt] == x.dtype) else torch.float32


def cut_batches(
    layout: Layout, counts: list[int], ranges: list[list[int]] | None, itemsize: int
) -> Iterator[Batch]:
    """Slots with pairs, in order, a few at a time: as many as memory and padding allow."""
    most = UNPACKED_BYTES // ((layout.matrices + 1) * layout.inner * layout.hidden * itemsize)
    batch, start = Batch([], [], [], (0, 0)), 0
    for slot, count in enumerate(counts):
        low, high = (0, layout.shards) if ranges is None else ranges[slot]
        if count and low < high:
            joined = [*batch.counts, count]
            padded = len(joined) * max(joined) > PADDING * sum(joined)
            if batch.slots and (len(joined) > most or padded or batch.shards != (low, high)):
                yield batch
                batch = Batch([], [], [], (0, 0))
            batch = Batch(
                [*batch.slots, slot],
                [*batch.starts, start],
                [*batch.counts, count],
                (low, high),
            )
        start += count
    if batch.slots:
        yield batch


def unpack(
    fmt: str, layout: Layout, blobs: Tensor, low: int, high: int, dtype: torch.dtype
) -> Unpacked:
    """Shards [low, high) of the experts in `blobs` [A, expert_bytes], their weights in `dtype`."""
    slots, matrices, tall = len(blobs), layout.matrices, layout.hidden // ROWS
    parts = blobs.unflatten(1, (layout.shards, layout.shard_bytes))[:, low:high]
    ups = parts[..., : layout.down_at].unflatten(-1, (-1, matrices, layout.up_block))
    down_end = layout.down_at + tall * layout.down_block
    downs = parts[..., layout.down_at : down_end].unflatten(-1, (tall, layout.down_block))
    # up: [A, s, R, M, g, J, 16, N] -> rows of F are (s, R, 16), columns (g, J, N)
    up = _numbers(fmt, ups, layout.hidden, dtype).permute(0, 3, 1, 2, 6, 4, 5, 7)
    # down: [A, s, R, g, J, 16, N] -> rows of D are (R, 16), columns of F (s, g, J, N)
    down = _numbers(fmt, downs, layout.width, dtype).permute(0, 2, 5, 1, 3, 4, 6)
    up_bias = down_bias = None
    if layout.bias_at:
        middle = layout.bias_at + 4 * matrices * layout.width
        floats = parts[..., layout.bias_at : middle].view(torch.float32)
        up_bias = floats.unflatten(-1, (matrices, -1)).transpose(1, 2).flatten(2)
        rest = parts[..., middle : middle + 4 * layout.hidden].view(torch.float32)
        down_bias = rest.sum(1)
    return Unpacked(
        up.reshape(slots, matrices, -1, layout.hidden),
        down.reshape(slots, layout.hidden, -1),
        up_bias,
        down_bias,
    )


def apply_gate(gate: Gate, g: Tensor, u: Tensor) -> Tensor:
    """The formula of `Gate`; clamps keep NaN, as torch does."""
    if gate.kind == SOFTCAP:
        capped = gate.alpha * torch.tanh(g / gate.alpha) * torch.sigmoid(g)
        return capped * gate.limit * torch.tanh(u / gate.limit)
    g, u = g.clamp(max=gate.limit), u.clamp(-gate.limit, gate.limit) + gate.offset
    acts = (
        lambda x: x * torch.sigmoid(gate.alpha * x),
        gelu,
        lambda x: gelu(x, approximate="tanh"),
        relu,
        lambda x: relu(x).square(),
    )
    return acts[gate.kind](g) * u


def _run_batch(layer: Layer, batch: Batch) -> Tensor:
    """Weighted outputs [A, N, D] float32 of the batch's slots, N the pairs of the busiest."""
    layout, device = layer.layout, layer.x.device
    pairs = _pair_table(batch, len(layer.token), device)  # [A, N]
    blobs = _rows(layer.blobs, batch.slots)
    low, high = batch.shards
    experts = unpack(layer.fmt, layout, blobs, low, high, layer.dtype)
    x = layer.x[layer.token[pairs]]  # [A, N, D]
    up = torch.bmm(x, experts.up.flatten(1, 2).transpose(1, 2)).float()  # [A, N, M * F]
    up = up.unflatten(2, (layout.matrices, -1))
    if experts.up_bias is not None:
        up = up + experts.up_bias[:, None]
    second = up[:, :, 1] if layout.matrices == 2 else torch.ones_like(up[:, :, 0])
    h = apply_gate(layer.gate, up[:, :, 0], second)  # [A, N, F]
    bias = experts.down_bias
    if layer.masks is not None:
        limits = _rows(layer.masks, batch.slots)
        h, bias = _mask(layout, h, bias, limits[:, :1], limits[:, 1:])
    y = torch.bmm(h.to(layer.dtype), experts.down.transpose(1, 2)).float()  # [A, N, D]
    if bias is not None:
        y = y + bias[:, None]
    return y * layer.weight[pairs][..., None]


def _on_host(tensor: Tensor) -> bool:
    """Whether reading a tensor stalls no device."""
    return tensor.device.type == "cpu"


def _mask(
    layout: Layout, h: Tensor, bias: Tensor | None, low: Tensor, high: Tensor
) -> tuple[Tensor, Tensor | None]:
    """h [A, N, F] and the down bias without the shards outside [low, high), both [A, 1]."""
    shard = torch.arange(h.shape[2], device=h.device) // layout.width
    kept = (shard >= low) & (shard < high)  # [A, F]
    h = h.masked_fill(~kept[:, None], 0)  # not a product: 0 times inf is NaN
    return h, None if bias is None else bias.masked_fill((low > 0) | (high < 1), 0)


def _pair_table(batch: Batch, pairs: int, device: torch.device) -> Tensor:
    """Pairs of each slot [A, N]; a slot with fewer pairs goes on with its neighbour's."""
    most = max(batch.counts)
    if len(batch.slots) == 1:
        return torch.arange(batch.starts[0], batch.starts[0] + most, device=device)[None]
    starts = torch.tensor(batch.starts, device=device)
    return (starts[:, None] + torch.arange(most, device=device)).clamp(max=pairs - 1)


def _rows(tensor: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a tensor, without a copy where they follow each other."""
    first, last = rows[0], rows[-1]
    if last - first + 1 == len(rows):
        return tensor[first : last + 1]
    return tensor[torch.tensor(rows, device=tensor.device)]


def _numbers(fmt: str, blocks: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Blocks [..., block bytes] as numbers [..., g, J, 16, N]: column J * N + n of group g."""
    scale_bytes = 2 * ROWS if fmt in QUANTIZED else 0
    weight_bytes, groups = ROWS * BLOCK_BYTES[fmt], columns // GROUP
    units = blocks[..., : groups * (weight_bytes + scale_bytes)].unflatten(-1, (groups, -1))
    raw, inside = units[..., :weight_bytes], (-1, ROWS, NUMBERS[fmt])
    if fmt not in QUANTIZED:
        return raw.view(DTYPES[fmt]).to(dtype).unflatten(-1, inside)
    if fmt == "int4":  # four bytes of a row: their low nibbles, then their high nibbles
        raw = raw.unflatten(-1, (-1, ROWS, 4))
        ints = torch.cat([raw & 15, raw >> 4], -1).to(dtype) - 8
    else:
        ints = raw.view(torch.int8).to(dtype).unflatten(-1, inside)
    scales = units[..., weight_bytes:].view(torch.float16).to(dtype)  # [..., g, 16]
    return ints * scales[..., None, :, None]
