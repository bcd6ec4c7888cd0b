"""What a checkpoint holds, on disk or on the hub, read from headers and nothing else."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hybrimoe.errors import CheckpointError, CheckpointNotFoundError
from hybrimoe.hub import CLIENT_ERRORS, cached_folder, explain, first_line, reach, refuse_path
from hybrimoe.models.weights import choice_of
from hybrimoe.sources.gguf.header import GgufHeader
from hybrimoe.sources.packed.manifest import DENSE, LINEARS, linears_of, read_manifest
from hybrimoe.sources.safetensors import (
    CONVERT,
    Catalogue,
    StoredTensor,
    examine_files,
    examine_folder,
)


@dataclass(frozen=True)
class Checkpoint:
    """place: "folder", "cache" or "hub". stored: bytes by dtype, as safetensors names it.

    packed: the `Config.weights` of a folder that `save_packed` wrote, and kept the format of the experts
    of each name in it; None for any other checkpoint. saved: bytes that its dense layers take less
    than unpacked ones. mapped: bytes of files that the loader maps: no memory, but address space.
    """

    name: str
    place: str
    files: int
    tensors: int
    stored: dict[str, int]
    packed: str | None = None
    mapped: int = 0
    kept: dict[str, str] | None = None
    saved: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they are stored."""
        return sum(self.stored.values())


Headers = tuple[Checkpoint, Catalogue]
"""What is counted, and the tensors that the model's own parameters are read from."""


def read_checkpoint(name: str, revision: str | None = None) -> Headers:
    """Read the headers of a local folder, of a snapshot in the cache, or of a repository.

    Raises CheckpointNotFoundError where there is none, CheckpointError where it cannot be used.
    """
    folder = Path(name)
    if name and folder.is_dir():
        return _read_folder(name, folder, "folder")
    refuse_path(name)
    snapshot = _snapshot(name, revision)
    if snapshot is not None:
        return _read_folder(name, snapshot, "cache")
    return _read_hub(name, revision)


def _read_folder(name: str, folder: Path, place: str) -> Headers:
    manifest = read_manifest(folder)
    if manifest is not None:
        found = _packed_files(folder, manifest)
        dense = (folder / manifest["folder"] / DENSE).stat().st_size
        kept = {layer["name"]: layer["weights"] for layer in manifest["layers"]}
        counted = _count(name, place, found, choice_of(kept.values()), dense)
        plain = {key: tensor for key, tensor in found.items() if tensor.path.name == DENSE}
        return replace(counted, kept=kept, saved=_saved(manifest, found)), plain
    found = examine_folder(folder)
    return _count(name, place, found), found


def count_gguf(name: str, header: GgufHeader) -> Checkpoint:
    """The same of a GGUF file whose header has been read; stored: bytes by ggml's types."""
    stored = _by_dtype((tensor.type_name, tensor.nbytes) for tensor in header.tensors.values())
    place = "folder" if Path(name).is_dir() else "cache"
    return Checkpoint(name, place, len(header.paths), len(header.tensors), stored)


def _saved(manifest: dict[str, Any], found: Catalogue) -> int:
    """What packing its dense layers saves; the weight of a tied one is the embedding's, and stays."""
    packed = sum(tensor.nbytes for tensor in found.values() if tensor.path.name == LINEARS)
    untied = (entry for entry in linears_of(manifest) if not entry["tied"])
    sizes = (math.prod(e["shape"]) * (4 if e["dtype"] == "float32" else 2) for e in untied)
    return sum(sizes) - packed


def _packed_files(folder: Path, manifest: dict[str, Any]) -> Catalogue:
    part = folder / manifest["folder"]
    names = [DENSE, *(entry["file"] for entry in manifest["layers"])]
    names += [LINEARS] if linears_of(manifest) else []
    return examine_files([part / name for name in names], folder)


def _count(
    name: str, place: str, found: Catalogue, packed: str | None = None, mapped: int | None = None
) -> Checkpoint:
    stored = _by_dtype((tensor.dtype, tensor.nbytes) for tensor in found.values())
    files = {tensor.path for tensor in found.values()}
    mapped = sum(path.stat().st_size for path in files) if mapped is None else mapped
    return Checkpoint(name, place, len(files), len(found), stored, packed, mapped)


def _by_dtype(tensors: Iterable[tuple[str, int]]) -> dict[str, int]:
    stored: Counter[str] = Counter()
    for dtype, size in tensors:
        stored[dtype] += size
    return dict(stored)


def _snapshot(name: str, revision: str | None) -> Path | None:
    """The repository in the cache, if all of its weights have been downloaded."""
    folder = cached_folder(name, {"revision": revision})
    if folder is None:
        return None
    try:
        examine_folder(folder)
    except CheckpointError:  # not downloaded to the end; the hub has the rest
        return None
    return folder


def _read_hub(name: str, revision: str | None) -> Headers:
    """The same from the hub, by requests for the first bytes of each file."""
    from huggingface_hub import HfApi
    from huggingface_hub import errors as hub

    place = reach(name, {"revision": revision})
    if place.get("local_files_only"):
        examine_folder(cached_folder(name, place) or Path(name))  # says what is missing
    try:
        found = HfApi().get_safetensors_metadata(name, revision=revision)
    except hub.NotASafetensorsRepoError as error:
        raise CheckpointError(f"{name} has no safetensors on the hub: {CONVERT}") from error
    except hub.SafetensorsParsingError as error:
        raise CheckpointError(f"{name} on the hub: {first_line(error)}") from error
    except CLIENT_ERRORS as error:
        raise CheckpointNotFoundError(explain(name, error, revision)) from error
    tensors = {}
    for path, file in found.files_metadata.items():
        for key, tensor in file.tensors.items():
            start, end = tensor.data_offsets
            shape = tuple(tensor.shape)
            tensors[key] = StoredTensor(Path(path), start, end - start, tensor.dtype, shape)
    stored = _by_dtype((tensor.dtype, tensor.nbytes) for tensor in tensors.values())
    mapped = sum(stored.values())
    files = len(found.files_metadata)
    return Checkpoint(name, "hub", files, len(tensors), stored, mapped=mapped), tensors
