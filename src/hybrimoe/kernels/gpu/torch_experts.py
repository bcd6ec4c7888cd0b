"""Experts on any torch device from the packed blobs, by torch operations alone.

The complete fallback where Triton is missing, by the contract of `pairs`: a few slots at a
time are unpacked by views and one permute, then multiplied as one batch. Sums are taken slot by
slot, and no slot sees a token twice, so every run gives the same bits. Made to be right everywhere;
its speed is unmeasured.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import gelu, pad, relu

from hybrimoe.formats.base import ROWS
from hybrimoe.formats.decode import decode
from hybrimoe.formats.gate import SOFTCAP, Gate
from hybrimoe.formats.layout import Layout, is_integer, split
from hybrimoe.formats.registry import named
from hybrimoe.kernels.gpu.pairs import Pairs, Put, Run, Slots, by_slot

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


class Layer(NamedTuple):
    """What all batches of one call share."""

    slots: Slots
    dtype: torch.dtype  # of the products
    x: Tensor  # [T, D], padded, in `dtype`
    token: Tensor  # [P] int32, sorted by slot
    weight: Tensor  # [P] float32


def run(slots: Slots, pairs: Pairs, x: Tensor, out: Tensor, put: Put) -> None:
    """out[token] += weight * expert(x[token]) for all pairs: see `pairs`."""
    if not len(pairs.token):
        return
    order, runs = by_slot(pairs)
    columns = (pairs.token[order], pairs.weight[order].view(np.int32))
    token, bits = put(np.concatenate(columns)).chunk(2)
    dtype = compute_dtype(slots.fmt, x)
    wide = pad(x, (0, slots.layout.hidden - x.shape[1])).to(dtype)
    layer = Layer(slots, dtype, wide, token, bits.view(torch.float32))
    for batch in cut_batches(slots.layout, runs, dtype.itemsize):
        y = _run_batch(layer, batch)
        for row, (_, start, count, _, _) in zip(y, batch):
            out.index_add_(0, token[start : start + count], row[:count, : out.shape[1]])


def compute_dtype(fmt: str, x: Tensor) -> torch.dtype:
    """Halves on an accelerator, where their products sum in float32; float32 wherever they would
    lose bits of native weights, and on the CPU, where few machines multiply halves fast."""
    halves = x.dtype in (torch.bfloat16, torch.float16) and x.device.type != "cpu"
    return (
        x.dtype if halves and (is_integer(fmt) or getattr(torch, fmt) == x.dtype) else torch.float32
    )


def cut_batches(layout: Layout, runs: Iterable[Run], itemsize: int) -> Iterator[list[Run]]:
    """Slots with pairs, in order, a few at a time: as many as memory and padding allow."""
    most = UNPACKED_BYTES // ((layout.matrices + 1) * layout.inner * layout.hidden * itemsize)
    batch: list[Run] = []
    for run in runs:
        if run.low >= run.high:
            continue
        counts = [other.count for other in batch] + [run.count]
        padded = len(counts) * max(counts) > PADDING * sum(counts)
        other_shards = bool(batch) and batch[0][3:] != run[3:]
        if batch and (len(counts) > most or padded or other_shards):
            yield batch
            batch = []
        batch.append(run)
    if batch:
        yield batch


def unpack(
    fmt: str, layout: Layout, blobs: Tensor, low: int, high: int, dtype: torch.dtype
) -> Unpacked:
    """Shards [low, high) of the experts in `blobs` [A, expert_bytes], their weights in `dtype`."""
    slots, matrices, tall = len(blobs), layout.matrices, layout.hidden // ROWS
    parts = blobs[:, : layout.shards * layout.shard_bytes].unflatten(
        1, (layout.shards, layout.shard_bytes)
    )[:, low:high]
    ups = parts[..., : layout.down_at].unflatten(-1, (-1, matrices, layout.up_block))
    down_end = layout.down_at + tall * layout.down_block
    downs = parts[..., layout.down_at : down_end].unflatten(-1, (tall, layout.down_block))
    up_fmt, down_fmt = (named(part) for part in split(fmt))
    # up: [A, s, R, M, g, J, 16, N] -> rows of F are (s, R, 16), columns (g, J, N)
    up = decode(up_fmt, ups, layout.hidden, dtype).permute(0, 3, 1, 2, 6, 4, 5, 7)
    # down: [A, s, R, g, J, 16, N] -> rows of D are (R, 16), columns of F (s, g, J, N)
    down = decode(down_fmt, downs, layout.width, dtype).permute(0, 2, 5, 1, 3, 4, 6)
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


def _run_batch(layer: Layer, batch: list[Run]) -> Tensor:
    """Weighted outputs [A, N, D] float32 of the batch's slots, N the pairs of the busiest."""
    (fmt, layout, gate, blobs), device = layer.slots, layer.x.device
    pairs = _pair_table(batch, len(layer.token), device)  # [A, N]
    packed = _rows(blobs, [run.slot for run in batch])
    experts = unpack(fmt, layout, packed, batch[0].low, batch[0].high, layer.dtype)
    x = layer.x[layer.token[pairs]]  # [A, N, D]
    up = torch.bmm(x, experts.up.flatten(1, 2).transpose(1, 2)).float()  # [A, N, M * F]
    up = up.unflatten(2, (layout.matrices, -1))
    if experts.up_bias is not None:
        up = up + experts.up_bias[:, None]
    second = up[:, :, 1] if layout.matrices == 2 else torch.ones_like(up[:, :, 0])
    h = apply_gate(gate, up[:, :, 0], second)  # [A, N, F]
    y = torch.bmm(h.to(layer.dtype), experts.down.transpose(1, 2)).float()  # [A, N, D]
    if experts.down_bias is not None:
        y = y + experts.down_bias[:, None]
    return y * layer.weight[pairs][..., None]


def _pair_table(batch: list[Run], pairs: int, device: torch.device) -> Tensor:
    """Pairs of each slot [A, N]; a slot with fewer pairs goes on with its neighbour's."""
    most, start = max(run.count for run in batch), batch[0].start
    if len(batch) == 1:
        return torch.arange(start, start + most, device=device)[None]
    starts = torch.tensor([run.start for run in batch], device=device)
    return (starts[:, None] + torch.arange(most, device=device)).clamp(max=pairs - 1)


def _rows(tensor: Tensor, rows: list[int]) -> Tensor:
    """Some rows of a tensor, without a copy where they follow each other."""
    first, last = rows[0], rows[-1]
    if last - first + 1 == len(rows):
        return tensor[first : last + 1]
    return tensor[torch.tensor(rows, device=tensor.device)]
