"""What a folder of safetensors really holds, checked before any loader opens a file of it.

A checkpoint is input from strangers. Its index may name files outside the folder, a name may be a
pipe that blocks for ever, a header may claim gigabytes that are not there. All of it is read here
with bounds, and every finding is a CheckpointError that names the file, the tensor and the reason.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybrimoe.errors import CheckpointError
from hybrimoe.files import read_at

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Stored dtypes that experts can be packed from."""
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
CONVERT = (
    "pickle files can run code when they are opened; convert them with "
    "https://huggingface.co/spaces/safetensors/convert or model.save_pretrained and load the result"
)
LARGEST_HEADER = 16 << 20
LARGEST_INDEX = 64 << 20
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4, "I64": 64, "I32": 32,
    "I16": 16, "I8": 8, "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64,
}  # fmt: skip
"""Bits of one element of every safetensors dtype."""


class StoredTensor(NamedTuple):
    """Where one tensor lies on disk. dtype: as safetensors writes it; offset: from the file's start."""

    path: Path
    offset: int
    nbytes: int
    dtype: str
    shape: tuple[int, ...]


Catalogue = dict[str, StoredTensor]


def examine_folder(folder: Path, variant: str | None = None) -> Catalogue:
    """All tensors of a local checkpoint folder; raises CheckpointError unless it is sound."""
    single, index = (folder / _with_variant(name, variant) for name in (WEIGHTS, INDEX))
    if _is_there(single):
        return examine_files([single], folder)
    if _is_there(index):
        placed = read_index(index, folder)
        found = examine_files(sorted({folder / name for name in placed.values()}), folder)
        for tensor, name in placed.items():
            if tensor not in found or found[tensor].path != folder / name:
                raise CheckpointError(f"is not in {name}, where the index puts it", index, tensor)
        return found
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"has no safetensors, only {', '.join(pickles[:4])}: {CONVERT}", folder
        )
    raise CheckpointError(f"has neither {single.name} nor {index.name}", folder)


def dtypes_in(folder: Path, variant: str | None = None) -> dict[str, str]:
    """The dtype of each tensor of a checkpoint folder; none where there is no sound one."""
    try:
        found = examine_folder(folder, variant) if folder.is_dir() else {}
    except CheckpointError:
        return {}
    return {name: tensor.dtype for name, tensor in found.items()}


def examine_files(paths: Iterable[str | os.PathLike[str]], folder: Path) -> Catalogue:
    """All tensors of some files of one checkpoint; `folder` is where they must lie."""
    found: Catalogue = {}
    for path in map(Path, paths):
        if path.suffix in PICKLES:
            raise CheckpointError(CONVERT, path)
        check_file(path, folder)
        for name, tensor in read_header(path).items():
            if name in found:
                other = found[name].path.name
                raise CheckpointError(f"is in {other} as well", path, name)
            found[name] = tensor
    return found


def read_index(path: Path, folder: Path) -> dict[str, str]:
    """The file name of every tensor, from a `model.safetensors.index.json`."""
    size = check_file(path, folder)
    if size > LARGEST_INDEX:
        raise CheckpointError(f"is {size} bytes long, an index has at most {LARGEST_INDEX}", path)
    content = parse_json(path.read_bytes(), path)
    placed = content.get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise CheckpointError("needs a weight_map of tensor names to file names", path)
    if not isinstance(content.get("metadata"), dict):
        raise CheckpointError("needs metadata, if only {}: transformers asks for it", path)
    for tensor, name in placed.items():
        check_tensor_name(tensor, path)
        check_file_name(name, path)
    return placed


def check_file_name(name: Any, index: Path) -> None:
    """Raise unless a file name of an index stays inside its folder and is a safetensors file."""
    if not isinstance(name, str) or not name or "\0" in name:
        raise CheckpointError(f"names a file {name!r}, which is no file name", index)
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    if windows.anchor or posix.is_absolute() or ".." in windows.parts or "\\" in name:
        raise CheckpointError(f"names {name!r}, which lies outside of its folder", index)
    if posix.suffix in PICKLES:
        raise CheckpointError(f"names {name!r}: {CONVERT}", index)
    if posix.suffix != ".safetensors":
        raise CheckpointError(f"names {name!r}, which is not a .safetensors file", index)


def check_tensor_name(name: str, path: Path) -> None:
    """Raise for tensor names that are paths or cannot be printed: no model has such parameters."""
    pathlike = "/" in name or "\\" in name or ".." in name or name.startswith(".")
    if not name or pathlike or not name.isprintable() or len(name) > 1024:
        raise CheckpointError("is no name of a parameter", path, name[:80])


def check_file(path: Path, folder: Path) -> int:
    """The size of a regular file that really lies in `folder`; anything else is never opened.

    In the Hugging Face cache a snapshot's files are links to blobs of the same repository.
    """
    root = folder.resolve()
    if root.parent.name == "snapshots":
        root = root.parent.parent
    try:
        real = path.resolve(strict=True)
        mode = os.stat(real)
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
        what = (isinstance(error, OSError) and error.strerror) or "a loop of links"
        raise CheckpointError(
            f"cannot be read ({what}); is the download complete?", path
        ) from error
    if not real.is_relative_to(root):
        raise CheckpointError(f"is a link to {real}, outside of {root}", path)
    if not stat.S_ISREG(mode.st_mode):
        raise CheckpointError("is not a regular file", path)
    return mode.st_size


def read_header(path: Path) -> Catalogue:
    """Every tensor of one safetensors file, from its header alone."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size < 8:
            raise CheckpointError(f"is {size} bytes long, too short for safetensors", path)
        length = int.from_bytes(file.read(8), "little")
        if length > LARGEST_HEADER:
            raise CheckpointError(
                f"claims a header of {length} bytes, at most {LARGEST_HEADER} are read: it is not "
                "safetensors, or damaged",
                path,
            )
        if 8 + length > size:
            raise CheckpointError(f"is cut off inside its header: {size} bytes", path)
        content = parse_json(file.read(length), path)
    _check_metadata(content.pop("__metadata__", {}), path)
    found = {name: _entry(name, value, 8 + length, path) for name, value in content.items()}
    _check_cover(found, 8 + length, size, path)
    return found


def parse_json(text: bytes, path: Path) -> dict[str, Any]:
    """A JSON object without repeated keys."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in values if names.count(name) > 1)
            raise CheckpointError("appears twice", path, twice[:80])
        return values

    try:
        content = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"holds no valid JSON: {str(error)[:120]}", path) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"must hold a JSON object, got {type(content).__name__}", path)
    return content


def _check_metadata(metadata: Any, path: Path) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError("__metadata__ must map strings to strings", path)


def _entry(name: str, value: Any, start: int, path: Path) -> StoredTensor:
    check_tensor_name(name, path)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError("needs dtype, shape and data_offsets", path, name)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"has an unknown dtype {str(dtype)[:40]!r}", path, name)
    if not _are_counts(shape) or len(shape) > 16:
        raise CheckpointError(f"has no valid shape: {str(shape)[:80]}", path, name)
    if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"has no valid data_offsets: {str(offsets)[:80]}", path, name)
    nbytes, bits = offsets[1] - offsets[0], math.prod(shape) * BITS[dtype]
    if nbytes * 8 != bits:
        raise CheckpointError(
            f"of shape {tuple(shape)} in {dtype} takes {bits / 8:.0f} bytes, the header gives it "
            f"{nbytes}",
            path,
            name,
        )
    return StoredTensor(path, start + offsets[0], nbytes, dtype, tuple(shape))


def _are_counts(values: Any) -> bool:
    # No file is larger than 2**63 bytes, so neither is any number in it.
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 1 << 63 for value in values
    )


def _check_cover(found: Catalogue, start: int, size: int, path: Path) -> None:
    """Tensors follow each other without overlap or hole and end where the file ends."""
    at = start
    for name, tensor in sorted(found.items(), key=lambda item: item[1][1:3]):
        end = tensor.offset + tensor.nbytes
        if end > size:
            raise CheckpointError(
                f"ends at byte {end}, the file at {size}: the file is cut off; download it again",
                path,
                name,
            )
        if tensor.offset != at:
            what = "overlaps the one before it" if tensor.offset < at else "leaves a hole before it"
            raise CheckpointError(what, path, name)
        at = end
    if at != size:
        raise CheckpointError(f"has {size - at} bytes that belong to no tensor", path)


def _is_there(path: Path) -> bool:
    """Whether the name exists, even as a dangling link or a pipe: those are findings, not absence."""
    return os.path.lexists(path)


def _with_variant(name: str, variant: str | None) -> str:
    stem, dot, rest = name.partition(".")
    if variant is None:
        return name
    # model.fp16.safetensors, model.safetensors.index.fp16.json
    return f"{stem}.{variant}{dot}{rest}" if name == WEIGHTS else f"{name[:-5]}.{variant}.json"


class Reader:
    """Open files of one checkpoint. Close it, or use it as a context, when the loading is over."""

    def __init__(self, catalogue: Catalogue) -> None:
        self.catalogue = catalogue
        self._files: dict[Path, int] = {}

    def can_read(self, name: str) -> bool:
        """Whether `rows` may be asked for this tensor."""
        return name in self.catalogue and self.catalogue[name].dtype in DTYPES

    def rows(self, name: str, out: Tensor, first: int = 0) -> None:
        """out [n, ...] = tensor[first : first + n], converted to the dtype of `out`.

        out: on the CPU, C-contiguous; a whole tensor is one row of a view with n = 1.
        """
        stored = self.catalogue[name]
        dtype = DTYPES[stored.dtype]
        raw = out if dtype == out.dtype else torch.empty_like(out, dtype=dtype)
        self._fill(name, stored, bytes_of(raw), first * (raw.nbytes // max(1, len(raw))))
        if raw is not out:
            out.copy_(raw)

    def expect(self, name: str) -> None:
        """Tell the system that a tensor will be asked for soon."""
        stored = self.catalogue[name]
        if hasattr(os, "posix_fadvise"):
            advice = os.POSIX_FADV_WILLNEED
            os.posix_fadvise(self._open(stored.path), stored.offset, stored.nbytes, advice)

    def close(self) -> None:
        """Close all files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def _fill(self, name: str, stored: StoredTensor, out: np.ndarray, skip: int) -> None:
        if skip + out.nbytes > stored.nbytes:
            raise CheckpointError(f"has {stored.nbytes} bytes, too few", stored.path, name)
        done = read_at(self._open(stored.path), out, stored.offset + skip)
        if done < out.nbytes:
            raise CheckpointError(
                "ended early: the file has become shorter since it was checked", stored.path, name
            )

    def _open(self, path: Path) -> int:
        file = self._files.get(path)
        if file is None:
            flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
            file = self._files[path] = os.open(path, flags)
        return file

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as uint8."""
    array: np.ndarray = tensor.view(-1).view(torch.uint8).numpy()
    return array
