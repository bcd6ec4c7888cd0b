"""The public door to the expert kernels: checks once, then launches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hybrimoe.errors import RoutingError
from hybrimoe.formats.gate import Gate
from hybrimoe.formats.layout import Layout, split
from hybrimoe.formats.registry import TAGS, activation_bytes
from hybrimoe.kernels.cpu.experts import (
    MAX_TILE_TOKENS,
    Scratch,
    Strides,
    ids_in_range,
    run_experts,
)
from hybrimoe.kernels.cpu.workspace import Workspace
from hybrimoe.simd.dtypes import DTYPES
from hybrimoe.simd.isa import HOST_ISA, ISA_TAGS
from hybrimoe.simd.threads import launch

LONGEST = 1024
"""Tokens of one launch: more would only grow the scratch buffers."""
SMALL = 1 << 18
"""Weight bytes below which waking other threads costs more than they bring."""


class BlankPairsError(RoutingError):
    """Some pairs of a token and an expert name none: a launch cannot leave them out.

    Whoever can tell which pairs are left computes those alone.
    """


class PackedLayer(NamedTuple):
    """The experts of one layer, ready to compute."""

    fmt: str  # of all matrices, or "up+down": see `layout.split`
    layout: Layout
    gate: Gate
    hidden: int  # D, not padded
    blobs: np.ndarray  # [N, expert_bytes] uint8; N = E unless `place` is given
    place: np.ndarray | None = None  # [E] int32, the row of each expert; None: expert e is row e

    @property
    def experts(self) -> int:
        """E, of which not all need to be in `blobs`."""
        return len(self.blobs if self.place is None else self.place)


class Launch(NamedTuple):
    """What a launch needs besides its inputs; the same for every launch of one size."""

    threads: int
    strides: Strides
    shards: np.ndarray  # [E, 2] int32: all shards of every expert
    place: np.ndarray  # [E] int32: every expert in its own row
    scratch: Scratch


def prepare(workspace: Workspace, layer: PackedLayer, tokens: int, k: int, threads: int) -> Launch:
    """Everything for a launch of T = `tokens`, K = `k`."""
    layout, experts = layer.layout, layer.experts
    touched = min(tokens * k, experts) * layout.expert_bytes * max(1, tokens // 8)
    threads = 1 if touched < SMALL else threads
    # Long runs of down rows keep memory streaming: two tiles per thread, at most 512 rows.
    chunk = min(32, max(1, layout.hidden // 16 // (2 * threads)))
    up, down = split(layer.fmt)
    x, h = activation_bytes(up, layout.hidden), activation_bytes(down, layout.inner)
    shards, take = np.empty((experts, 2), np.int32), workspace.take
    shards[:] = 0, layout.shards
    scratch = Scratch(
        np.zeros(8, np.int64),
        take("offsets", experts + 1, np.int32),
        take("active", experts, np.int32),
        take("token", tokens * k, np.int32),
        take("weight", tokens * k, np.float32),
        take("x", tokens * x, np.uint8),
        take("h", tokens * k * h, np.uint8),
        take("sums", tokens * layout.hidden, np.float32).reshape(tokens, layout.hidden),
        take("block", threads * MAX_TILE_TOKENS * 64, np.float32).reshape(threads, -1),
    )
    place = np.arange(experts, dtype=np.int32)
    return Launch(threads, Strides(x, h, chunk), shards, place, scratch)


def run_layer(
    layer: PackedLayer,
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    out: np.ndarray,
    workspace: Workspace,
    dtype: str = "float32",
    threads: int | None = None,
    shards: np.ndarray | None = None,
    isa: str | None = None,
    add: bool = False,
) -> None:
    """out[t] = sum over k of weights[t, k] * expert[ids[t, k]](x[t]).

    x, out [T, D] in `dtype` (bfloat16 and float16 as uint16 bits), ids [T, K] int64, weights [T, K]
    float32, shards [E, 2] int32 or None for all of every expert. All C-contiguous. Raises
    RoutingError before anything runs if an id is not in [0, E); see `check_arguments`.

    add: the sums go on from what `out` holds. In float32, launches over experts in rising order then
    give the very bits of one launch over all of them.
    """
    check_arguments(layer, x, ids, weights, out, dtype, shards)
    up, down = split(layer.fmt)
    tag, fmt, kind = ISA_TAGS[isa or HOST_ISA], (TAGS[up], TAGS[down]), DTYPES[dtype]
    with launch.lock:
        for start in range(0, len(x), LONGEST):
            part = slice(start, start + LONGEST)
            tokens, k = ids[part].shape
            team = launch.threads(threads)
            key = (layer.fmt, layer.layout, layer.experts, tokens, k, team)
            go = workspace.launch(key, prepare, layer, tokens, k, team)
            # fmt: off
            run_experts(tag, fmt, kind, go.threads, layer.layout, go.strides, layer.gate,
                        layer.blobs, go.place if layer.place is None else layer.place,
                        x[part], ids[part], weights[part],
                        go.shards if shards is None else shards, out[part], int(add), go.scratch)
            # fmt: on


def check_arguments(
    layer: PackedLayer,
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    out: np.ndarray,
    dtype: str,
    shards: np.ndarray | None = None,
) -> None:
    """Raise unless a launch is safe: a kernel checks nothing and a bad index would crash.

    BlankPairsError if all that is wrong are ids E with weight 0, by which transformers' routers mark
    a pair that contributes nothing here; a RoutingError of the plain kind otherwise.
    """
    if dtype not in DTYPES:
        raise RoutingError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if x.ndim != 2 or ids.ndim != 2:
        raise RoutingError(f"x and ids must have two dimensions, got {x.shape} and {ids.shape}")
    number = np.dtype(np.float32 if dtype == "float32" else np.uint16)
    shape, experts = (len(x), layer.hidden), layer.experts
    check_array("x", x, shape, number)
    check_array("out", out, shape, number)
    check_array("ids", ids, (len(x), ids.shape[-1]), np.dtype(np.int64))
    check_array("weights", weights, ids.shape, np.dtype(np.float32))
    if shards is not None:
        check_array("shards", shards, (experts, 2), np.dtype(np.int32))
        if not 0 <= shards.min() <= shards.max() <= layer.layout.shards:
            raise RoutingError(
                f"shards must lie in [0, {layer.layout.shards}], got "
                f"[{shards.min()}, {shards.max()}]"
            )
    if layer.place is not None:
        check_array("place", layer.place, (experts,), np.dtype(np.int32))
        if not 0 <= layer.place.min() <= layer.place.max() < len(layer.blobs):
            raise RoutingError(
                f"place must name rows in [0, {len(layer.blobs)}), got {layer.place}"
            )
    if not ids_in_range(ids, experts):
        raise _outside(ids, weights, experts)


def _outside(ids: np.ndarray, weights: np.ndarray, experts: int) -> RoutingError:
    """What is wrong with ids of which some are not in [0, experts)."""
    blank = (ids == experts) & (weights == 0)
    bad = ids[((ids < 0) | (ids >= experts)) & ~blank]
    rule = f"expert ids must lie in [0, {experts}), got"
    if bad.size:
        return RoutingError(f"{rule} {bad[0]}")
    return BlankPairsError(f"{rule} {experts} with weight 0")


def check_array(name: str, array: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """Raise RoutingError unless an array is what a kernel takes it for."""
    if array.shape != shape or array.dtype != dtype or not array.flags.c_contiguous:
        raise RoutingError(
            f"{name} must be a contiguous {dtype} array of shape {shape}, got "
            f"{array.dtype} {array.shape}"
        )
