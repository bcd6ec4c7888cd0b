"""Small random layers, packed by the reference, and how to run and compare them."""

import functools

import numpy as np
import reference

from hybrimoe.formats.gate import NAMES, Gate
from hybrimoe.formats.layout import expert_layout, is_integer
from hybrimoe.formats.registry import FORMATS, rounded
from hybrimoe.kernels.cpu import run_layer as moe
from hybrimoe.kernels.cpu.run_layer import PackedLayer, run_layer
from hybrimoe.kernels.cpu.workspace import Workspace
from hybrimoe.simd.isa import HOST_ISA, ISAS, runs_here

MADE = tuple(name for name, fmt in FORMATS.items() if fmt.pack)
"""Formats that are made from floats."""
QUANTIZED = rounded()
SILU, CLAMPED = Gate(NAMES.index("silu")), Gate(NAMES.index("silu"), 1.702, 7.0, 1.0)

# Each triple is compiled once, which takes seconds; everything else varies at run time.
TRIPLES = [
    *[(HOST_ISA, fmt, "float32") for fmt in MADE],
    *[
        (isa, fmt, "float32")
        for isa in ISAS
        if runs_here(isa) and isa != HOST_ISA
        for fmt in QUANTIZED
    ],
    (HOST_ISA, "bfloat16", "bfloat16"),
    (HOST_ISA, "int4", "bfloat16"),
    (HOST_ISA, "float16", "float16"),
]
"""(isa, format, dtype of the activations)."""

ROUNDING = {"float32": 1e-11, "float16": 1e-6, "bfloat16": 1e-5}
"""NMSE that the rounding of the output may cost."""


@functools.cache
def make_weights(fmt, hidden, inner, experts=5, gated=True, bias=False, seed=0):
    """`reference.Experts` that hold what `fmt` keeps of normal weights, outputs of order one."""
    rng = np.random.default_rng(seed)
    up = rng.standard_normal((experts, 1 + gated, inner, hidden)) / np.sqrt(hidden)
    down = rng.standard_normal((experts, hidden, inner)) / np.sqrt(inner)
    up_bias = rng.standard_normal(up.shape[:3]).astype(np.float32) if bias else None
    down_bias = rng.standard_normal((experts, hidden)).astype(np.float32) if bias else None
    kept = [reference.stored(fmt, w.astype(np.float32)) for w in (up, down)]
    return reference.Experts(*kept, up_bias, down_bias)


def pack_weights(fmt, weights, gate):
    """The `PackedLayer` of `reference.Experts`."""
    experts, matrices, inner, hidden = weights.up.shape
    layout = expert_layout(fmt, hidden, inner, matrices == 2, weights.up_bias is not None)
    blobs = np.empty((experts, layout.expert_bytes), np.uint8)
    for e in range(experts):
        parts = [None if part is None else part[e] for part in weights]
        blobs[e] = reference.pack(fmt, layout, *parts)
    return PackedLayer(fmt, layout, gate, hidden, blobs)


@functools.cache
def make_layer(fmt, hidden, inner, experts=5, gated=True, bias=False, gate=SILU):
    """A packed layer and the weights in it."""
    weights = make_weights(fmt, hidden, inner, experts, gated, bias)
    return pack_weights(fmt, weights, gate), weights


def make_batch(tokens, hidden, experts, k, seed=0):
    """x [T, D], ids [T, K] without repeats in a token, routing weights [T, K]."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, hidden)).astype(np.float32)
    ids = rng.random((tokens, experts)).argsort(1)[:, :k].astype(np.int64)
    routing = rng.random((tokens, k)).astype(np.float32)
    return x, np.ascontiguousarray(ids), routing


def run(layer, x, ids, routing, dtype="float32", threads=2, shards=None, isa=None):
    """float32 [T, D] by the kernels; the output starts as NaN, so what is not written shows."""
    x = reference.to_bits(dtype, x)
    out = reference.to_bits(dtype, np.full(x.shape, np.nan))
    run_layer(layer, x, ids, routing, out, Workspace(), dtype, threads, shards, isa)
    return reference.from_bits(dtype, out)


def expected(layer, weights, x, ids, routing, dtype="float32", shards=None, rounded=None):
    """float64 [T, D] by the reference, activations rounded as the format rounds them."""
    x = reference.from_bits(dtype, reference.to_bits(dtype, x))
    columns = None if shards is None else shards * layer.layout.width
    rounded = is_integer(layer.fmt) if rounded is None else rounded
    return reference.experts(weights, layer.gate, x, ids, routing, columns, rounded)


def tolerance(fmt, dtype):
    """Float noise may tip an activation to the next of its 255 levels, hence more for integers."""
    return ROUNDING[dtype] + (1e-5 if is_integer(fmt) else 0)


def nmse(got, wanted):
    """Squared error over squared norm; NaN if anything is NaN."""
    return np.sum((got - wanted) ** 2) / max(np.sum(np.square(wanted)), 1e-300)


def share_all_work(monkeypatch):
    """Let even the tiny layers of these tests run on more than one thread."""
    monkeypatch.setattr(moe, "SMALL", 0)
