"""Layers of experts in the K types of ggml files: the blobs, and what the gguf package reads."""

import functools

import numpy as np
import reference
from gguf import GGMLQuantizationType, quants
from kernel_cases import SILU

from hybrimoe.formats.layout import expert_layout, split
from hybrimoe.formats.registry import FORMATS, rounded
from hybrimoe.kernels.cpu import relay as ggml
from hybrimoe.kernels.cpu import relay_k
from hybrimoe.kernels.cpu.run_layer import PackedLayer

K_TYPES = {name: fmt.ggml_type for name, fmt in FORMATS.items() if fmt.pack is None}
QUANTIZED = rounded()
BLOCK = {relay_k.Q4_K: 144, relay_k.Q5_K: 176, relay_k.Q6_K: 210}
HALVES = {relay_k.Q4_K: (0, 2), relay_k.Q5_K: (0, 2), relay_k.Q6_K: (208,)}
"""Where the float16 scales of a block lie."""


def random_blocks(kind, count, seed=0, size=0.01):
    """Blocks [count, bytes] with any integers and scales up to `size`."""
    rng = np.random.default_rng([kind, seed])
    raw = rng.integers(0, 256, (count, BLOCK[kind]), np.uint8)
    for at in HALVES[kind]:
        scale = rng.uniform(-size, size, count).astype(np.float16)
        raw[:, at : at + 2] = scale.view(np.uint8).reshape(-1, 2)
    return raw


def read_with_gguf(kind, raw, *shape):
    """float32 of any shape."""
    rows = raw.reshape(-1, shape[-1] // 256 * BLOCK[kind])
    return quants.dequantize(rows, GGMLQuantizationType(kind)).reshape(shape)


def relay(kind, raw, layout, blobs, matrix, size, threads=2):
    """One matrix of all experts into blobs; returns the counters."""
    work = np.zeros(8, np.int64)
    relay_k.relay_k(kind, threads, layout, matrix, size, raw.reshape(-1), blobs, work)
    return work


@functools.cache
def make_layer(fmt, hidden, inner, experts=5, gate=SILU):
    """A packed layer and `reference.Experts` of the weights in it.

    Matrices in other than K types are packed from floats.
    """
    layout = expert_layout(fmt, hidden, inner, True, False)
    up, down = split(fmt)
    up_shape, down_shape = (experts, 2, inner, hidden), (experts, hidden, inner)
    values = [_values(up, up_shape, 1), _values(down, down_shape, 2)]
    if fmt in QUANTIZED or up in QUANTIZED or down in QUANTIZED:
        zeros = [np.zeros_like(v) for v in values]
        plain = [v if f in QUANTIZED else z for f, v, z in zip((up, down), values, zeros)]
        blobs = np.stack([reference.pack(fmt, layout, *expert) for expert in zip(*plain)])
    else:
        blobs = np.full((experts, layout.expert_bytes), 0xAA, np.uint8)
    for f, matrices in ((up, (0, 1)), (down, (2,))):
        for matrix in matrices if f in K_TYPES else ():
            kind = K_TYPES[f]
            size = (hidden, inner) if matrix == 2 else (inner, hidden)
            raw = random_blocks(kind, experts * hidden * inner // 256, matrix, 2e-3)
            assert not relay(kind, raw, layout, blobs, matrix, size)[ggml.NOT_FINITE]
            target = values[1] if matrix == 2 else values[0][:, matrix]
            target[...] = read_with_gguf(kind, raw, experts, *size)
    return PackedLayer(fmt, layout, gate, hidden, blobs), reference.Experts(*values)


def _values(fmt, shape, seed):
    if fmt not in QUANTIZED:
        return np.zeros(shape, np.float32)
    drawn = np.random.default_rng(seed).standard_normal(shape) * 0.05
    return reference.stored(fmt, drawn.astype(np.float32))
