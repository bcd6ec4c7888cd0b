"""What an accelerator must do for the executor.

Two streams: copies into slots, and computation. An operation waits only for the events it names, so
a forgotten wait is a race.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from hybrimoe.kernels.cpu.run_layer import PackedLayer


class Accelerator(Protocol):
    """Slots in device memory, a copy stream, a compute stream, events between them."""

    name: str
    compute_device: str  # where torch keeps the dense part of the model
    measured: bool  # whether its times are those of hardware, fit to calibrate and to compare by

    def free_bytes(self) -> int | None:
        """Device memory that could be allocated now; None where there is no limit to speak of."""

    def allocate(self, slots: int, slot_bytes: int) -> None:
        """One slab of equal slots in place of the one before, which is given back first; 0 slots
        leave none. Nothing may be using the former slab. Raises InsufficientMemoryError.
        """

    def synchronize(self) -> None:
        """Block until nothing is under way on either stream."""

    def pin(self, array: np.ndarray) -> None:
        """Prepare host memory as a source of copies; raises InsufficientMemoryError if refused."""

    def unpin(self, array: np.ndarray) -> None:
        """The reverse of `pin`, before the memory goes away."""

    def copy(self, source: np.ndarray, slot: int, first: int, after: Sequence[Any]) -> Any:
        """Copy host bytes into a slot from byte `first` on, once `after` happened; returns an event."""

    def experts(
        self,
        layer: PackedLayer,
        x: Tensor,
        slots: np.ndarray,
        weights: np.ndarray,
        shards: np.ndarray,
        out: Tensor,
        after: Sequence[Any],
    ) -> Any:
        """out [T, D] float32 = the experts in `slots` [T, K], once `after` happened; returns an event.

        x [T, D] and out on the compute device; weights [T, K] float32 and the rest on the host.
        shards [slots + 1, 2]: the range of shards of each slot's expert to sum. The last row is no
        slot: it stands for what does not run here.
        """

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Tensors of the compute device in host memory, by one copy; valid until the next call."""

    def buffer(self, shape: tuple[int, ...]) -> np.ndarray:
        """Host memory for float32 that `upload` will take; valid until the next `fetch`."""

    def upload(self, array: np.ndarray) -> Tensor:
        """What `buffer` returned, on the compute device; the host does not wait for it."""

    def make_current_stream_wait(self, event: Any) -> None:
        """What torch computes from now on sees what came before an event; waits only if it must."""

    def wait(self, event: Any) -> None:
        """Block until an event happened."""

    def happened(self, event: Any) -> bool:
        """Whether an event happened, without waiting for it."""

    def span(self, event: Any) -> tuple[float, float]:
        """When the operation of an event that happened began and ended, by `time.perf_counter`."""
