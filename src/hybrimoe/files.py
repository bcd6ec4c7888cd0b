"""Bytes of files: read by position into memory of ours, written in one step."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

import numpy as np


def write_atomically(path: Path, content: bytes) -> None:
    """Replace a file in one step, so that an interruption leaves the old one whole."""
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def read_at(file: int, out: np.ndarray, offset: int) -> int:
    """Read bytes of a file into `out` [n] uint8 from a file offset; how many there were."""
    view, done = memoryview(out), 0  # type: ignore[arg-type]
    while done < len(view):
        count = _read_once(file, view[done:], offset + done)
        if count == 0:
            break
        done += count
    return done


def _read_once(file: int, view: Any, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file, [view], offset)
    os.lseek(file, offset, os.SEEK_SET)  # Windows; one thread reads a file there
    return os.readv(file, [view]) if hasattr(os, "readv") else _copy(os.read(file, len(view)), view)


def _copy(part: bytes, view: Any) -> int:
    view[: len(part)] = part
    return len(part)
