"""A model's GGUF header, from its one file or from all parts that llama-gguf-split made of it.

The first part says everything about the model; the others hold tensors and their own number. Parts
lie beside each other, and their names tell how many there are.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from hybrimoe.errors import CheckpointError
from hybrimoe.sources.gguf.header import GgufHeader, read_file

PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf")
MERGE = "or join them with llama-gguf-split --merge"


def read_gguf(path: Path, folder: Path) -> GgufHeader:
    """The header of a model that really lies in `folder`; raises CheckpointError if unsound.

    path: its file, or the first of its parts.
    """
    header = read_file(path, folder)
    count = _number(header, "split.count", 1)
    if count > 1:
        header = _join(header, folder, count)
    architecture = header.values.get("general.architecture")
    if not isinstance(architecture, str) or not architecture.isprintable() or not architecture:
        raise CheckpointError(
            f"must name its general.architecture, got {str(architecture)[:40]!r}", path
        )
    return header


def part_names(name: str) -> list[str]:
    """The names of all parts of the model that `name` is a part of; just `name` if it is whole."""
    match = PART.fullmatch(name)
    if not match:
        return [name]
    return [f"{match[1]}-{part + 1:05d}-of-{match[3]}.gguf" for part in range(int(match[3]))]


def _join(first: GgufHeader, folder: Path, count: int) -> GgufHeader:
    """All tensors of all parts."""
    names = part_names(first.path.name)
    if len(names) != count:
        raise CheckpointError(
            f"is one of {count} files of a split model, and must be named like "
            f"model-00001-of-{count:05d}.gguf, with the others beside it; {MERGE}",
            first.path,
        )
    if first.path.name != names[0] or _number(first, "split.no", 0) != 0:
        raise CheckpointError(
            f"is one of {count} files of a split model; give the first, {names[0]}, {MERGE}",
            first.path,
        )
    parts = [first, *(_read_part(first, folder, names, at) for at in range(1, count))]
    tensors = {name: tensor for part in parts for name, tensor in part.tensors.items()}
    _check_tensors(first, parts, len(tensors))
    return first._replace(tensors=tensors, paths=tuple(part.path for part in parts))


def _read_part(first: GgufHeader, folder: Path, names: list[str], at: int) -> GgufHeader:
    path = first.path.parent / names[at]
    if not os.path.lexists(path):
        raise CheckpointError(
            f"is missing: {first.path.name} needs all its {len(names)} files beside it; download "
            f"it, {MERGE}",
            path,
        )
    part = read_file(path, folder)
    for key, wanted in (("split.no", at), ("split.count", len(names))):
        if part.values.get(key) != wanted:
            raise CheckpointError(
                f"must have {key} = {wanted} by its name, got {part.values.get(key)!r}", path
            )
    for key, value in part.values.items():
        own = key.startswith("split.") or key == "general.alignment"
        if not own and first.values.get(key) != value:
            raise CheckpointError(
                f"has {key[:80]} = {str(value)[:40]!r}, which {names[0]} does not say", path
            )
    return part


def _check_tensors(first: GgufHeader, parts: list[GgufHeader], together: int) -> None:
    seen: dict[str, str] = {}
    for part in parts:
        for name in part.tensors:
            if name in seen:
                raise CheckpointError(f"is in {seen[name]} as well", part.path, name)
            seen[name] = part.path.name
    claimed = _number(first, "split.tensors.count", together)
    if claimed != together:
        raise CheckpointError(
            f"must have split.tensors.count = {together}, the tensors of all its files, got "
            f"{claimed}",
            first.path,
        )


def _number(header: GgufHeader, key: str, default: int) -> int:
    value: Any = header.values.get(key, default)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"must have a number as {key}, got {str(value)[:40]!r}", header.path)
    return value
