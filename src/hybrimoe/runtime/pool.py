"""The host memory of all experts: one contiguous blob each, one slab per layer."""

from __future__ import annotations

import mmap

import numpy as np

from hybrimoe.errors import WrappedModelError
from hybrimoe.kernels.layout import Layout
from hybrimoe.kernels.moe import PackedLayer, Workspace


class ExpertPool:
    """Keeps every expert of a model exactly once in host RAM, plus the buffers to compute them."""

    def __init__(self) -> None:
        self.layers: list[PackedLayer | None] = []
        self.workspace = Workspace()

    @property
    def nbytes(self) -> int:
        """Bytes of all packed experts."""
        return sum(layer.blobs.nbytes for layer in self.layers if layer)

    def add(self, layer: PackedLayer) -> int:
        """Take a packed layer in and return its index."""
        self.layers.append(layer)
        return len(self.layers) - 1

    def layer(self, index: int) -> PackedLayer:
        """The packed experts of one layer; raises if they were released."""
        layer = self.layers[index]
        if layer is None:
            raise WrappedModelError(
                f"the experts of layer {index} were released by hybrimoe.unwrap"
            )
        return layer

    def release(self, index: int) -> None:
        """Give the memory of one layer back to the system."""
        self.layers[index] = None


def allocate_blobs(experts: int, layout: Layout) -> np.ndarray:
    """Zeroed memory for one layer, [E, expert_bytes] uint8, page-aligned.

    Anonymous pages of their own return to the system when the array dies, unlike malloc's; huge
    pages spare the TLB a miss per 4 KiB while weights stream.
    """
    size = experts * layout.expert_bytes
    private = getattr(mmap, "MAP_PRIVATE", None)
    if private is None:  # Windows: mmap knows no flags there
        return np.frombuffer(mmap.mmap(-1, size), np.uint8).reshape(experts, -1)
    memory = mmap.mmap(-1, size, flags=private | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return np.frombuffer(memory, np.uint8).reshape(experts, -1)


def checksum(blobs: np.ndarray) -> int:
    """Sum of all 8-byte words: any single changed byte shows, and it is as fast as memory reads."""
    return int(blobs.view(np.uint64).sum())
