"""The public door to the expert kernels: checks once, then launches."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hybrimoe.errors import RoutingError
from hybrimoe.kernels.activations import Gate
from hybrimoe.kernels.dtypes import DTYPES
from hybrimoe.kernels.experts import DEEPEST, Scratch, Strides, run_experts
from hybrimoe.kernels.layout import Layout
from hybrimoe.kernels.rows import FORMATS, activation_bytes
from hybrimoe.kernels.simd import Tag, detect_isa
from hybrimoe.kernels.threads import launch

LONGEST = 1024
"""Tokens of one launch: more would only grow the scratch buffers."""
SMALL = 1 << 18
"""Weight bytes below which waking other threads costs more than they bring."""


class PackedLayer(NamedTuple):
    """The experts of one layer, ready to compute."""

    fmt: str
    layout: Layout
    gate: Gate
    hidden: int  # D, not padded
    blobs: np.ndarray  # [E, expert_bytes] uint8


class Workspace:
    """Scratch buffers that all layers share; they grow to the largest launch and stay."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}
        self.counters = np.zeros(8, np.int64)

    def take(self, name: str, size: int, dtype: type) -> np.ndarray:
        """A flat array of `size` numbers; its content is whatever was there before."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.size < size:
            buffer = self._buffers[name] = np.empty(size, dtype)
        return buffer[:size]

    def scratch(self, layer: PackedLayer, tokens: int, pairs: int, threads: int) -> Scratch:
        """Buffers for one launch, as `experts.Scratch` describes them."""
        layout, experts = layer.layout, layer.blobs.shape[0]
        return Scratch(
            self.counters,
            self.take("offsets", experts + 1, np.int32),
            self.take("active", experts, np.int32),
            self.take("token", pairs, np.int32),
            self.take("weight", pairs, np.float32),
            self.take("x", tokens * activation_bytes(layer.fmt, layout.hidden), np.uint8),
            self.take("h", pairs * activation_bytes(layer.fmt, layout.inner), np.uint8),
            self.take("sums", tokens * layout.hidden, np.float32).reshape(tokens, layout.hidden),
            self.take("block", threads * DEEPEST * 64, np.float32).reshape(threads, -1),
        )


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
) -> None:
    """out[t] = sum over k of weights[t, k] * expert[ids[t, k]](x[t]).

    x, out [T, D] in `dtype` (bfloat16 and float16 as uint16 bits), ids [T, K] int64, weights [T, K]
    float32, shards [E, 2] int32 or None for all of every expert. All C-contiguous. Raises
    RoutingError before anything runs if an id is not in [0, E).
    """
    check_arguments(layer, x, ids, weights, out, dtype)
    if shards is None:
        shards = np.empty((layer.blobs.shape[0], 2), np.int32)
        shards[:] = 0, layer.layout.shards
    wanted = launch.threads(threads)
    touched = min(ids.size, layer.blobs.shape[0]) * layer.layout.expert_bytes
    wanted = 1 if touched * max(1, x.shape[0] // 8) < SMALL else wanted
    tag, fmt, kind = ISA_TAGS[isa or HOST_ISA], FORMATS[layer.fmt], DTYPES[dtype]
    strides = _strides(layer, wanted)
    with launch.lock:
        for start in range(0, x.shape[0], LONGEST):
            part = slice(start, start + LONGEST)
            tokens = x[part].shape[0]
            scratch = workspace.scratch(layer, tokens, tokens * ids.shape[1], wanted)
            # fmt: off
            run_experts(tag, fmt, kind, wanted, layer.layout, strides, layer.gate, layer.blobs,
                        x[part], ids[part], weights[part], shards, out[part], scratch)
            # fmt: on


def check_arguments(
    layer: PackedLayer,
    x: np.ndarray,
    ids: np.ndarray,
    weights: np.ndarray,
    out: np.ndarray,
    dtype: str,
) -> None:
    """Raise unless a launch is safe: a kernel checks nothing and a bad index would crash."""
    number = np.float32 if dtype == "float32" else np.uint16
    tokens, experts = x.shape[0], layer.blobs.shape[0]
    expected = {
        "x": (x, (tokens, layer.hidden), number),
        "out": (out, (tokens, layer.hidden), number),
        "ids": (ids, (tokens, ids.shape[-1]), np.int64),
        "weights": (weights, ids.shape, np.float32),
    }
    for name, (array, shape, kind) in expected.items():
        if array.shape != shape or array.dtype != kind or not array.flags.c_contiguous:
            raise RoutingError(
                f"{name} must be a contiguous {np.dtype(kind)} array of shape {shape}, got "
                f"{array.dtype} {array.shape}"
            )
    if ids.size and not 0 <= ids.min() <= ids.max() < experts:
        bad = ids[(ids < 0) | (ids >= experts)][0]
        raise RoutingError(f"expert ids must lie in [0, {experts}), got {bad}")


def _strides(layer: PackedLayer, threads: int) -> Strides:
    """Row strides, and down tiles long enough to stream: two per thread, at most 512 rows."""
    chunk = min(32, max(1, layer.layout.hidden // 16 // (2 * threads)))
    x, h = layer.layout.hidden, layer.layout.inner
    return Strides(activation_bytes(layer.fmt, x), activation_bytes(layer.fmt, h), chunk)


HOST_ISA = detect_isa()
ISA_TAGS = {name: Tag("isa", name) for name in ("avx512vnni", "avx2", "neon", "portable")}
