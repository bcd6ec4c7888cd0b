"""torch.cuda without a GPU: streams that do everything at once, and events that count.

Enough for `TorchAccelerator("cpu")`, so that its code runs here and its syncs can be counted.
"""

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch


class Event:
    """Happens when it is recorded. syncs: how often the host waited for any of them."""

    syncs = 0

    def __init__(self, **_: Any) -> None:
        self.at = 0.0

    def record(self, stream: Any = None) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        Event.syncs += 1

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: "Event") -> float:
        return (later.at - self.at) * 1e3


class Stream:
    """Nothing is ever under way on it."""

    def __init__(self, device: Any = None) -> None:
        pass

    def wait_event(self, event: Event) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the fakes in the place of what `TorchAccelerator` asks of torch.cuda."""
    Event.syncs = 0
    runtime = SimpleNamespace(
        cudaHostRegister=lambda *_: 0, cudaHostUnregister=lambda *_: 0, cudaGetErrorString=str
    )
    fakes = {
        "Event": Event,
        "Stream": Stream,
        "stream": lambda stream: stream,
        "current_stream": Stream,
        "get_device_name": lambda device: "fake",
        "mem_get_info": lambda device: (1 << 36, 1 << 36),
        "memory_stats_as_nested_dict": lambda device: {
            name: {"all": {"current": 0}} for name in ("reserved_bytes", "allocated_bytes")
        },
        "empty_cache": lambda: None,
        "synchronize": lambda device: None,
        "cudart": lambda: runtime,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    # Installed or not, Triton has nothing to launch on.
    monkeypatch.setattr("hybrimoe.kernels.gpu.triton_experts.available", lambda: False)
