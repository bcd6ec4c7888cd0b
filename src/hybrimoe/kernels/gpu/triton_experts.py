"""Experts on a GPU from the packed blobs, by Triton; the contract is that of `pairs`.

Few pairs (decode) take the two launches of `triton_decode`, whatever the number of experts; many
(prefill) take the tiles of `triton_prefill` and one more. Written for Ampere and later, compiled for
sm_80, sm_89 and sm_90 and checked in Triton's interpreter; speed is unmeasured, and `TILES` and the
constants beside it are estimates. Layers of formats that `is_read` denies, such as K types, run
by `torch_experts`, which dequantizes them.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrimoe.errors import HybriMoEError
from hybrimoe.formats.base import BYTES, GROUP, NIBBLES, ROWS, BlobFormat
from hybrimoe.formats.layout import Layout, is_integer, split
from hybrimoe.formats.registry import named
from hybrimoe.kernels.gpu import torch_experts
from hybrimoe.kernels.gpu.pairs import Pairs, Put, Run, Slots, begins, by_slot
from hybrimoe.kernels.gpu.triton_decode import down_tokens, up_pairs
from hybrimoe.kernels.gpu.triton_prefill import down_tiles, sum_pairs, up_tiles
from hybrimoe.kernels.gpu.triton_units import triton

MOST_PAIRS = 128
"""Up to here every pair reads its own weights; beyond, pairs of a slot share them in tiles."""
IN_FLIGHT = 8192
"""Bytes of weights that a decode program has in flight: 64 for each of its 128 threads."""
BLOCKS, GROUPS = 4, 2
"""Blocks of 16 rows in a prefill tile, and groups of 32 columns in one step of its product."""
TILES = {
    "ieee": ((16, 16, 4), (64, 32, 4), (1 << 62, 64, 8)),
    "tf32x3": ((16, 16, 4), (1 << 62, 32, 8)),
}
"""(mean pairs per slot up to which, pairs per tile, warps) by the product; larger ones spill."""
WIDE = 512
"""Outputs of one token that one program sums over its pairs."""


class TritonMissingError(HybriMoEError, ImportError):
    """Triton cannot be imported; `torch_experts` computes the same without it."""


def available() -> bool:
    """Whether `run` can be called at all: Triton is installed."""
    return triton is not None


def run(
    slots: Slots, pairs: Pairs, x: Tensor, out: Tensor, put: Put, tiled: bool | None = None
) -> None:
    """out[token] += weight * expert(x[token]) for all pairs: see `pairs`.

    tiled: which path to take; None decides by the number of pairs.
    """
    if triton is None:
        raise TritonMissingError("triton_experts.run needs Triton: pip install triton")
    if not len(pairs.token):
        return
    if slots.blobs.data_ptr() % 16:
        raise ValueError("blobs must start on a multiple of 16 bytes")
    if not all(is_read(named(fmt)) for fmt in split(slots.fmt)):
        torch_experts.run(slots, pairs, x, out, put)
        return
    launch = (
        _run_tiles if tiled or (tiled is None and len(pairs.token) > MOST_PAIRS) else _run_pairs
    )
    launch(slots, pairs, x, out, put)


def is_read(fmt: BlobFormat) -> bool:
    """Whether these kernels read a format: plain numbers, or codes with one float16 scale per group."""
    if fmt.is_native:
        return True
    plain = not fmt.shared and not fmt.extra_bits and not fmt.minimum and fmt.parts == 1
    known = {NIBBLES: 8, BYTES: 0}.get(fmt.codes) == fmt.zero and fmt.run == 4
    return plain and known and fmt.scale == "float16"


def _run_pairs(slots: Slots, pairs: Pairs, x: Tensor, out: Tensor, put: Put) -> None:
    layout, gate, count = slots.layout, slots.gate, len(pairs.token)
    (up, units), (down, wider) = (
        (_constants(fmt, layout, gate.kind, x.shape[1]), IN_FLIGHT // named(fmt).part_bytes)
        for fmt in split(slots.fmt)
    )
    words, table = slots.blobs.view(torch.int32), put(_packed(pairs, begins(pairs, len(x))))
    h = torch.empty((count, layout.inner), dtype=torch.float32, device=x.device)
    # A token's outputs make few programs, so each of them gets twice the threads.
    up_pairs[(count, layout.inner // ROWS)](
        words, x, table, h, count, gate.alpha, gate.limit, gate.offset,
        **up, UNITS=units, num_warps=4,
    )  # fmt: skip
    down_tokens[(len(x), layout.hidden // ROWS)](
        words, table, h, out, count, **down, UNITS=2 * wider, num_warps=8
    )


def _run_tiles(slots: Slots, pairs: Pairs, x: Tensor, out: Tensor, put: Put) -> None:
    layout, gate, count, tokens = slots.layout, slots.gate, len(pairs.token), len(x)
    order, runs = by_slot(pairs)
    dtype, precision = product(slots.fmt, x)
    size, warps = tile_size(runs, precision)
    first = tile_starts(runs, size)
    place = np.empty(count, np.int32)
    place[order] = np.arange(count, dtype=np.int32)  # of each pair, once they are sorted by slot
    sorted_pairs = Pairs(*(column[order] for column in pairs))
    words = slots.blobs.view(torch.int32)
    table = put(_packed(sorted_pairs, place, begins(pairs, tokens), first))
    h = torch.empty((count, layout.inner), dtype=dtype, device=x.device)
    y = torch.empty((count, out.shape[1]), dtype=torch.float32, device=x.device)
    tiling = {
        "PRECISION": precision, "TILE": size, "BLOCKS": BLOCKS, "GROUPS": GROUPS, "num_warps": warps,
    }  # fmt: skip
    up, down = (_constants(fmt, layout, gate.kind, x.shape[1]) | tiling for fmt in split(slots.fmt))
    up_tiles[(-(-layout.inner // (BLOCKS * ROWS)), len(first))](
        words, x, table, h, count, tokens, gate.alpha, gate.limit, gate.offset, **up
    )
    down_tiles[(-(-layout.hidden // (BLOCKS * ROWS)), len(first))](
        words, h, table, y, count, tokens, **down
    )
    sum_pairs[(tokens, -(-out.shape[1] // WIDE))](
        y, table, out, count, D=out.shape[1], BLOCK=WIDE, num_warps=4
    )


def tile_size(runs: list[Run], precision: str) -> tuple[int, int]:
    """Pairs per tile, and warps, for what slots have on average."""
    mean = sum(run.count for run in runs) / len(runs)
    return next((size, warps) for most, size, warps in TILES[precision] if mean <= most)


def tile_starts(runs: list[Run], size: int) -> np.ndarray:
    """[N] first pair of each tile: up to `size` pairs, all of one slot."""
    starts = [np.arange(run.start, run.start + run.count, size, dtype=np.int32) for run in runs]
    return np.concatenate(starts)


def _packed(pairs: Pairs, *more: np.ndarray) -> np.ndarray:
    """Everything the kernels must know of the pairs, as one int32 array: one transfer."""
    columns = (pairs.token, pairs.slot, pairs.weight.view(np.int32), pairs.low, pairs.high)
    return np.concatenate([*columns, *more], dtype=np.int32, casting="unsafe")


def product(fmt: str, x: Tensor) -> tuple[torch.dtype, str]:
    """What a prefill multiplies, and how: halves where that loses nothing of native weights, else
    float32 as three products on tensor cores, whose NMSE stays below 1e-10."""
    halves = x.dtype != torch.float32 and (is_integer(fmt) or getattr(torch, fmt) == x.dtype)
    if halves and x.dtype == torch.bfloat16 and triton.knobs.runtime.interpret:
        halves = False  # the interpreter multiplies bfloat16 as its bits
    return (x.dtype, "ieee") if halves else (torch.float32, "tf32x3")


@functools.lru_cache(maxsize=256)
def _constants(fmt: str, layout: Layout, kind: int, hidden: int) -> dict[str, Any]:
    """What is compiled in: constant strides tell Triton that 16-byte loads are aligned.

    COLUMNS and WIDTH count groups of 32 of D and of a shard's F; all strides count words.
    """
    kept = named(fmt)
    return {
        "CODES": kept.codes,
        "KIND": kind,
        "N": kept.neighbours,
        "D": hidden,
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
        "UNIT": kept.unit_bytes // 4,
    }
