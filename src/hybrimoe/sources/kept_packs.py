"""Packed models that are kept beside the cache of the hub, so that only the first start packs.

A pack is a folder as `save_packed` writes it, named after the model and after all that its bytes depend
on, and a note that says what it was made from. Without a note that agrees, it is made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from hybrimoe.errors import CheckpointError, ConfigError, StorageError
from hybrimoe.files import write_atomically
from hybrimoe.sources.packed.files import LOCK
from hybrimoe.sources.packed.manifest import KERNEL_LAYOUT, MANIFEST, SCHEMAS
from hybrimoe.sources.safetensors import check_file, parse_json

NOTE = "kept.json"
LARGEST_NOTE = 1 << 20
SCHEMA = 1


@dataclass(frozen=True)
class Pack:
    """One packed model that is kept. note: what it was made from."""

    folder: Path
    note: dict[str, Any]

    @property
    def is_current(self) -> bool:
        """Whether it is there, and was made from what the note says."""
        # os.path: where the folder may not be looked into, it is not there for us.
        return os.path.exists(self.folder / MANIFEST) and read_note(self.folder) == self.note

    def begin(self) -> None:
        """Until `settle`, it counts as unfinished."""
        (self.folder / NOTE).unlink(missing_ok=True)

    def settle(self) -> None:
        """It is complete."""
        write_atomically(self.folder / NOTE, json.dumps(self.note, indent=1).encode())

    def use(self) -> None:
        """Remember that it was used now."""
        os.utime(self.folder / NOTE)

    def size(self) -> int:
        """Bytes on the disk."""
        return sum(f.stat().st_size for f in self.folder.rglob("*") if f.is_file())

    def clear(self) -> None:
        """Remove it; raises StorageError while somebody writes it, or where the system refuses."""
        try:
            with FileLock(self.folder / LOCK, timeout=0):
                self.begin()
                shutil.rmtree(self.folder)
        except Timeout as error:
            raise StorageError(f"{self.folder} is being written; try again later") from error
        except OSError as error:
            raise StorageError(f"{self.folder} cannot be removed: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """What `hybrimoe cache` shows of it."""
        shown = {key: self.note[key] for key in ("name", "revision", "weights", "linear", "dtype")}
        used = (self.folder / NOTE).stat().st_mtime
        place = {"bytes": self.size(), "last_used": used, "path": str(self.folder)}
        return {**shown, **place}


def home() -> Path:
    """The folder of all packs: beside the hub's cache, and on the same disk."""
    from huggingface_hub import constants  # not needed by those who keep nothing

    cache = Path(constants.HF_HUB_CACHE)
    return cache.with_name(f"{cache.name}-hybrimoe")


def pack_of(
    name: str, source: Mapping[str, Any], settings: Mapping[str, Any], folder: Path
) -> Pack:
    """Where the pack of a model lies in `folder`, whether it is there or not.

    source: `revision` on the hub, else `files` with their sizes and times. settings: all else that its
    bytes depend on, as plain data.
    """
    note = {
        "schema_version": SCHEMA,
        "name": name,
        "revision": source.get("revision"),
        "weights": settings.get("weights"),
        "linear": settings.get("linear"),
        "dtype": settings.get("dtype"),
        "settings": {**settings, "schema": SCHEMAS[-1], "kernel_layout": KERNEL_LAYOUT},
        "files": source.get("files"),
    }
    named_by = [name, note["revision"], note["settings"]]
    digest = hashlib.sha256(json.dumps(named_by, sort_keys=True).encode()).hexdigest()[:12]
    # Through JSON, so that it equals what is read back.
    return Pack(folder / f"{_slug(name)}--{digest}", json.loads(json.dumps(note)))


def files_of(folder: Path, name: str | None = None) -> list[list[Any]]:
    """Name, size and time of a file, or of all that lie in a folder: they change when a model does."""
    paths = [folder / name] if name is not None else sorted(folder.iterdir())
    found = []
    for path in paths:
        if path.is_file() and not path.name.startswith("."):
            status = path.stat()
            found.append([path.name, status.st_size, status.st_mtime_ns])
    return found


def read_note(folder: Path) -> dict[str, Any] | None:
    """The note of a pack; None where there is none that can be read."""
    path = folder / NOTE
    try:
        if check_file(path, folder) > LARGEST_NOTE:
            return None
        note = parse_json(path.read_bytes(), path)
    except (CheckpointError, OSError):
        return None
    known = {"name", "revision", "weights", "linear", "dtype"} <= note.keys()
    return note if note.get("schema_version") == SCHEMA and known else None


def packs(folder: Path) -> Iterator[Pack]:
    """All packs in a folder, by name."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        note = None if path.is_symlink() or not path.is_dir() else read_note(path)
        if note is not None:
            yield Pack(path, note)


def clear(folder: Path, name: str | None = None) -> list[dict[str, Any]]:
    """Remove all packs in a folder, or those of one model; returns what they were."""
    found = [pack for pack in packs(folder) if name in (None, pack.note["name"], pack.folder.name)]
    if name is not None and not found:
        raise ConfigError(
            f"no packed model of {name!r} is kept in {folder}; `hybrimoe cache` lists those that are"
        )
    cleared = []
    for pack in found:
        cleared.append(pack.to_dict())
        pack.clear()
    return cleared


def age_text(last_used: float) -> str:
    """How long ago something was, for people."""
    minutes = max(0, int(time.time() - last_used)) // 60
    for unit, size in (("days", 60 * 24), ("hours", 60)):
        if minutes >= 2 * size:
            return f"{minutes // size} {unit} ago"
    return f"{minutes} minutes ago" if minutes > 1 else "just now"


def _slug(name: str) -> str:
    """A model's name as a part of a file's name, not longer than a file system takes."""
    is_path = Path(name).is_absolute()
    text = f"folder--{Path(name).name}" if is_path else "models--" + name.replace("/", "--")
    return re.sub(r"[^\w.-]+", "_", text)[:120]
