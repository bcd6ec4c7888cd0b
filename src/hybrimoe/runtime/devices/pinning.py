"""Page-locked host memory: experts are registered where they lie, so nothing is rounded or doubled."""

from __future__ import annotations

import math
import mmap
from collections.abc import Iterator

import numpy as np

from hybrimoe.errors import InsufficientMemoryError
from hybrimoe.runtime.devices.base import Accelerator

LARGEST = 64 << 30  # bytes of one registration; drivers refuse half a terabyte at once


class Pinned:
    """The registrations of one wrapped model, to be undone one by one."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self._chunks: list[np.ndarray] = []

    @property
    def nbytes(self) -> int:
        """Bytes that are page-locked."""
        return sum(chunk.nbytes for chunk in self._chunks)

    def pin(self, layers: list[np.ndarray], largest: int = LARGEST) -> str:
        """Register the blobs [E, expert_bytes] of each layer, or leave the whole layer pageable.

        Returns how much was refused and why, as one warning for all layers, or nothing.
        """
        refused, reason = 0, ""
        for blobs in layers:
            before = len(self._chunks)
            try:
                for chunk in chunks(blobs, largest):
                    self.accelerator.pin(chunk)
                    self._chunks.append(chunk)
            except InsufficientMemoryError as error:
                refused, reason = refused + blobs.nbytes, str(error)
                self._undo(before)
        if not refused:
            return ""
        total = sum(blobs.nbytes for blobs in layers)
        return (
            f"{refused / 2**20:.1f} of {total / 2**20:.1f} MiB of experts stay pageable, so copies "
            f"to {self.accelerator.name} are slower and hold up the CPU: {reason}; a larger "
            "`ulimit -l` or more host memory may help"
        )

    def unpin(self) -> None:
        """Undo every registration, before the memory goes away."""
        self._undo(0)

    def _undo(self, kept: int) -> None:
        while len(self._chunks) > kept:
            self.accelerator.unpin(self._chunks.pop())  # off the list first: it is not tried twice


def chunks(blobs: np.ndarray, largest: int = LARGEST) -> Iterator[np.ndarray]:
    """A layer's blobs [E, expert_bytes] in pieces of whole experts and, but for the last, whole pages.

    A copy must not cross two registrations, and two registrations must not share a page.
    """
    experts, size = blobs.shape
    if blobs.nbytes == 0:
        return  # registering nothing is an error
    step = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, size)
    rows = max(largest // size // step, 1) * step
    for start in range(0, experts, rows):
        yield blobs[start : start + rows]
