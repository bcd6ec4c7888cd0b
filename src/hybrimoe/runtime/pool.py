"""The host memory of all experts: one contiguous blob each, one slab per layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from hybrimoe.errors import WrappedModelError
from hybrimoe.kernels.cpu.run_layer import PackedLayer
from hybrimoe.kernels.cpu.workspace import Workspace

if TYPE_CHECKING:
    from hybrimoe.runtime.disk.tier import DiskTier


ON_DISK = np.full((), 0xFF, np.uint8)
"""What a layer on disk shows for its bytes: it takes no memory, and as numbers they are NaN."""


class ExpertPool:
    """Keeps every expert of a model exactly once, plus the buffers to compute them.

    tier: where the layers lie that do not fit into RAM; None if all of them do.
    """

    def __init__(self) -> None:
        self.tier: DiskTier | None = None
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

    def blobs(self, index: int) -> np.ndarray:
        """A layer's packed experts [E, expert_bytes] uint8, read from the disk if they are there."""
        found = self.layer(index).blobs
        return found if self.tier is None or found.strides[0] else self.tier.blobs(index)

    def spill(self, index: int) -> None:
        """The blobs of a layer are complete: write them to the disk, if there is a tier."""
        if self.tier is not None:
            self.tier.backing.write(index, self.layer(index).blobs)
            self.leave_on_disk(index)

    def rewrite(self, index: int, blobs: np.ndarray | None) -> None:
        """A layer's blobs have other contents: where it is on disk, write them above the former ones.

        None: read the former ones again.
        """
        if self.tier is None:
            return
        if blobs is None:
            self.tier.backing.uncover(index)
        else:
            self.tier.backing.cover(index, blobs)
        self.tier.forget(index)

    def leave_on_disk(self, index: int) -> None:
        """Free the memory of a layer that the tier can read."""
        layer = self.layer(index)
        self.layers[index] = layer._replace(blobs=np.broadcast_to(ON_DISK, layer.blobs.shape))

    def release(self, index: int) -> None:
        """Give the memory of one layer back to the system."""
        self.layers[index] = None
