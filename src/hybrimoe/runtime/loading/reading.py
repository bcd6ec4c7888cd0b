"""Bytes from checkpoint files into memory of our own, by pread.

Nothing of a file is mapped: a file that shrinks under a map kills the process with SIGBUS, one that
shrinks under pread is a CheckpointError.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrimoe.errors import CheckpointError
from hybrimoe.runtime.loading.checkpoints import Catalogue, StoredTensor

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Stored dtypes that experts can be packed from."""


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


def read_at(file: int, out: np.ndarray, offset: int) -> int:
    """Read bytes of a file into `out` [n] uint8 from a file offset; how many there were."""
    view, done = memoryview(out), 0  # type: ignore[arg-type]
    while done < len(view):
        count = _read_once(file, view[done:], offset + done)
        if count == 0:
            break
        done += count
    return done


def bytes_of(tensor: Tensor) -> np.ndarray:
    """The memory of a contiguous CPU tensor as uint8."""
    array: np.ndarray = tensor.view(-1).view(torch.uint8).numpy()
    return array


def _read_once(file: int, view: Any, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file, [view], offset)
    os.lseek(file, offset, os.SEEK_SET)  # Windows; one thread reads a file there
    return os.readv(file, [view]) if hasattr(os, "readv") else _copy(os.read(file, len(view)), view)


def _copy(part: bytes, view: Any) -> int:
    view[: len(part)] = part
    return len(part)
