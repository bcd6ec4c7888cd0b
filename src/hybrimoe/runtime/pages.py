"""Page-aligned memory for packed experts, and its checksum."""

from __future__ import annotations

import mmap

import numpy as np

from hybrimoe.formats.layout import Layout


def allocate_blobs(experts: int, layout: Layout) -> np.ndarray:
    """Zeroed memory for one layer, [E, expert_bytes] uint8, page-aligned."""
    return allocate(experts, layout.expert_bytes)


def allocate(rows: int, row_bytes: int) -> np.ndarray:
    """Zeroed memory, [rows, row_bytes] uint8, page-aligned, which is taken page by page when used.

    Anonymous pages of their own return to the system when the array dies, unlike malloc's; huge
    pages spare the TLB a miss per 4 KiB while weights stream.
    """
    size = rows * row_bytes
    private = getattr(mmap, "MAP_PRIVATE", None)
    if private is None:  # Windows: mmap knows no flags there
        return np.frombuffer(mmap.mmap(-1, size), np.uint8).reshape(rows, -1)
    memory = mmap.mmap(-1, size, flags=private | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8).reshape(rows, -1)


def checksum(blobs: np.ndarray) -> int:
    """Sum of all 8-byte words: any single changed byte shows, and it is as fast as memory reads."""
    return int(blobs.view(np.uint64).sum())
