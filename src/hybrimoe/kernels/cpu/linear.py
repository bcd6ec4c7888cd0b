"""A dense layer's matrix times a batch of tokens, by the loops that the experts use.

The packed matrix is the down projection of an expert that has nothing else: one shard, no gate and
no up rows. So `pack.py` packs it, and `rows` computes it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hybrimoe.formats.base import GROUP, LINE, ROWS
from hybrimoe.formats.layout import Layout
from hybrimoe.formats.registry import TAGS, activation_bytes, named, quantize, rows
from hybrimoe.kernels.cpu.experts import MAX_TILE_TOKENS, T1, T2, T4, T8, deepest
from hybrimoe.kernels.cpu.run_layer import SMALL, check_array
from hybrimoe.kernels.cpu.workspace import Workspace
from hybrimoe.simd.dtypes import DTYPES, narrow, widen
from hybrimoe.simd.isa import HOST_ISA, ISA_TAGS
from hybrimoe.simd.jit import inlined, inner, kernel
from hybrimoe.simd.threads import fork_join, launch
from hybrimoe.simd.vectors import following_rows, load_f32, no_floats, splat_tile, store_tile, take


class PackedMatrix(NamedTuple):
    """y = W x + b, ready to compute."""

    fmt: str
    layout: Layout
    shape: tuple[int, int]  # [N, K], not padded
    blob: np.ndarray  # [expert_bytes] uint8
    bias: np.ndarray  # [N padded] float32, or empty


class Buffers(NamedTuple):
    """Scratch of one launch with T tokens."""

    counters: np.ndarray  # [8] int64: the next token, worker and tile
    x: np.ndarray  # [T * activation_bytes(K)] uint8
    floats: np.ndarray  # [threads, K padded] float32
    block: np.ndarray  # [threads, MAX_TILE_TOKENS * 16] float32


def matrix_layout(fmt: str, outputs: int, inputs: int) -> Layout:
    """The layout of a matrix [N, K] with N = `outputs`, K = `inputs`."""
    outputs, inputs = -(-outputs // GROUP) * GROUP, -(-inputs // GROUP) * GROUP
    block = named(fmt).block_bytes(inputs)
    size = -(-outputs // ROWS * block // LINE) * LINE
    return Layout(outputs, inputs, 1, 0, 0, block, 0, 0, size, size)


def prepare(
    workspace: Workspace, matrix: PackedMatrix, tokens: int, threads: int
) -> tuple[int, int, Buffers]:
    """Threads, 16-row blocks per tile, and buffers for T = `tokens`."""
    layout, take = matrix.layout, workspace.take
    threads = 1 if layout.expert_bytes * max(1, tokens // 8) < SMALL else threads
    # Long runs of rows keep memory streaming; several tiles per thread even out their speed.
    chunk = min(64, max(1, layout.hidden // ROWS // (8 * threads)))
    size = activation_bytes(matrix.fmt, layout.width)
    buffers = Buffers(
        np.zeros(8, np.int64),
        take("x", tokens * size, np.uint8),
        take("floats", threads * layout.width, np.float32).reshape(threads, -1),
        take("block", threads * MAX_TILE_TOKENS * ROWS, np.float32).reshape(threads, -1),
    )
    return threads, chunk, buffers


def run_linear(
    matrix: PackedMatrix,
    x: np.ndarray,
    out: np.ndarray,
    workspace: Workspace,
    dtype: str = "float32",
    threads: int | None = None,
    isa: str | None = None,
) -> None:
    """out [T, N] = x [T, K] @ W.T + b, both in `dtype` (bfloat16 and float16 as uint16 bits).

    C-contiguous. Raises RoutingError before anything runs if a shape does not fit.
    """
    number = np.dtype(np.float32 if dtype == "float32" else np.uint16)
    outputs, inputs = matrix.shape
    check_array("x", x, (len(x), inputs), number)
    check_array("out", out, (len(x), outputs), number)
    tags = ISA_TAGS[isa or HOST_ISA], TAGS[matrix.fmt], DTYPES[dtype]
    with launch.lock:
        team, tokens = launch.threads(threads), len(x)
        key = (matrix.fmt, matrix.layout, tokens, team)
        team, chunk, buffers = workspace.launch(key, prepare, matrix, tokens, team)
        multiply(*tags, team, chunk, matrix.layout, matrix.blob, matrix.bias, x, out, buffers)


@kernel
def multiply(isa, fmt, dtype, threads, chunk, layout, blob, bias, x, out, buffers):
    """out [T, N] = x [T, K] times the packed rows, plus the bias where there is one."""
    buffers.counters[:] = 0
    stride = buffers.x.size // x.shape[0]
    few = min(threads, x.shape[0] // 8 + 1)
    fork_join(few, quantize_worker, (fmt, dtype, layout, stride, x, buffers))
    buffers.counters[1] = 0
    fork_join(
        threads, rows_worker, (isa, fmt, dtype, chunk, layout, stride, blob, bias, out, buffers)
    )


@inner
def quantize_worker(fmt, dtype, layout, stride, x, buffers):
    """Tokens into the form `rows` wants, padded with zeros."""
    floats = buffers.floats[take(buffers.counters, 1)]
    t, tokens = take(buffers.counters, 0), x.shape[0]
    while t < tokens:
        for d in range(x.shape[1]):
            floats[d] = widen(dtype, x[t, d])
        floats[x.shape[1] :] = 0
        for g in range(layout.width // 32):
            quantize(fmt, floats, g * 32, buffers.x, t * stride, g)
        t = take(buffers.counters, 0)


@inner
def rows_worker(isa, fmt, dtype, chunk, layout, stride, blob, bias, out, buffers):
    """One tile is `chunk` blocks of 16 rows, for all tokens."""
    block = buffers.block[take(buffers.counters, 1)]
    blocks = layout.hidden // 16
    tile = take(buffers.counters, 2)
    while tile * chunk < blocks:
        for b in range(tile * chunk, min((tile + 1) * chunk, blocks)):
            t, tokens = 0, out.shape[0]
            while t < tokens:
                depth = deepest(tokens - t)
                if depth == 8:
                    sixteen_rows(T8, isa, fmt, layout, stride, blob, bias, b, t, block, buffers)
                elif depth == 4:
                    sixteen_rows(T4, isa, fmt, layout, stride, blob, bias, b, t, block, buffers)
                elif depth == 2:
                    sixteen_rows(T2, isa, fmt, layout, stride, blob, bias, b, t, block, buffers)
                else:
                    sixteen_rows(T1, isa, fmt, layout, stride, blob, bias, b, t, block, buffers)
                for i in range(depth):
                    for n in range(b * 16, min(b * 16 + 16, out.shape[1])):
                        out[t + i, n] = narrow(dtype, block[i * 16 + n - b * 16])
                t += depth
        tile = take(buffers.counters, 2)


@inlined
def sixteen_rows(tag, isa, fmt, layout, stride, blob, bias, b, t, block, buffers):
    """Sixteen rows times a few tokens into `block`."""
    x = following_rows(tag, buffers.x, t, stride)
    start = no_floats()
    if bias.size:
        start = load_f32(bias.view(np.uint8), b * 64)
    total = splat_tile(tag, start)
    total = rows(fmt, isa, total, blob, b * layout.down_block, layout.width // 32, x, 0)
    store_tile(total, block, 0, 64)
