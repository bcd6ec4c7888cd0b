"""Host memory between CPU and accelerator: everything down in one copy, and small things up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

ALIGNMENT = 16


class Slab:
    """Memory that grows to the largest request and stays."""

    def __init__(self, device: torch.device | str = "cpu", pinned: bool = False) -> None:
        self.device, self.pinned = device, pinned
        self.memory = torch.empty(0, dtype=torch.uint8)

    def take(self, nbytes: int) -> Tensor:
        """[nbytes] uint8; the memory of an earlier request, where it suffices."""
        if self.memory.numel() < nbytes:
            size = max(nbytes, 2 * self.memory.numel())
            with torch.inference_mode(False):  # else nobody could write to it outside
                self.memory = torch.empty(
                    size, dtype=torch.uint8, device=self.device, pin_memory=self.pinned
                )
        return self.memory[:nbytes]


class Staging:
    """Page-locked memory for one layer's traffic with a device; at rest it allocates nothing.

    event: makes an event of the device, with `record()`, `query()` and `synchronize()`.
    """

    def __init__(self, device: torch.device, event: Any, pinned: bool) -> None:
        self.device = device
        self._packed = Slab(device)
        self._down, self._up = Slab(pinned=pinned), Slab(pinned=pinned)
        self._down_done, self._up_done = event(), event()
        self._used = 0
        self._outgrown: list[Tensor] = []  # smaller memory, from which copies may still run

    def fetch(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors in host memory, by one copy and one sync; valid until the next `fetch`."""
        # Widest numbers first: then all of them lie on multiples of their size.
        order = sorted(range(len(tensors)), key=lambda i: -tensors[i].dtype.itemsize)
        parts = [tensors[i].detach().reshape(-1).view(torch.uint8) for i in order]
        total = sum(part.numel() for part in parts)
        packed, host = self._packed.take(total), self._down.take(total)
        torch.cat(parts, out=packed)
        host.copy_(packed, non_blocking=True)
        self._down_done.record()
        self._down_done.synchronize()  # sync: the policies need the routing, the CPU its inputs
        self._reuse()
        found: list[Tensor] = [host] * len(tensors)
        start = 0
        for i, part in zip(order, parts):
            end = start + part.numel()
            found[i] = host[start:end].view(tensors[i].dtype).view(tensors[i].shape)
            start = end
        return found

    def buffer(self, shape: tuple[int, ...]) -> np.ndarray:
        """Uninitialised float32 in page-locked memory, good as a source until the next `fetch`."""
        array: np.ndarray = self._take(4 * int(np.prod(shape))).view(torch.float32).numpy()
        return array.reshape(shape)

    def put(self, arrays: Sequence[np.ndarray]) -> list[Tensor]:
        """Arrays of four-byte numbers on the device, by one copy behind all that was ordered."""
        sizes = [4 * array.size for array in arrays]
        starts = np.cumsum([0, *(-(-size // ALIGNMENT) * ALIGNMENT for size in sizes)])
        source = self._take(int(starts[-1]))
        for array, start, size in zip(arrays, starts, sizes):
            source[start : start + size].numpy()[:] = (
                np.ascontiguousarray(array).view(np.uint8).ravel()
            )
        there = source.to(self.device, non_blocking=True, copy=True)
        self._up_done.record()
        return [
            there[start : start + size].view(torch.from_numpy(array[:0]).dtype).view(array.shape)
            for array, start, size in zip(arrays, starts.tolist(), sizes)
        ]

    def upload(self, array: np.ndarray) -> Tensor:
        """What `buffer` returned, on the device."""
        there = torch.from_numpy(array).to(self.device, non_blocking=True, copy=True)
        self._up_done.record()
        return there

    def _take(self, nbytes: int) -> Tensor:
        start = self._used
        end = start + -(-nbytes // ALIGNMENT) * ALIGNMENT
        if end > self._up.memory.numel():
            if start:
                self._outgrown.append(self._up.memory)
            self._up.take(max(2 * end, 1 << 16))
            start, end = 0, end - start
        self._used = end
        return self._up.memory[start : start + nbytes]

    def _reuse(self) -> None:
        """Start the upload memory anew, as its copies were ordered before what was waited for."""
        if not self._up_done.query():  # hazard: they went to another stream than the fetch
            self._up_done.synchronize()
        self._used = 0
        self._outgrown.clear()
