"""NumPy twins of the kernels: slow, obvious, and written from the descriptions alone.

Weights and activations are rounded as the kernels round them (float32), everything else is float64.
"""

import math
from typing import NamedTuple

import numpy as np
from reference_k import K_HEAD, k_block_bytes, unpack_k_block

from hybrimoe.formats.gate import NAMES, Gate
from hybrimoe.formats.layout import Layout, split

GROUP, ROWS, LINE = 32, 16, 64
QUANTIZED = ("int4", "int8")

LEVELS = {"int4": 8, "int8": 127}
"""What the largest weight of a group becomes; for int4 it is minus 8, whatever its sign."""
RUN = {"int4": 4, "int8": 4, "bfloat16": 2, "float16": 1, "float32": 1}
"""Neighbours of one row that stay together when 16 rows are interleaved."""


class Experts(NamedTuple):
    """Float weights of one layer; `M` is 2 with a gate (gate first, then up), else 1."""

    up: np.ndarray  # [E, M, F, D]
    down: np.ndarray  # [E, D, F]
    up_bias: np.ndarray | None = None  # [E, M, F]
    down_bias: np.ndarray | None = None  # [E, D]


def to_bits(dtype, values):
    """How `dtype` stores float32 `values`: uint16 for the halves (nearest, ties to even)."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "float32":
        return values
    if dtype == "float16":
        with np.errstate(over="ignore"):
            return values.astype(np.float16).view(np.uint16)
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 | 0x40, rounded).astype(np.uint16)


def from_bits(dtype, stored):
    """The inverse of `to_bits`: float32 of the same shape."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return (stored.view(np.float16) if dtype == "float16" else stored).astype(np.float32)


def quantize(fmt, weights):
    """Groups of 32 along the last axis: [..., C] -> int8 [..., C], float16 scales [..., C / 32]."""
    groups = weights.astype(np.float32).reshape(*weights.shape[:-1], -1, GROUP)
    at = np.abs(groups).argmax(-1, keepdims=True)
    extreme = np.take_along_axis(groups, at, -1)[..., 0]
    extreme = -extreme if fmt == "int4" else np.abs(extreme)
    scales = (extreme / np.float32(LEVELS[fmt])).astype(np.float16)
    with np.errstate(divide="ignore"):
        inverse = np.where(scales == 0, np.float32(0), np.float32(1) / scales.astype(np.float32))
    low, high = (-8, 7) if fmt == "int4" else (-127, 127)
    ints = np.clip(np.rint(groups * inverse[..., None]), low, high)
    return ints.astype(np.int8).reshape(weights.shape), scales


def dequantize(ints, scales):
    """ints [..., C], scales [..., C / 32] -> float32 [..., C]."""
    groups = ints.astype(np.float32).reshape(*scales.shape, GROUP)
    return (groups * scales.astype(np.float32)[..., None]).reshape(ints.shape)


def stored(fmt, weights):
    """What a format keeps of float32 weights [..., C], any C, as float32."""
    if fmt not in QUANTIZED:
        return from_bits(fmt, to_bits(fmt, weights))
    columns = weights.shape[-1]
    padded = _pad(weights, (*weights.shape[:-1], -(-columns // GROUP) * GROUP))
    return dequantize(*quantize(fmt, padded))[..., :columns]


def quantize_activations(x):
    """x [T, C], C a multiple of 32 -> int8 [T, C], float32 scales and int32 minus 8 times the sums.

    A group with a number that is not finite gets the scale NaN.
    """
    groups = x.astype(np.float32).reshape(len(x), -1, GROUP)
    broken = ~np.isfinite(groups).all(-1)
    groups = np.where(np.isfinite(groups), groups, 0)
    largest = np.maximum(np.abs(groups).max(-1), np.float32(1e-30))
    ints = np.rint(groups * (np.float32(127) / largest)[..., None]).astype(np.int8)
    scales = np.where(broken, np.float32(np.nan), largest / np.float32(127))
    return ints.reshape(x.shape), scales, -8 * ints.sum(-1, dtype=np.int32)


def rounded_activations(x):
    """x [T, C], any C, as the integer kernels see it; float64."""
    padded = _pad(x, (len(x), -(-x.shape[1] // GROUP) * GROUP))
    ints, scales, _ = quantize_activations(padded)
    return dequantize_float64(ints, scales)[:, : x.shape[1]]


def dequantize_float64(ints, scales):
    """ints [T, C], scales [T, C / 32] -> float64 [T, C]."""
    groups = ints.astype(np.float64).reshape(*scales.shape, GROUP)
    return (groups * scales.astype(np.float64)[..., None]).reshape(ints.shape)


def pack(fmt, layout: Layout, up, down, up_bias=None, down_bias=None):
    """One expert's blob, uint8 [expert_bytes], from up [M, F, D], down [D, F] and its biases.

    Blocks of K types, which are made from no floats, stay zero.
    """
    up_fmt, down_fmt = split(fmt)
    up = _pad(up, (layout.matrices, layout.inner, layout.hidden))
    down = _pad(down, (layout.hidden, layout.inner))
    blob = b""
    for s in range(layout.shards):
        first, end = s * layout.width, (s + 1) * layout.width
        shard = b""
        for row in range(first, end, ROWS):
            for matrix in up:
                shard += _line(_pack_block(up_fmt, matrix[row : row + ROWS]))
        for row in range(0, layout.hidden, ROWS):
            shard += _line(_pack_block(down_fmt, down[row : row + ROWS, first:end]))
        if up_bias is not None:
            shard += _pad(up_bias, (layout.matrices, layout.inner))[:, first:end].tobytes()
            shard += _pad(down_bias * (s == 0), (layout.hidden,)).tobytes()
        blob += _line(shard)
    return np.frombuffer(blob, np.uint8)


def unpack(fmt, layout: Layout, blob, hidden, inner):
    """The up [M, F, D] and down [D, F] float32 weights in a blob; the inverse of `pack`."""
    up_fmt, down_fmt = split(fmt)
    up = np.zeros((layout.matrices, layout.inner, layout.hidden), np.float32)
    down = np.zeros((layout.hidden, layout.inner), np.float32)
    for s in range(layout.shards):
        at, first, end = s * layout.shard_bytes, s * layout.width, (s + 1) * layout.width
        for row in range(first, end, ROWS):
            for matrix in up:
                matrix[row : row + ROWS] = _unpack_block(up_fmt, blob[at : at + layout.up_block])
                at += layout.up_block
        for row in range(0, layout.hidden, ROWS):
            block = _unpack_block(down_fmt, blob[at : at + layout.down_block])
            down[row : row + ROWS, first:end] = block[:, : layout.width]
            at += layout.down_block
    return up[:, :inner, :hidden], down[:hidden, :inner]


def _pack_block(fmt, rows):
    """Bytes of rows [16, C]: per group of 32 columns the interleaved weights, then the scales."""
    if fmt in K_HEAD:
        return bytes(k_block_bytes(fmt, rows.shape[1]))
    if fmt not in QUANTIZED:
        return _interleave(fmt, to_bits(fmt, rows)).tobytes()
    codes, scales = quantize(fmt, rows)
    if fmt == "int4":  # a byte holds elements that lie 4 apart, the earlier one in its low half
        pairs = (codes + 8).astype(np.uint8).reshape(ROWS, -1, 2, 4)
        codes = (pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(ROWS, -1)
    groups = scales.shape[1]
    weights = _interleave(fmt, codes).view(np.uint8).reshape(groups, -1)
    scales = np.ascontiguousarray(scales.T).view(np.uint8)  # [G, 32]
    return np.concatenate([weights, scales], 1).tobytes()


def _unpack_block(fmt, block):
    """float32 [16, C] of the bytes that `_pack_block` made, C rounded up to whole cache lines."""
    if fmt in K_HEAD:
        return unpack_k_block(fmt, block)
    if fmt not in QUANTIZED:
        kind = np.float32 if fmt == "float32" else np.uint16
        return from_bits(fmt, _deinterleave(fmt, block.view(kind)))
    size = 256 if fmt == "int4" else 512
    groups = block[: len(block) // (size + 32) * (size + 32)].reshape(-1, size + 32)
    codes = _deinterleave(fmt, np.ascontiguousarray(groups[:, :size]).view(np.int8))
    if fmt == "int4":
        pairs = codes.view(np.uint8).reshape(ROWS, -1, 4)
        codes = np.stack([pairs & 15, pairs >> 4], 2).astype(np.int8).reshape(ROWS, -1) - 8
    return dequantize(codes, np.ascontiguousarray(groups[:, size:]).view(np.float16).T)


def _interleave(fmt, rows):
    """[16, C] -> [C / run, 16, run]: a run of every row, then the next run of every row."""
    return np.ascontiguousarray(rows.reshape(ROWS, -1, RUN[fmt]).swapaxes(0, 1))


def _deinterleave(fmt, flat):
    return np.ascontiguousarray(flat.reshape(-1, ROWS, RUN[fmt]).swapaxes(0, 1)).reshape(ROWS, -1)


def _line(content):
    return content + bytes(-len(content) % LINE)


def _pad(array, shape):
    """float32 copy of `array`, grown to `shape` with zeros."""
    padded = np.zeros(shape, np.float32)
    padded[tuple(slice(0, n) for n in array.shape)] = array
    return padded


def sigmoid(x):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


ACTIVATIONS = {
    "silu": lambda x, alpha: x * sigmoid(alpha * x),
    "gelu": lambda x, alpha: 0.5 * x * (1 + np.vectorize(math.erf, [float])(x / math.sqrt(2))),
    "gelu_tanh": lambda x, alpha: (
        0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    ),
    "relu": lambda x, alpha: np.maximum(x, 0),
    "relu2": lambda x, alpha: np.maximum(x, 0) ** 2,
}


def apply_gate(gate: Gate, first, up=None):
    """The formula of `Gate` on float64 arrays of one shape; without `up`, act(first)."""
    name, alpha, limit = NAMES[gate.kind], gate.alpha, gate.limit
    if up is None:
        return ACTIVATIONS[name](first, alpha)
    if name == "softcap":
        soft = alpha * np.tanh(first / alpha) * sigmoid(first)
        return soft * limit * np.tanh(up / limit)
    first, up = np.minimum(first, limit), np.clip(up, -limit, limit)
    return ACTIVATIONS[name](first, alpha) * (up + gate.offset)


def experts(weights: Experts, gate: Gate, x, ids, routing, columns=None, rounded=False):
    """sum over k of routing[t, k] * expert[ids[t, k]](x[t]), float64 [T, D].

    x [T, D], ids [T, K], routing [T, K]. columns [E, 2]: the range of F of each expert to sum (its
    shards times their width); None for all. rounded: round activations as int4 and int8 do.
    """
    out = np.zeros(x.shape)
    with np.errstate(invalid="ignore", over="ignore"):
        for e in np.unique(ids):
            first, end = (0, weights.up.shape[2]) if columns is None else columns[e]
            y = _expert(weights, gate, e, slice(first, end), x.astype(np.float64), rounded)
            if weights.down_bias is not None and first == 0 < end:
                y += weights.down_bias[e]
            for k in range(ids.shape[1]):
                mine = ids[:, k] == e
                out[mine] += routing[mine, k, None].astype(np.float64) * y[mine]
    return out


def _expert(weights, gate, e, part, x, rounded):
    x = rounded_activations(x) if rounded else x
    parts = [x @ matrix[part].astype(np.float64).T for matrix in weights.up[e]]  # [T, F] each
    if weights.up_bias is not None:
        parts = [y + bias[part] for y, bias in zip(parts, weights.up_bias[e])]
    h = apply_gate(gate, *parts)
    h = rounded_activations(h) if rounded else h
    return h @ weights.down[e][:, part].astype(np.float64).T
