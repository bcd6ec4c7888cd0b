"""Experts that arrive one parameter at a time, packed on arrival.

A loader brings `down_proj` of a layer, then its `gate_up_proj`, while the model itself is still
without memory. Each goes into its part of the layer's blobs at once, so that never more than a few
experts exist unpacked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hybrimoe.errors import CheckpointError, FormatError
from hybrimoe.models import weights as formats
from hybrimoe.models.bytes import STAGING_BYTES
from hybrimoe.models.weights import ExpertWeights
from hybrimoe.modules.pooled_experts import PooledExperts
from hybrimoe.modules.stand_ins import leave_out
from hybrimoe.runtime.pages import allocate


class Target(NamedTuple):
    """One parameter of one layer's experts."""

    layer: PooledExperts
    name: str  # the parameter's own name, such as "down_proj"
    role: int  # 0 up, 1 down, 2 up bias, 3 down bias


Fill = Callable[[Tensor, int], None]
"""fill(out [n, ...], first): out = parameter[first : first + n]."""


class ExpertSink:
    """Where the loader hands over what it reads; `finish` when it has read everything.

    layers: made from experts on the meta device; their blobs are filled here.
    """

    def __init__(self, layers: list[PooledExperts]) -> None:
        self.layers = layers
        self.targets = {
            f"{layer.name}.{name}": Target(layer, name, role)
            for layer in layers
            for role, name in enumerate(list(layer.shapes))
        }
        self.arrived: set[str] = set()
        self._held: dict[PooledExperts, dict[str, Tensor]] = {layer: {} for layer in layers}
        self._staging = np.empty(0, np.uint8)

    def check_promised(self, promised: set[str]) -> None:
        """Raise unless the loader knows a source for every parameter of the experts."""
        missing = sorted(self.targets.keys() - promised - self.arrived)
        if missing:
            raise CheckpointError(
                f"the checkpoint has no weights for {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + ": it is incomplete, or of another model than config.json says"
            )

    def accept(self, full_name: str, tensor: Tensor) -> None:
        """Take a whole parameter [E, ...]."""
        layer, name, role = self.targets[full_name]
        if tensor.shape != layer.shapes[name]:
            raise CheckpointError(
                f"must have the shape {tuple(layer.shapes[name])} by the model's configuration, "
                f"got {tuple(tensor.shape)}",
                tensor=full_name,
            )
        self._prepare(layer)
        tensor = tensor.detach().to("cpu", layer.dtype)
        if role < 2 and layer.found.is_decorated:
            self._pack(layer, role, _view_as(layer, name, tensor), 0, len(tensor))
        else:
            self._held[layer][name] = tensor.clone()  # the loader's may be a map of the file
            self._pack_held(layer)
        self._arrive(full_name)

    def stream(self, full_name: str, fill: Fill) -> None:
        """Take an up or down parameter a few experts at a time: `fill` reads them."""
        layer, name, role = self.targets[full_name]
        self._prepare(layer)
        shape = layer.shapes[name]
        each = shape[1:].numel() * layer.dtype.itemsize
        chunk = min(shape[0], max(1, STAGING_BYTES // each))
        staging = self._stage((chunk, *shape[1:]), layer.dtype)
        views = _view_as(layer, name, staging)
        for first in range(0, shape[0], chunk):
            count = min(chunk, shape[0] - first)
            fill(staging[:count], first)
            self._pack(layer, role, views, first, count)
        self._arrive(full_name)

    def accept_packed(self, layer: PooledExperts) -> None:
        """Book a whole layer whose blobs were filled by others."""
        for name in layer.shapes:
            self._arrive(f"{layer.name}.{name}")

    def can_stream(self, full_name: str) -> bool:
        """Whether this parameter can be packed a few experts at a time."""
        target = self.targets.get(full_name)
        return target is not None and target.role < 2 and target.layer.found.is_decorated

    def skip_in_loader(self) -> None:
        """The blobs were filled by others: the loader must not look for these parameters."""
        for layer in self.layers:
            layer.original._is_hf_initialized = True
            for name in layer.shapes:
                leave_out(layer.original, name)
        self.arrived.update(self.targets)

    def finish(self) -> None:
        """All has arrived: seal the layers, or raise CheckpointError if something is missing."""
        self.check_promised(set())
        for layer in self.layers:
            self._prepare(layer)
            if not layer.is_filled:
                layer.seal()

    def _arrive(self, full_name: str) -> None:
        """Book a parameter; a layer that has all of them may leave for the disk at once."""
        self.arrived.add(full_name)
        layer = self.targets[full_name].layer
        if all(f"{layer.name}.{name}" in self.arrived for name in layer.shapes):
            layer.seal()

    def _prepare(self, layer: PooledExperts) -> None:
        """Give the original parameters that hold nothing, instead of those of the meta device."""
        for name in layer.shapes:
            parameter = layer.original._parameters[name]
            if parameter is None or parameter.is_meta:
                empty = nn.Parameter(torch.empty(0, dtype=layer.dtype))
                empty._is_hf_initialized = True  # type: ignore[attr-defined]
                setattr(layer.original, name, empty)

    def _stage(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for a few experts, the same every time.

        One array of malloc's for each parameter left holes of 8 MiB in the heap, sometimes three.
        Pages like those of the pool go back to the system when the load is over.
        """
        size = math.prod(shape) * dtype.itemsize
        if self._staging.size < size:
            self._staging = allocate(1, size)[0]
        return torch.from_numpy(self._staging[:size]).view(dtype).view(shape)

    def _pack(
        self, layer: PooledExperts, role: int, views: ExpertWeights, first: int, count: int
    ) -> None:
        packed, views = layer.packed, _first_experts(views, count)
        blobs = packed.blobs[first : first + count]
        try:
            formats.pack_part(packed.fmt, packed.layout, views, blobs, down=role == 1)
        except FormatError as error:
            name = list(layer.shapes)[role]
            raise FormatError(f"{error} in {layer.name}.{name}") from None

    def _pack_held(self, layer: PooledExperts) -> None:
        """Biases, and layers that cannot be packed in parts, wait until they are complete."""
        held, packed = self._held[layer], layer.packed
        wanted = list(layer.shapes)[2 if layer.found.is_decorated else 0 :]
        if set(held) != set(wanted):
            return
        described = layer.described({**_placeholders(layer), **held})
        if layer.found.is_decorated:
            formats.pack_biases(packed.layout, described, packed.blobs)
        else:
            formats.pack(packed.fmt, packed.layout, described, packed.blobs)
        held.clear()


def _placeholders(layer: PooledExperts, experts: int | None = None) -> dict[str, Tensor]:
    """Tensors of the parameters' shapes that take no memory; for `experts` experts if given."""
    return {
        name: torch.zeros((), dtype=layer.dtype).expand(experts or shape[0], *shape[1:])
        for name, shape in layer.shapes.items()
    }


def _view_as(layer: PooledExperts, name: str, tensor: Tensor) -> ExpertWeights:
    """A parameter of some experts as the kernels see it; the other parameters are placeholders."""
    return layer.described({**_placeholders(layer, len(tensor)), name: tensor})


def _first_experts(views: ExpertWeights, count: int) -> ExpertWeights:
    return ExpertWeights(views.up[:count], views.down[:count], views.gate)
