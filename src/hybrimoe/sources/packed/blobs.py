"""Packed bytes in safetensors files: written page-aligned, read in parts and summed on the way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from hybrimoe.errors import CheckpointError
from hybrimoe.files import read_at
from hybrimoe.runtime.pages import checksum

PAGE = 4096
CHUNK = 8 << 20
"""Bytes read and summed at a time: few enough to be summed in the cache."""


def write_blobs(path: Path, blobs: Mapping[str, np.ndarray]) -> None:
    """Write arrays of uint8 into a new file, the first one from the start of a page on."""
    header, at = {}, 0
    for name, array in blobs.items():
        place = [at, at + array.nbytes]
        header[name] = {"dtype": "U8", "shape": array.shape, "data_offsets": place}
        at += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % PAGE)
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in blobs.values():
            flat = memoryview(array.reshape(-1))  # type: ignore[arg-type]
            for start in range(0, len(flat), CHUNK):
                file.write(flat[start : start + CHUNK])


def read_blob(path: Path, offset: int, blobs: np.ndarray, wanted: int, keep: bool = True) -> None:
    """Fill `blobs` from a file and compare its checksum; without `keep`, only compare it."""
    flat, total = blobs.reshape(-1), 0
    passing = np.empty(0 if keep else min(CHUNK, flat.size), np.uint8)
    with path.open("rb", buffering=0) as file:
        for at in range(0, flat.size, CHUNK):
            part = flat[at : at + CHUNK] if keep else passing[: flat.size - at]
            if read_at(file.fileno(), part, offset + at) < part.size:
                raise CheckpointError("ended early: it has become shorter", path)
            total += checksum(part)
    if total % 2**64 != wanted:
        raise CheckpointError(
            "does not have the checksum of the manifest: damaged; save it again", path
        )


def file_sum(path: Path) -> int:
    """Sum of a file's 8-byte words, the last one padded."""
    total, buffer = 0, np.zeros(CHUNK, np.uint8)
    with path.open("rb", buffering=0) as file:
        at = 0
        while count := read_at(file.fileno(), buffer, at):
            buffer[count : -(-count // 8) * 8] = 0
            total += checksum(buffer[: -(-count // 8) * 8])
            at += count
    return total % 2**64
