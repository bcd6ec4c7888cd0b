"""How experts are stored: torch weights to blobs and back."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hybrimoe.errors import FormatError
from hybrimoe.formats.gate import Gate
from hybrimoe.formats.layout import Layout, only_files_bring, split
from hybrimoe.formats.registry import FORMATS, TAGS, named, rounded
from hybrimoe.kernels.cpu import pack as packing
from hybrimoe.simd.dtypes import DTYPES
from hybrimoe.simd.threads import launch

NATIVE = {getattr(torch, fmt.codes): fmt.name for fmt in FORMATS.values() if fmt.is_native}
"""Formats that keep every bit, by the dtype they keep."""


@dataclass(frozen=True)
class ExpertWeights:
    """Views on the weights of one layer's experts; strides say how they are really stored.

    up: [E, M, F, D], M = 2 for gate and up, 1 without a gate. down: [E, D, F].
    up_bias: [E, M, F] or None; down_bias: [E, D] or None.
    gate: the formula between the projections. post_norm: applied to each expert's output, if any.
    parameters: the module's own parameter names behind these views, in the order up, down, biases.
    """

    up: Tensor
    down: Tensor
    gate: Gate
    up_bias: Tensor | None = None
    down_bias: Tensor | None = None
    post_norm: nn.Module | None = None
    parameters: tuple[str, ...] = field(default=("gate_up_proj", "down_proj"))


def bits(tensor: torch.Tensor) -> np.ndarray:
    """A contiguous tensor of the host as kernels take it: bfloat16 and float16 as uint16."""
    halves = tensor.dtype in (torch.bfloat16, torch.float16)
    array: np.ndarray = (tensor.view(torch.uint16) if halves else tensor).numpy()
    return array


def format_of(weights: str, dtype: torch.dtype) -> str:
    """The blob format for a `Config.weights` choice, or a file's format, and a checkpoint dtype."""
    if dtype not in NATIVE:
        raise FormatError(f"expert weights must be float32, bfloat16 or float16, got {dtype}")
    return NATIVE[dtype] if weights == "native" else weights


def choice_of(formats: Iterable[str]) -> str:
    """The `Config.weights` choice that layers of these formats amount to.

    "native" where they are the checkpoint's own: its dtype, or the types of a file, which differ.
    """
    found = set(formats)
    return found.pop() if len(found) == 1 and found <= set(rounded()) else "native"


def is_lossless(fmt: str) -> bool:
    """Whether unpacking gives back the very numbers that were packed."""
    return not any(named(part).is_rounded for part in split(fmt))


def bound_of(fmt: str) -> float:
    """The NMSE that `verify` accepts of a layer in a format."""
    return max(named(part).bound for part in split(fmt))


def check_range(name: str, fmt: str, tensors: list[torch.Tensor]) -> None:
    """Raise FormatError if a quantized format cannot hold these weights; reads, never copies."""
    if is_lossless(fmt):
        return
    largest = named(fmt).largest
    for tensor in tensors:
        low, high = (float(bound) for bound in torch.aminmax(tensor))
        extreme = max(-low, high)
        if not extreme <= largest:  # written so that NaN fails
            raise FormatError(
                f"weights={fmt!r} cannot store weights above {largest:g}, or that are not finite: "
                f"{name} has {'NaN' if math.isnan(extreme) else f'{extreme:g}'}; use 'native'"
            )


def pack(fmt: str, layout: Layout, weights: ExpertWeights, blobs: np.ndarray) -> None:
    """Fill `blobs` [E, expert_bytes] uint8 with all experts of one layer.

    Raises FormatError for formats that only files bring.
    """
    if only_files_bring(fmt):
        raise FormatError(
            f"weights={fmt!r} is available only when loading a GGUF file that stores it"
        )
    _convert(packing.pack_experts, fmt, layout, weights, blobs)
    pack_biases(layout, weights, blobs)


def pack_part(
    fmt: str, layout: Layout, weights: ExpertWeights, blobs: np.ndarray, down: bool
) -> None:
    """`pack` for the up (and gate) matrices alone, or the down matrices alone; no biases.

    The tensor of the other part is not read and may be anything of its shape.
    """
    part = packing.ONLY_DOWN if down else packing.ONLY_UP
    _convert(packing.pack_experts, fmt, layout, weights, blobs, part)


def pack_biases(layout: Layout, weights: ExpertWeights, blobs: np.ndarray) -> None:
    """Write the biases of all experts, where there are any."""
    if weights.up_bias is not None:
        for shard, up, down in _bias_views(layout, blobs):
            _place(weights, layout, shard, up, down)


def unpack(fmt: str, layout: Layout, blobs: np.ndarray, weights: ExpertWeights) -> None:
    """Fill the tensors of `weights` from `blobs`: the inverse of `pack`, up to rounding."""
    _convert(packing.unpack_experts, fmt, layout, weights, blobs)
    if weights.up_bias is not None and weights.down_bias is not None:
        inner = weights.up.shape[2]
        for shard, up, down in _bias_views(layout, blobs):
            at = shard * layout.width
            part = weights.up_bias[:, :, at : at + layout.width]
            part.copy_(torch.from_numpy(up)[:, :, : max(0, min(layout.width, inner - at))])
            if shard == 0:
                weights.down_bias.copy_(torch.from_numpy(down)[:, : weights.down_bias.shape[1]])


def _place(weights: ExpertWeights, layout: Layout, shard: int, up: Any, down: Any) -> None:
    assert weights.up_bias is not None
    assert weights.down_bias is not None
    at, hidden = shard * layout.width, weights.down_bias.shape[1]
    part = weights.up_bias[:, :, at : at + layout.width].float().numpy()
    up[:], down[:] = 0, 0
    up[:, :, : part.shape[2]] = part
    if shard == 0:  # added once per expert, by its first shard
        down[:, :hidden] = weights.down_bias.float().numpy()


def _bias_views(layout: Layout, blobs: np.ndarray) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Per shard: its index, gate and up biases [E, M, width] and down biases [E, D] as views."""
    floats, views = blobs.view(np.float32), []
    for shard in range(layout.shards):
        at = (shard * layout.shard_bytes + layout.bias_at) // 4
        size = layout.matrices * layout.width
        up = floats[:, at : at + size].reshape(len(blobs), layout.matrices, layout.width)
        views.append((shard, up, floats[:, at + size : at + size + layout.hidden]))
    return views


def _convert(
    kernel: Any,
    fmt: str,
    layout: Layout,
    weights: ExpertWeights,
    blobs: np.ndarray,
    part: int = 0,
) -> None:
    (up_fmt, down_fmt), dtype = split(fmt), DTYPES[NATIVE[weights.up.dtype]]
    threads = launch.threads()
    up, down = weights.up, weights.down  # [E, M, F, D], [E, D, F], any strides
    # fmt: off
    tensors = packing.Weights(
        _flat(up), packing.Strides(*up.stride()),
        _flat(down), packing.Strides(down.stride(0), 0, down.stride(1), down.stride(2)),
        up.shape[3], up.shape[2],
    )
    # fmt: on
    tags = TAGS[up_fmt], TAGS[down_fmt]
    rows, work = np.empty((threads, 32), np.float32), np.zeros(8, np.int64)
    work[3] = part
    with launch.lock:
        kernel(tags, dtype, threads, layout, tensors, blobs, rows, work)
    if work[1]:
        raise FormatError(f"{work[1]} groups of 32 weights cannot be stored as {fmt}: not finite")


def _flat(tensor: torch.Tensor) -> np.ndarray:
    """All of a tensor's storage from its first element on, as one numpy array (uint16 for halves)."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size() - tensor.storage_offset()
    return bits(tensor.detach().as_strided((size,), (1,)))
