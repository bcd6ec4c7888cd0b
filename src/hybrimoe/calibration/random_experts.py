"""Experts of any format that nobody trained, to time kernels on."""

from __future__ import annotations

import numpy as np
import torch

from hybrimoe.formats.gate import Gate
from hybrimoe.formats.layout import Layout, only_files_bring, split
from hybrimoe.formats.registry import named
from hybrimoe.models.weights import NATIVE, ExpertWeights, pack, pack_part

NATIVE_DTYPES = {name: dtype for dtype, name in NATIVE.items()}


def fill_random(fmt: str, layout: Layout, blobs: np.ndarray) -> None:
    """Fill `blobs` [E, expert_bytes] uint8; biases, where there are any, are random too."""
    generator, count = torch.Generator().manual_seed(0), len(blobs)
    dtype = NATIVE_DTYPES.get(fmt, torch.bfloat16)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(count, *shape, generator=generator) * 0.03).to(dtype)

    matrices, hidden, inner = layout.matrices, layout.hidden, layout.inner
    biases = (draw(matrices, inner), draw(hidden)) if layout.bias_at else (None, None)
    up, down = draw(matrices, inner, hidden), draw(hidden, inner)
    weights = ExpertWeights(up, down, Gate(0), *biases)
    if not only_files_bring(fmt):
        pack(fmt, layout, weights, blobs)
        return
    for is_down, part in enumerate(split(fmt)):
        if named(part).pack is None:
            _fill_codes(part, layout, blobs, bool(is_down))
        else:
            pack_part(part, layout, weights, blobs, bool(is_down))


def _fill_codes(fmt: str, layout: Layout, blobs: np.ndarray, is_down: bool) -> None:
    """Any integers, which are made from no floats, and scales that give weights of about 0.03."""
    shards = blobs.reshape(len(blobs), layout.shards, layout.shard_bytes)
    end = layout.down_at + layout.hidden // 16 * layout.down_block
    part = shards[..., layout.down_at : end] if is_down else shards[..., : layout.down_at]
    block, columns = (
        (layout.down_block, layout.width) if is_down else (layout.up_block, layout.hidden)
    )
    kept = named(fmt)
    units = columns // kept.columns
    rng = np.random.default_rng(0)
    each = rng.integers(0, 256, (*part.shape[:2], part.shape[2] // block, units, kept.unit_bytes))
    each = each.astype(np.uint8)
    head = np.full(kept.head_bytes // 2, 5e-5, np.float16)
    each[..., : kept.head_bytes] = head.view(np.uint8)
    padded = np.zeros((*each.shape[:3], block), np.uint8)
    padded[..., : units * kept.unit_bytes] = each.reshape(*each.shape[:3], -1)
    part[...] = padded.reshape(part.shape)
