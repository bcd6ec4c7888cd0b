"""The memory of a load: whether it fits, and that it is ours when the load is over."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from hybrimoe.formats.registry import choices
from hybrimoe.limits import MARGIN, ensure_host_fits, host_memory
from hybrimoe.models.adapters import FoundExperts, top_k_of
from hybrimoe.models.bytes import Footprint, footprint_to_load
from hybrimoe.models.skeleton import kept_dtypes, packs_on_arrival
from hybrimoe.models.tuners import wrappers_of
from hybrimoe.runtime.disk.file import padded
from hybrimoe.runtime.disk.sizes import TierSizes, packed_sizes, tier_sizes

Size = int | float | str | None
MIB = 1 << 20


def ensure_fits(
    model: Any,
    weights: str,
    ram: Size = None,
    files: Iterable[str] = (),
    stored: int = 0,
    kept: Callable[[str], str | None] | None = None,
    beside: int = 0,
    found: list[FoundExperts] | None = None,
) -> None:
    """Raise InsufficientMemoryError, before any is taken, if the load cannot fit into host memory.

    model: on the meta device. The peak is all packed experts (of experts with a budget `ram`, what
    that holds and one packed layer), the dense weights, and what the loader needs besides.
    files: those that transformers maps. stored: tensors of the checkpoint. kept: the format of the
    experts of a name, where they come from files of their own, which prescribe it. beside: bytes that
    are not in the model's parameters, such as packed dense layers. found: its experts, if known.
    """
    footprint = footprint_to_load(model, kept_dtypes(model, model.dtype), found)
    streams = kept is not None or packs_on_arrival(model)
    dense = footprint.dense_bytes - _tied_later(model) + beside
    footprint = replace(footprint, dense_bytes=dense, stored=stored, streams=streams)
    footprint = footprint if kept is None else footprint.keeping(kept)
    have = host_memory(mapped=sum(os.path.getsize(file) for file in files))
    room = have.free - MARGIN
    need, others = _peak(footprint, weights, ram), list(choices())
    if kept is not None or ram is not None:
        others = []
    fits = [choice for choice in others if _peak(footprint, choice, None) <= room]
    nearest = _on_disk(footprint, weights, room)
    if fits:
        nearest = f"weights={fits[0]!r} fits" + (f", and {nearest}" if "ram=" in nearest else "")
    what = f"loading {type(model).__name__} with weights={weights!r}"
    ensure_host_fits(need, what, nearest, have)


def ensure_wrap_fits(
    model: nn.Module, found: list[FoundExperts], weights: str, ram: Size = None
) -> None:
    """Raise InsufficientMemoryError, before any is taken, if packing a loaded model cannot fit.

    Each layer gives back its weights once they are packed, so the most is needed at the first one,
    or at the last where the packed experts are the larger ones. One with adapters is packed from a
    copy of its weights.
    """
    layers, have = _to_wrap(found, weights), host_memory()
    copied = [own for (_, _, own), item in zip(layers, found) if _has_adapters(item)]
    top_k, room = top_k_of(model), have.free - MARGIN - max(copied, default=0)
    sizes = None if ram is None else tier_sizes(ram, [layer[:2] for layer in layers], top_k)
    need = _wrap_peak(layers, math.inf if sizes is None else sizes.slots * sizes.slot_bytes)
    fits = [w for w in choices() if _wrap_peak(_to_wrap(found, w), math.inf) <= room]
    left = _slots_left(layers, room) // MIB
    if fits and ram is None:
        nearest = f"weights={fits[0]!r} fits"
    elif left > top_k * padded(max(size for _, size, _ in layers)) // MIB:
        nearest = f"ram='{left}MiB' fits, with the other experts on disk"
    else:
        nearest = "hybrimoe.from_pretrained packs experts while it loads, without the whole model"
    what = f"wrapping {type(model).__name__} with weights={weights!r}"
    ensure_host_fits(need + max(copied, default=0), what, nearest, have)


def largest_budget(footprint: Footprint, weights: str, room: int, running: int = 0) -> str | None:
    """The largest `Config.ram` whose load fits into `room` bytes, such as "800MiB"; None without one.

    running: bytes besides the experts once the model runs.
    """
    left = (room - max(_besides(footprint, weights), running)) // MIB
    least = footprint.top_k * footprint.expert_bytes(weights) // MIB + 1
    return f"{left}MiB" if left > least else None


def copy_mapped_tensors(model: nn.Module) -> None:
    """Copy what the loader left in a map of the file: such memory dies with the file (SIGBUS)."""
    moved: dict[int, torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        place = tensor.data_ptr()
        if tensor.numel():
            if place not in moved:
                moved[place] = tensor.data.clone()
            tensor.data = moved[place]


def _tied_later(model: Any) -> int:
    """Bytes of parameters that the loader will make one with others, but has not yet."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    pairs = [(parameters.get(name), parameters.get(source)) for name, source in tied.items()]
    return sum(p.nbytes for p, q in pairs if p is not None and q is not None and p is not q)


def _peak(footprint: Footprint, weights: str, ram: Size) -> int:
    """The most that a load takes with a budget of RAM for experts, or without one."""
    sizes = None if ram is None else _sizes(footprint, weights, ram)
    if sizes is None:
        return footprint.streamed_bytes(weights)
    return _besides(footprint, weights) + sizes.slots * sizes.slot_bytes


def _besides(footprint: Footprint, weights: str) -> int:
    """What a load with experts on disk takes besides the slots: a layer is packed in memory."""
    layer = max(layer.packed_bytes(weights) for layer in footprint.layers)
    return footprint.dense_bytes + footprint.loader_bytes() + layer


def _on_disk(footprint: Footprint, weights: str, room: int) -> str:
    """The largest budget of RAM that fits, as advice."""
    size = largest_budget(footprint, weights, room)
    if size is None:
        return "no format of the experts fits, not even with most of them on disk"
    return f"ram={size!r} fits, with the other experts on disk"


def _to_wrap(found: list[FoundExperts], weights: str) -> list[tuple[int, int, int]]:
    """Of each layer: its experts, the bytes of a packed one, and the bytes it gives back."""
    given = [sum(tensor.nbytes for tensor in item.parameters()) for item in found]
    return [(*packed_sizes(item.spec, weights), own) for item, own in zip(found, given)]


def _wrap_peak(layers: list[tuple[int, int, int]], slots: float) -> int:
    """The most that packing one layer after the other takes, if so many bytes of experts stay."""
    most = packed = freed = 0
    for count, size, own in layers:
        most = max(most, int(min(packed, slots)) + count * size - freed)
        packed, freed = packed + count * size, freed + own
    return most


def _slots_left(layers: list[tuple[int, int, int]], room: int) -> int:
    """The most bytes of experts that may stay in RAM while each layer is packed in turn."""
    left, freed = room, 0
    for count, size, own in layers:
        left, freed = min(left, room - count * size + freed), freed + own
    return left


def _sizes(footprint: Footprint, weights: str, ram: int | float | str) -> TierSizes | None:
    layers = [packed_sizes(layer, weights) for layer in footprint.layers]
    return tier_sizes(ram, layers, footprint.top_k)


def _has_adapters(item: FoundExperts) -> bool:
    return bool(wrappers_of(item.parent._modules[item.attribute]))
