"""Where every packed expert lies on disk, and how its bytes come back: by pread, past the page cache.

Experts of a folder that `save_packed` wrote are read from its files. All others go into one
temporary file, which has no name from the start: whatever happens, nothing of it is left behind.
"""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from hybrimoe.errors import ConfigError, DiskReadError, StorageError
from hybrimoe.files import read_at

PAGE = 4096
"""Offsets, sizes and memory of a direct read are multiples of this on every disk."""
SECTOR = 512
DIRECT = getattr(os, "O_DIRECT", 0)
IN_MEMORY = ("tmpfs", "ramfs", "hugetlbfs")


class LayerExtent(NamedTuple):
    """One layer's experts in a file: expert e begins at `offset` + e * `stride`."""

    file: int
    path: str
    offset: int
    stride: int
    experts: int
    expert_bytes: int


class ExpertFile:
    """The files behind the layers of one model. Close it when the model is done.

    folder: where the temporary file goes; None is the system's folder for such files.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self.folder = Path(folder if folder is not None else tempfile.gettempdir())
        self.places: dict[int, LayerExtent] = {}
        self.is_direct = bool(DIRECT)  # until a file refuses
        self._below: dict[int, LayerExtent] = {}  # where layers lie that another version covers
        self._rooms: dict[int, LayerExtent] = {}  # where such versions are written
        self._files: list[int] = []
        self._spill: int | None = None
        self._end = 0
        self._bounce = threading.local()

    def make_room(self, nbytes: int) -> None:
        """Create the temporary file with so many bytes; StorageError before anything is written."""
        check_is_disk(self.folder)
        free = shutil.disk_usage(self.folder).free
        if nbytes > free:
            raise StorageError(
                f"spill={str(self.folder)!r} needs {nbytes} bytes for the experts beyond ram, its disk "
                f"has {free} free; name a folder on a larger one"
            )
        try:
            with tempfile.TemporaryFile(dir=self.folder, buffering=0) as file:
                self._spill = os.dup(file.fileno())
            self._files.append(self._spill)
            if hasattr(os, "posix_fallocate") and nbytes:
                os.posix_fallocate(self._spill, 0, nbytes)
        except OSError as error:
            if not self.places:  # else experts are read from other files
                self.close()
            raise StorageError(f"spill={str(self.folder)!r}: {error}") from error

    @staticmethod
    def room_for(experts: int, expert_bytes: int) -> int:
        """Bytes that a layer takes in the temporary file."""
        return experts * padded(expert_bytes)

    def write(self, layer: int, blobs: np.ndarray) -> None:
        """Append a layer's blobs [E, expert_bytes] to the temporary file; StorageError if it is full."""
        assert self._spill is not None, "make_room comes first"
        experts, size = blobs.shape
        place = LayerExtent(
            self._spill, f"{self.folder}/(experts)", self._end, padded(size), experts, size
        )
        self._write(place, blobs)
        self._end += experts * place.stride
        self.places[layer] = place

    def cover(self, layer: int, blobs: np.ndarray) -> None:
        """Write another version of a layer, which is read from now on; the one below stays.

        Raises StorageError, and leaves the layer uncovered, if there is no room.
        """
        self.uncover(layer)
        if layer not in self._rooms:
            self._rooms[layer] = self._further_room(*blobs.shape)
        room = self._rooms[layer]
        if self.is_direct:
            _clear_direct(room.file)  # rows need not begin where a direct write asks them to
        self._write(room, blobs)
        if self.is_direct and not _set_direct(room.file):
            self.is_direct = False
            for file in self._files:
                _clear_direct(file)
        self._below[layer], self.places[layer] = self.places[layer], room

    def uncover(self, layer: int) -> None:
        """Read again the version of a layer that was there before `cover`."""
        if layer in self._below:
            self.places[layer] = self._below.pop(layer)

    def keep_cover(self, layer: int) -> None:
        """The version that `cover` wrote is the only one from now on."""
        below = self._below.pop(layer)
        del self._rooms[layer]
        if below.file == self._spill:
            self._rooms[layer] = below

    def adopt(self, layer: int, path: Path, offset: int, blobs: np.ndarray) -> None:
        """Read a layer of this shape from a file that is there already; raises DiskReadError."""
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
        try:
            file = os.open(path, flags)
        except OSError as error:
            raise DiskReadError(f"{os.strerror(error.errno or 0)} when opened", path) from error
        self._files.append(file)
        self.places[layer] = LayerExtent(file, str(path), offset, blobs.shape[1], *blobs.shape)

    def open_direct(self) -> None:
        """From now on, reads go past the page cache; where a file system refuses, they leave none.

        Raises DiskReadError if not even the first page can be read.
        """
        for place in self.places.values():
            try:
                self.is_direct = self.is_direct and _set_direct(place.file)
            except OSError as error:
                reason = f"{os.strerror(error.errno or 0)} while its first page was read"
                raise DiskReadError(reason, place.path) from error
        if not self.is_direct:
            for file in self._files:
                _clear_direct(file)

    def read(self, layer: int, expert: int, out: np.ndarray) -> int:
        """Fill a slot [n] uint8, page-aligned, with an expert; returns the bytes that were read."""
        place = self.places[layer]
        return self._read(place, place.offset + expert * place.stride, place.expert_bytes, out)

    def layer(self, layer: int, out: np.ndarray, below: bool = False) -> np.ndarray:
        """Fill [E, expert_bytes] uint8 with all experts of a layer.

        below: those that a cover hides, if one does.
        """
        place = self._below.get(layer, self.places[layer]) if below else self.places[layer]
        row, size = _aligned(padded(place.expert_bytes)), place.expert_bytes
        for e in range(place.experts):
            self._read(place, place.offset + e * place.stride, size, row)
            out[e] = row[:size]
        return out

    def close(self) -> None:
        """Close all files; the temporary one is gone with it."""
        while self._files:
            os.close(self._files.pop())
        self._spill = None

    def __del__(self) -> None:
        self.close()

    def _further_room(self, experts: int, size: int) -> LayerExtent:
        """Room in the temporary file behind all that is there; it is created if need be."""
        nbytes, free = experts * padded(size), shutil.disk_usage(self.folder).free
        if self._spill is None:
            self.make_room(nbytes)
        elif nbytes > free:
            raise StorageError(
                f"spill={str(self.folder)!r} needs {nbytes} bytes for experts with an adapter's delta, "
                f"its disk has {free} free; name a folder on a larger one"
            )
        assert self._spill is not None
        name = f"{self.folder}/(experts)"
        place = LayerExtent(self._spill, name, self._end, padded(size), experts, size)
        self._end += nbytes
        return place

    def _write(self, place: LayerExtent, blobs: np.ndarray) -> None:
        try:
            for e in range(place.experts):
                _write_at(place.file, blobs[e], place.offset + e * place.stride)
            os.fdatasync(place.file) if hasattr(os, "fdatasync") else os.fsync(place.file)
        except OSError as error:
            raise StorageError(f"spill={str(self.folder)!r} cannot be written: {error}") from error
        _forget(place.file, place.offset, place.experts * place.stride)

    def _read(self, place: LayerExtent, start: int, size: int, out: np.ndarray) -> int:
        if not self.is_direct:
            self._pread(place, out[:size], start, size)
            _forget(place.file, start, size)
            return size
        skip = start % PAGE
        whole = padded(skip + size)
        if skip == 0 and out.size >= whole:
            self._pread(place, out[:whole], start, size)
            return whole
        bounce = self._bounce_of(whole)
        self._pread(place, bounce, start - skip, skip + size)
        out[:size] = bounce[skip : skip + size]
        return whole

    def _pread(self, place: LayerExtent, out: np.ndarray, start: int, least: int) -> None:
        """At least the first `least` bytes of `out`; a direct read may ask for some behind the end."""
        try:
            done = (
                _read_direct(place.file, out, start, least)
                if self.is_direct
                else (read_at(place.file, out, start))
            )
        except OSError as error:
            raise DiskReadError(
                f"{os.strerror(error.errno or 0)} while {least} bytes were read", place.path, start
            ) from error
        if done < least:
            raise DiskReadError(
                f"ended after {done} of {least} bytes: the file has become shorter",
                place.path,
                start,
            )

    def _bounce_of(self, size: int) -> np.ndarray:
        buffer = getattr(self._bounce, "memory", None)
        if buffer is None or buffer.size < size:
            buffer = self._bounce.memory = _aligned(size)
        return buffer[:size]


def check_is_disk(folder: Path) -> None:
    """Raise ConfigError for a folder that does not exist or whose files are in memory."""
    if not folder.is_dir():
        raise ConfigError(f"spill must be a folder that exists, got {str(folder)!r}")
    whole = folder.resolve()
    mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    mount = next((path for path in (whole, *whole.parents) if path in mounts), None)
    if mount is not None and mounts[mount] in IN_MEMORY:
        raise ConfigError(
            f"spill must be a folder on a disk, got {str(folder)!r}, which is {mounts[mount]}: its "
            "files would take the memory that they are to spare"
        )


def _read_direct(file: int, out: np.ndarray, start: int, least: int) -> int:
    """`read_at` until `least` bytes are there: behind a short read at the file's end is no multiple."""
    view, done = memoryview(out), 0  # type: ignore[arg-type]
    while done < least and done % SECTOR == 0:
        count = os.preadv(file, [view[done:]], start + done)
        if count == 0:
            break
        done += count
    return done


def padded(size: int) -> int:
    """The next multiple of a page."""
    return -(-size // PAGE) * PAGE


def _aligned(size: int) -> np.ndarray:
    return np.frombuffer(mmap.mmap(-1, size), np.uint8)


def _write_at(file: int, row: np.ndarray, offset: int) -> None:
    view, done = memoryview(row), 0  # type: ignore[arg-type]
    while done < len(view):
        done += _write_once(file, view[done:], offset + done)


def _write_once(file: int, view: Any, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(file, view, offset)
    os.lseek(file, offset, os.SEEK_SET)  # Windows; nobody reads before all is written
    return os.write(file, view)


def _forget(file: int, start: int, size: int) -> None:
    """Let the page cache give up what was read or written: it lies in a slot now, or not needed."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, start, size, os.POSIX_FADV_DONTNEED)


def _set_direct(file: int) -> bool:
    """Whether reads of a file go past the page cache from now on."""
    try:
        import fcntl  # Windows has none
    except ImportError:
        return False
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | DIRECT)
        os.preadv(file, [memoryview(_aligned(PAGE))], 0)  # type: ignore[arg-type]  # or refused now
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
            return False
        raise
    return True


def _clear_direct(file: int) -> None:
    if DIRECT:
        import fcntl

        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) & ~DIRECT)
