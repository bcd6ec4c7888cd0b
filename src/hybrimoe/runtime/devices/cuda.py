"""A CUDA device as an `Accelerator`: one slab of slots, a copy stream, events per copy."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor

from hybrimoe.errors import DeviceLostError, HybriMoEError, InsufficientMemoryError
from hybrimoe.kernels.cpu.run_layer import PackedLayer
from hybrimoe.kernels.gpu import torch_experts, triton_experts
from hybrimoe.kernels.gpu.pairs import Slots, pairs_of
from hybrimoe.runtime.devices.staging import Staging


class Work(NamedTuple):
    """One operation on a stream: the events before and after it."""

    begin: Any
    end: Any


P = ParamSpec("P")
R = TypeVar("R")
Method = Callable[Concatenate["TorchAccelerator", P], R]


def typed(method: Method[P, R]) -> Method[P, R]:
    """What the device reports becomes an error of ours; a lost device is not called again."""

    @functools.wraps(method)
    def call(self: TorchAccelerator, /, *args: P.args, **kwargs: P.kwargs) -> R:
        if self.lost:
            raise DeviceLostError(self.lost)
        try:
            return method(self, *args, **kwargs)
        except HybriMoEError:
            raise
        except RuntimeError as error:
            understood = self.understand(error)
            if understood is error:
                raise
            raise understood from error

    return call


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
        self._probe = torch.zeros(1, device=self.device)
        self.staging = Staging(self.device, torch.cuda.Event, pinned=self.device.type == "cuda")
        self.lost = ""  # why, once the device is
        self._zero = torch.cuda.Event(enable_timing=True)
        self._zero.record(torch.cuda.current_stream(self.device))
        self._zero.synchronize()
        self._zero_s = time.perf_counter()

    @typed
    def free_bytes(self) -> int:
        """What the driver has, and what torch's allocator holds without using it."""
        free = int(torch.cuda.mem_get_info(self.device)[0])
        # The nested form: flattening all statistics takes ten times as long.
        stats = torch.cuda.memory_stats_as_nested_dict(self.device)
        held, used = (
            int(stats[f"{kind}_bytes"]["all"]["current"]) for kind in ("reserved", "allocated")
        )
        return free + held - used

    @typed
    def allocate(self, slots: int, slot_bytes: int) -> None:
        self.slab = torch.empty(0, 0, dtype=torch.uint8, device=self.device)
        torch.cuda.empty_cache()  # blocks of other sizes would keep the new slab out
        if slots:
            self.slab = torch.empty(slots + 1, slot_bytes, dtype=torch.uint8, device=self.device)

    @typed
    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)  # sync: only at the end, and after a failure

    def pin(self, array: np.ndarray) -> None:
        """Page-lock host memory in place, so that copies from it overlap with computation."""
        runtime = torch.cuda.cudart()
        refused = runtime.cudaHostRegister(array.ctypes.data, array.nbytes, 0)
        if int(refused) == 0:
            return
        # The refusal stays pending and would fail the next, unrelated launch. torch offers no call
        # that clears it, but the check behind a launch of our own does.
        with contextlib.suppress(RuntimeError):
            self._probe.add_(1)
        raise InsufficientMemoryError(
            f"the system refuses to page-lock {array.nbytes} bytes "
            f"({runtime.cudaGetErrorString(refused)})",
            array.nbytes,
        )

    def unpin(self, array: np.ndarray) -> None:
        """The reverse of `pin`, before the memory goes away."""
        if not self.lost:
            torch.cuda.cudart().cudaHostUnregister(array.ctypes.data)

    @typed
    def copy(self, source: np.ndarray, slot: int, first: int, after: Sequence[Work]) -> Work:
        with torch.cuda.stream(self.copies):
            for earlier in after:
                self.copies.wait_event(earlier.end)  # hazard: its former expert is still read
            begin = self._mark(self.copies)
            target = self.slab[slot, first : first + source.size]
            target.copy_(torch.from_numpy(source), non_blocking=True)
            return Work(begin, self._mark(self.copies))

    @typed
    def experts(
        self,
        layer: PackedLayer,
        x: Tensor,
        slots: np.ndarray,
        weights: np.ndarray,
        shards: np.ndarray,
        out: Tensor,
        after: Sequence[Work],
    ) -> Work:
        stream = torch.cuda.current_stream(self.device)
        for copy in after:
            stream.wait_event(copy.end)  # hazard: the expert's weights are still on the wire
        begin = self._mark(stream)
        layout = layer.layout._replace(expert_bytes=self.slab.shape[1])
        self.kernels.run(
            Slots(layer.fmt, layout, layer.gate, self.slab),
            pairs_of(slots, weights, shards),
            x,
            out.zero_(),
            lambda array: self.staging.put([array])[0],
        )
        return Work(begin, self._mark(stream))

    @typed
    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return self.staging.fetch(tensors)

    @typed
    def buffer(self, shape: tuple[int, ...]) -> np.ndarray:
        return self.staging.buffer(shape)

    @typed
    def upload(self, array: np.ndarray) -> Tensor:
        return self.staging.upload(array)

    def make_current_stream_wait(self, event: Work) -> None:
        """Experts are computed on torch's own stream: whatever it does next comes after them."""

    @typed
    def wait(self, event: Work) -> None:
        event.end.synchronize()  # sync: while filling and measuring; no layer waits here

    @typed
    def happened(self, event: Work) -> bool:
        return bool(event.end.query())

    def span(self, event: Work) -> tuple[float, float]:
        begin, end = (self._zero.elapsed_time(e) / 1e3 for e in event)
        return self._zero_s + begin, self._zero_s + end

    def understand(self, error: RuntimeError) -> Exception:
        """What an error out of torch means for the caller; it is itself where it means nothing."""
        text = str(error)
        if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in text:
            return InsufficientMemoryError(f"{self.name} is out of memory: {text}")
        failed = getattr(torch, "AcceleratorError", ())  # torch before 2.8 only has the words
        if isinstance(error, failed) or "CUDA error" in text or "CUDA driver" in text:
            self.lost = f"{self.name} failed and stays unusable until the process restarts: {text}"
            return DeviceLostError(self.lost)
        return error

    def _mark(self, stream: Any) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        return event
