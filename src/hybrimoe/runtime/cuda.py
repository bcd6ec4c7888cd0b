"""A CUDA device as an `Accelerator`: one slab of slots, a copy stream, events per copy."""

from __future__ import annotations

import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from hybrimoe.errors import DeviceLostError, InsufficientMemoryError
from hybrimoe.kernels import torch_experts, triton_experts
from hybrimoe.kernels.moe import PackedLayer


class Work(NamedTuple):
    """One operation on a stream: the events before and after it."""

    begin: Any
    end: Any


class TorchAccelerator:
    """Slots in device memory; computation on the current stream, copies on one of their own."""

    measured = True

    def __init__(self, device: str = "cuda") -> None:
        self.device, self.compute_device = torch.device(device), device
        self.name = torch.cuda.get_device_name(self.device)
        self.copies = torch.cuda.Stream(self.device)
        self.slab = torch.empty(0, 0, dtype=torch.uint8, device=self.device)
        # Two launches per layer where Triton is there, plain torch operations elsewhere.
        self.kernels = triton_experts if triton_experts.available() else torch_experts
        self._pinned: set[int] = set()
        self._zero = torch.cuda.Event(enable_timing=True)
        self._zero.record(torch.cuda.current_stream(self.device))
        self._zero.synchronize()
        self._zero_s = time.perf_counter()

    def free_bytes(self) -> int:
        return int(torch.cuda.mem_get_info(self.device)[0])

    def allocate(self, slots: int, slot_bytes: int) -> None:
        try:
            self.slab = torch.empty(slots + 1, slot_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError as error:
            raise InsufficientMemoryError(
                f"{slots} slots of {slot_bytes} bytes do not fit on {self.name}, which has "
                f"{self.free_bytes()} bytes free; give a smaller vram"
            ) from error

    def pin(self, array: np.ndarray) -> None:
        """Page-lock host memory in place, so that copies from it overlap; warn where refused."""
        runtime = torch.cuda.cudart()
        if int(runtime.cudaHostRegister(array.ctypes.data, array.nbytes, 0)) == 0:
            self._pinned.add(array.ctypes.data)
            return
        runtime.cudaGetLastError()  # the refusal would fail the next, unrelated call
        warnings.warn(
            f"the system refuses to page-lock {array.nbytes} bytes: copies to {self.name} will be "
            "slower and block the CPU (see `ulimit -l`)",
            RuntimeWarning,
            stacklevel=2,
        )

    def unpin(self, array: np.ndarray) -> None:
        """The reverse of `pin`, before the memory goes away."""
        if array.ctypes.data in self._pinned:
            torch.cuda.cudart().cudaHostUnregister(array.ctypes.data)
            self._pinned.discard(array.ctypes.data)

    def copy(self, source: np.ndarray, slot: int, first: int, after: Sequence[Work]) -> Work:
        with torch.cuda.stream(self.copies):
            for earlier in after:
                self.copies.wait_event(earlier.end)  # hazard: its former expert is still read
            begin = self._mark(self.copies)
            target = self.slab[slot, first : first + source.size]
            target.copy_(torch.from_numpy(source), non_blocking=True)
            return Work(begin, self._mark(self.copies))

    def experts(
        self,
        layer: PackedLayer,
        x: np.ndarray,
        slots: np.ndarray,
        weights: np.ndarray,
        shards: np.ndarray,
        out: np.ndarray,
        after: Sequence[Work],
    ) -> Work:
        stream = torch.cuda.current_stream(self.device)
        for copy in after:
            stream.wait_event(copy.end)  # hazard: the expert's weights are still on the wire
        begin = self._mark(stream)
        flat = slots.reshape(-1)
        here = np.flatnonzero(flat < len(self.slab) - 1)
        order = here[np.argsort(flat[here], kind="stable")]
        slot, token = flat[order].astype(np.int32), (order // slots.shape[1]).astype(np.int32)
        result = torch.zeros(out.shape, device=self.device)
        self.kernels.run(
            layer.fmt,
            layer.layout._replace(expert_bytes=self.slab.shape[1]),
            layer.gate,
            self.slab,
            self._put(x),
            self._put(token),
            self._put(slot),
            self._put(weights.reshape(-1)[order]),
            result,
            self._put(shards),
            np.bincount(slot, minlength=len(self.slab)).tolist(),
        )
        torch.from_numpy(out).copy_(result, non_blocking=True)
        return Work(begin, self._mark(stream))

    def wait(self, event: Work) -> None:
        try:
            event.end.synchronize()  # sync: the layer's join
        except RuntimeError as error:
            raise DeviceLostError(
                f"{self.name} failed and stays unusable until the process restarts: {error}"
            ) from error

    def span(self, event: Work) -> tuple[float, float]:
        begin, end = (self._zero.elapsed_time(e) / 1e3 for e in event)
        return self._zero_s + begin, self._zero_s + end

    def _mark(self, stream: Any) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event

    def _put(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, non_blocking=True)
