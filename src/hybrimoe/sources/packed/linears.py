"""Packed dense layers on disk: their rows as they are, in one file beside those of the experts."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from hybrimoe.errors import CheckpointError
from hybrimoe.formats.registry import rounded
from hybrimoe.kernels.cpu.linear import matrix_layout
from hybrimoe.models import weights as formats
from hybrimoe.modules.packed_linear import FoundLinear, PackedLinear, packed_matrix
from hybrimoe.modules.stand_ins import leave_out
from hybrimoe.runtime.pages import allocate_blobs, checksum
from hybrimoe.sources.packed.blobs import write_blobs
from hybrimoe.sources.packed.manifest import LINEARS, linears_of
from hybrimoe.sources.safetensors import StoredTensor, check_file, read_header

DTYPES = {name: dtype for dtype, name in formats.NATIVE.items()}


class StoredLinear(NamedTuple):
    """A dense layer whose rows lie packed at `offset` of a file, and memory for them [n] uint8."""

    found: FoundLinear
    dtype: torch.dtype
    path: Path
    offset: int
    checksum: int
    blob: np.ndarray

    def skip_in_loader(self) -> None:
        """Have the loader neither look for the weight nor make one up; a tied one is the embedding's."""
        if not self.found.tied:
            self.found.module._is_hf_initialized = True  # type: ignore[assignment]
            leave_out(self.found.module, "weight")

    def packed(self, **how: Any) -> PackedLinear:
        """The layer, once the rows are read and the bias is loaded. how: of `PackedLinear`."""
        module = self.found.module
        if not self.found.tied:
            del module._is_hf_initialized
            module.weight = nn.Parameter(torch.empty(0, dtype=self.dtype))
        matrix = packed_matrix(self.found.fmt, module, self.blob)
        return PackedLinear(self.found, matrix=matrix, **how)


def write_linears(linears: list[PackedLinear], setting: str, folder: Path) -> dict[str, Any]:
    """Write the rows of all packed dense layers; returns what the manifest says of them.

    setting: the `Config.linear` that they were packed by.
    """
    if linears:
        write_blobs(folder / LINEARS, {linear.name: linear.matrix.blob for linear in linears})
    sums = (checksum(linear.matrix.blob) for linear in linears)
    entries = [{**describe(linear), "checksum": total} for linear, total in zip(linears, sums)]
    return {"format": setting, "layers": entries}


def describe(linear: PackedLinear) -> dict[str, Any]:
    """What a packed dense layer is, as plain data."""
    return {
        "name": linear.name,
        "dtype": formats.NATIVE[linear.dtype],
        "format": linear.matrix.fmt,
        "layout": linear.matrix.layout._asdict(),
        "shape": list(linear.matrix.shape),
        "tied": linear.found.tied,
    }


def open_linears(
    model: nn.Module, manifest: dict[str, Any], folder: Path
) -> tuple[StoredLinear, ...]:
    """The packed dense layers of a folder in a model on the meta device, with memory of their own.

    Raises CheckpointError where the model, the manifest and the file do not agree.
    """
    entries = linears_of(manifest)
    if not entries:
        return ()
    path = folder / LINEARS
    check_file(path, folder.parent)
    modules, stored = dict(model.named_modules()), read_header(path)
    _check_names(path, [entry["name"] for entry in entries], stored)
    base = f"{getattr(model, 'base_model_prefix', '')}."
    found = []
    for entry in entries:
        name = name_in(modules, model, entry["name"])
        if name in modules or entry["name"].startswith(base):
            found.append(_open(modules, name, entry, stored[entry["name"]], path))
    return tuple(found)  # without a head that this class does not have


def name_in(modules: Collection[str], model: nn.Module, name: str) -> str:
    """What a saved module is called in a model of another class: with or without its base's prefix."""
    base = f"{getattr(model, 'base_model_prefix', '')}."
    others = (name, name.removeprefix(base), base + name)
    return next((other for other in others if other in modules), name)


def _check_names(path: Path, names: list[str], stored: Iterable[str]) -> None:
    if len(set(names)) != len(names) or set(names) != set(stored):
        raise CheckpointError("does not hold the dense layers that the manifest lists", path)


def _open(
    modules: dict[str, nn.Module],
    name: str,
    entry: dict[str, Any],
    tensor: StoredTensor,
    path: Path,
) -> StoredLinear:
    fmt = entry["format"]
    module, dtype = modules.get(name), DTYPES.get(entry["dtype"])
    if type(module) is not nn.Linear or fmt not in rounded() or dtype is None:
        raise CheckpointError(
            f"holds {fmt[:20]} rows of {name[:200]}, which is no dense layer of config.json's model",
            path,
        )
    shape = module.out_features, module.in_features
    layout = matrix_layout(fmt, *shape)
    if entry["shape"] != list(shape) or entry["layout"] != layout._asdict():
        raise CheckpointError(
            f"was packed from another dense layer than config.json describes: {name} has the shape "
            f"{shape} there",
            path,
        )
    blob = allocate_blobs(1, layout)[0]
    if tensor.dtype != "U8" or tensor.shape != blob.shape:
        raise CheckpointError(f"must hold bytes of shape {blob.shape}", path, name)
    above, _, attribute = name.rpartition(".")
    found = FoundLinear(name, modules[above], attribute, module, fmt, entry["tied"])
    return StoredLinear(found, dtype, path, tensor.offset, entry["checksum"], blob)
