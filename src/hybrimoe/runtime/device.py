"""What an accelerator must do for the executor, and an emulated one for machines without.

Two streams: copies into slots, and computation. An operation waits only for the events it names, so
a forgotten wait is a race. On the emulated accelerator such a race really happens: operations run as
late as they may, or early, in an order drawn from a seed.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from hybrimoe.errors import DeviceLostError, InsufficientMemoryError
from hybrimoe.kernels.moe import PackedLayer, Workspace, run_layer


class Accelerator(Protocol):
    """Slots in device memory, a copy stream, a compute stream, events between them."""

    name: str
    compute_device: str  # where torch keeps the dense part of the model
    measured: bool  # whether its times are those of hardware, fit to calibrate and to compare by

    def free_bytes(self) -> int:
        """Device memory that could be allocated now."""

    def allocate(self, slots: int, slot_bytes: int) -> None:
        """One slab of equal slots; raises InsufficientMemoryError."""

    def pin(self, array: np.ndarray) -> None:
        """Prepare host memory as a source of copies."""

    def unpin(self, array: np.ndarray) -> None:
        """The reverse of `pin`, before the memory goes away."""

    def copy(self, source: np.ndarray, slot: int, first: int, after: Sequence[Any]) -> Any:
        """Copy host bytes into a slot from byte `first` on, once `after` happened; returns an event."""

    def experts(
        self,
        layer: PackedLayer,
        x: np.ndarray,
        slots: np.ndarray,
        weights: np.ndarray,
        shards: np.ndarray,
        out: np.ndarray,
        after: Sequence[Any],
    ) -> Any:
        """out [T, D] float32 = the experts in `slots` [T, K], once `after` happened; returns an event.

        x [T, D] float32, weights [T, K]; shards [slots + 1, 2], the range of shards of each slot's
        expert to sum. The last row is no slot: it stands for what does not run here.
        """

    def wait(self, event: Any) -> None:
        """Block until an event happened."""

    def span(self, event: Any) -> tuple[float, float]:
        """When the operation of an event that happened began and ended, by `time.perf_counter`."""


class EmulatedAccelerator:
    """Slots in plain memory under a byte budget, with streams that interleave as badly as they may.

    capacity: bytes of device memory. seed: draws the interleaving. bandwidth: bytes per second of
    the link, or None for no delay. fault: called with the name of each operation ("allocate",
    "copy", "experts"); what it raises is what the device reports.

    Its computation shares this machine's cores: it proves orderings and results, never speed.
    """

    name = "emulated"
    compute_device = "cpu"
    measured = False

    def __init__(
        self,
        capacity: int,
        seed: int = 0,
        bandwidth: float | None = None,
        fault: Callable[[str], None] | None = None,
    ) -> None:
        self.capacity, self.bandwidth, self.fault = capacity, bandwidth, fault
        self.slab = np.zeros((0, 0), np.uint8)
        self.workspace = Workspace()
        self._random = random.Random(seed)
        self._streams: dict[str, deque[_Operation]] = {"copy": deque(), "compute": deque()}
        self._link_free = 0.0
        self._lost: Exception | None = None

    def free_bytes(self) -> int:
        return self.capacity - self.slab.nbytes

    def allocate(self, slots: int, slot_bytes: int) -> None:
        self._report("allocate")
        if slots * slot_bytes > self.capacity:
            raise InsufficientMemoryError(
                f"{slots} slots of {slot_bytes} bytes exceed the {self.capacity} bytes of the "
                "emulated accelerator"
            )
        # One more row than slots: it is named by what does not run here, and never read.
        self.slab = np.full((slots + 1, slot_bytes), 0xFF, np.uint8)

    def pin(self, array: np.ndarray) -> None:
        """Plain memory is as good as any here."""

    def unpin(self, array: np.ndarray) -> None:
        """Nothing was pinned."""

    def copy(self, source: np.ndarray, slot: int, first: int, after: Sequence[Any]) -> _Operation:
        self._report("copy")
        target = self.slab[slot, first : first + source.size]
        due = 0.0
        if self.bandwidth:
            self._link_free = max(self._link_free, time.monotonic()) + source.size / self.bandwidth
            due = self._link_free
        return self._submit("copy", lambda: np.copyto(target, source), after, due)

    def experts(
        self,
        layer: PackedLayer,
        x: np.ndarray,
        slots: np.ndarray,
        weights: np.ndarray,
        shards: np.ndarray,
        out: np.ndarray,
        after: Sequence[Any],
    ) -> _Operation:
        self._report("experts")
        resident = slotted(layer, self.slab)

        def work() -> None:
            run_layer(resident, x, slots, weights, out, self.workspace, shards=shards)

        return self._submit("compute", work, after, 0.0)

    def wait(self, event: _Operation) -> None:
        while not event.done:
            self._advance()

    def span(self, event: _Operation) -> tuple[float, float]:
        return event.began, event.ended

    def _submit(
        self, stream: str, work: Callable[[], Any], after: Sequence[_Operation], due: float
    ) -> _Operation:
        operation = _Operation(work, tuple(event for event in after if not event.done), due)
        self._streams[stream].append(operation)
        while self._random.random() < 0.3 and self._runnable():
            self._advance()  # sometimes early
        return operation

    def _runnable(self) -> list[deque[_Operation]]:
        return [
            queue
            for queue in self._streams.values()
            if queue and all(event.done for event in queue[0].after)
        ]

    def _advance(self) -> None:
        """Run the first operation of one stream, drawn among those that may run."""
        runnable = self._runnable()
        assert runnable, "the streams wait for each other"
        queue = self._random.choice(runnable)
        operation = queue.popleft()
        time.sleep(max(0.0, operation.due - time.monotonic()) if operation.due else 0.0)
        operation.began = time.perf_counter()
        operation.work()
        operation.ended = time.perf_counter()
        operation.done = True

    def _report(self, operation: str) -> None:
        """Let the fault injector speak; a lost device stays lost."""
        if self._lost is not None:
            raise self._lost
        if self.fault is None:
            return
        try:
            self.fault(operation)
        except DeviceLostError as error:
            self._lost = error
            raise


def slotted(layer: PackedLayer, slab: np.ndarray) -> PackedLayer:
    """A layer whose experts are the slots of a slab, which may be wider than its blobs."""
    return layer._replace(layout=layer.layout._replace(expert_bytes=slab.shape[1]), blobs=slab)


class _Operation:
    """One entry of an emulated stream; it is its own event."""

    __slots__ = ("after", "began", "done", "due", "ended", "work")

    def __init__(self, work: Callable[[], Any], after: tuple[_Operation, ...], due: float) -> None:
        self.work, self.after, self.due, self.done = work, after, due, False
        self.began = self.ended = 0.0
