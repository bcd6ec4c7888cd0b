"""An accelerator made of host memory and threads: for machines without a GPU, and for faults.

A race between its streams really happens: operations run as late as they may, or early, in an order
drawn from a seed.
"""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrimoe.errors import DeviceLostError, InsufficientMemoryError
from hybrimoe.kernels.cpu.run_layer import PackedLayer, run_layer
from hybrimoe.kernels.cpu.workspace import Workspace


class EmulatedAccelerator:
    """Slots in plain memory under a byte budget, with streams that interleave as badly as they may.

    capacity: bytes of device memory, None for no limit. seed: draws the interleaving.
    bandwidth: bytes per second of the link, or None for no delay. fault: called with the name of
    each operation ("allocate", "pin", "copy", "experts", "fetch", "upload", "wait"); what it raises
    is what the device reports. ballast: bytes that something else occupies, such as a KV cache; may
    be set at any time.

    Its computation shares this machine's cores: it proves orderings and results, never speed.
    """

    name = "emulated"
    compute_device = "cpu"
    measured = False

    def __init__(
        self,
        capacity: int | None = None,
        seed: int = 0,
        bandwidth: float | None = None,
        fault: Callable[[str], None] | None = None,
    ) -> None:
        self.capacity, self.bandwidth, self.fault = capacity, bandwidth, fault
        self.ballast = 0
        self.pinned: dict[int, int] = {}  # bytes by address
        self.slab = np.zeros((0, 0), np.uint8)
        self.workspace = Workspace()
        self._random = random.Random(seed)
        self._streams: dict[str, deque[_Operation]] = {"copy": deque(), "compute": deque()}
        self._slotted: dict[int, PackedLayer] = {}  # by the identity of the layer's blobs
        self._link_free = 0.0
        self._lost: Exception | None = None

    def free_bytes(self) -> int | None:
        if self.capacity is None:
            return None
        return self.capacity - self.ballast - self.slab.nbytes

    def allocate(self, slots: int, slot_bytes: int) -> None:
        assert not any(self._streams.values()), "the slab is given back while it is in use"
        self.slab = np.zeros((0, 0), np.uint8)
        self._slotted.clear()
        if slots == 0:
            return
        self._report("allocate")
        free = self.free_bytes()
        # One more row than slots: it is named by what does not run here, and never read.
        need = (slots + 1) * slot_bytes
        if free is not None and need > free:
            raise InsufficientMemoryError(
                f"{slots} slots of {slot_bytes} bytes do not fit into the {free} free bytes of the "
                "emulated accelerator",
                need,
                free,
            )
        self.slab = np.full((slots + 1, slot_bytes), 0xFF, np.uint8)

    def synchronize(self) -> None:
        if self._lost is not None:
            raise self._lost
        while any(self._streams.values()):
            self._advance()

    def pin(self, array: np.ndarray) -> None:
        self._report("pin")
        self.pinned[array.ctypes.data] = array.nbytes

    def unpin(self, array: np.ndarray) -> None:
        del self.pinned[array.ctypes.data]

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
        x: Tensor,
        slots: np.ndarray,
        weights: np.ndarray,
        shards: np.ndarray,
        out: Tensor,
        after: Sequence[Any],
    ) -> _Operation:
        self._report("experts")
        resident = self._slotted.get(id(layer.blobs))
        if resident is None:  # making one costs 10 us
            resident = self._slotted[id(layer.blobs)] = slotted(layer, self.slab)
        source, target = x.float().numpy(), out.numpy()

        def work() -> None:
            run_layer(resident, source, slots, weights, target, self.workspace, shards=shards)

        return self._submit("compute", work, after, 0.0)

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        self._report("fetch")
        return list(tensors)  # its memory is the host's

    def buffer(self, shape: tuple[int, ...]) -> np.ndarray:
        return np.empty(shape, np.float32)

    def upload(self, array: np.ndarray) -> Tensor:
        self._report("upload")
        return torch.from_numpy(array)

    def make_current_stream_wait(self, event: _Operation) -> None:
        self.wait(event)  # torch computes on the host, which knows nothing of the streams here

    def wait(self, event: _Operation) -> None:
        self._report("wait")
        while not event.done:
            self._advance()

    def happened(self, event: _Operation) -> bool:
        return event.done

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
        operation = queue[0]
        if operation.due:  # sleeping for no time takes 50 us
            time.sleep(max(0.0, operation.due - time.monotonic()))
        operation.began = time.perf_counter()
        operation.work()
        operation.ended = time.perf_counter()
        operation.done = True
        queue.popleft()  # not before: an interrupt must not lose it, and once more does no harm

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
