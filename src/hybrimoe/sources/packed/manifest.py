"""The manifest of a folder of packed experts: what the other files must be, checked before use."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hybrimoe.errors import CheckpointError
from hybrimoe.formats.layout import is_integer, split
from hybrimoe.formats.registry import FORMATS, rounded
from hybrimoe.simd.dtypes import DTYPES
from hybrimoe.sources.safetensors import check_file, parse_json

MANIFEST, DENSE, LINEARS = "hybrimoe.json", "dense.safetensors", "linears.safetensors"
PREFIX = "packed-"
SCHEMAS = (1, 2)
"""Folders that are read. In 2, dense layers may be packed too; a reader of 1 would leave them out."""
KERNEL_LAYOUT = 1
"""Raised when a change of the kernels gives the bytes of a blob another meaning."""
LARGEST_MANIFEST = 16 << 20
ENTRY = {
    "name": str,
    "file": str,
    "weights": str,
    "dtype": str,
    "format": str,
    "layout": dict,
    "shapes": dict,
    "experts": int,
    "checksum": int,
}
"""What the manifest says of a layer of experts, with types."""
LINEAR_ENTRY = {
    "name": str,
    "dtype": str,
    "format": str,
    "layout": dict,
    "shape": list,
    "tied": bool,
    "checksum": int,
}
"""What it says of a dense layer that is packed."""


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a folder that `save` wrote, checked; None if it is another kind of folder."""
    path = folder / MANIFEST
    if not os.path.lexists(path):
        return None
    if check_file(path, folder) > LARGEST_MANIFEST:
        raise CheckpointError("is too long for a manifest", path)
    manifest = parse_json(path.read_bytes(), path)
    known = {"schema_version": SCHEMAS, "kernel_layout": (KERNEL_LAYOUT,)}
    for name, values in known.items():
        if type(manifest.get(name)) is not int or manifest[name] not in values:
            raise CheckpointError(
                f"{name} must be {' or '.join(map(str, values))} for this version of hybrimoe, got "
                f"{str(manifest.get(name))[:40]}; load the original checkpoint and save it again "
                "with hybrimoe.save_packed",
                path,
            )
    _check_manifest(manifest, path)
    _check_linears(manifest, path)
    return manifest


def linear_of(manifest: dict[str, Any]) -> str | None:
    """The `Config.linear` that the folder was saved with."""
    return (manifest.get("linears") or {}).get("format")


def linears_of(manifest: dict[str, Any]) -> list[dict[str, Any]]:
    """The entries of the dense layers that are packed."""
    return (manifest.get("linears") or {}).get("layers") or []


def file_name(at: int) -> str:
    """The file of one layer's experts."""
    return f"experts-{at:05d}.safetensors"


def _check_manifest(manifest: dict[str, Any], path: Path) -> None:
    name, dense, layers = (manifest.get(key) for key in ("folder", "dense", "layers"))
    plain = isinstance(name, str) and name.startswith(PREFIX) and name[len(PREFIX) :].isalnum()
    if not plain:
        raise CheckpointError(f"names {str(name)[:80]!r}, which is no folder of packed files", path)
    if not _has(dense, {"bytes": int, "checksum": int}):
        raise CheckpointError("must say the bytes and the checksum of the dense weights", path)
    if not isinstance(layers, list) or not layers:
        raise CheckpointError("must list layers", path)
    for at, entry in enumerate(layers):
        if not _has(entry, ENTRY) or entry["file"] != file_name(at) or not _is_known(entry):
            raise CheckpointError(f"holds no valid entry for layer {at}", path)


def _is_known(entry: dict[str, Any]) -> bool:
    """Whether a layer's numbers are of kinds that there are."""
    fmt, weights = entry["format"], entry["weights"]
    return (
        set(split(fmt)) <= FORMATS.keys()
        and weights == (fmt if is_integer(fmt) else "native")
        and entry["dtype"] in DTYPES
    )


def _check_linears(manifest: dict[str, Any], path: Path) -> None:
    linears = manifest.get("linears")
    if linears is None:
        return
    if not _has(linears, {"format": str, "layers": list}) or linears["format"] not in rounded():
        raise CheckpointError("must say the format and the layers of packed dense layers", path)
    for at, entry in enumerate(linears["layers"]):
        if not _has(entry, LINEAR_ENTRY) or [*map(type, entry["shape"])] != [int, int]:
            raise CheckpointError(f"holds no valid entry for packed dense layer {at}", path)


def _has(values: Any, types: dict[str, type]) -> bool:
    return isinstance(values, dict) and all(
        isinstance(values.get(name), kind) for name, kind in types.items()
    )
