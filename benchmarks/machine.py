"""What the benchmarks share: the machine's name, its read bandwidth, random packed layers."""

import json
import os
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

from hybrimoe.calibration.random_experts import fill_random
from hybrimoe.formats.gate import Gate
from hybrimoe.formats.layout import expert_layout
from hybrimoe.kernels.cpu.run_layer import PackedLayer
from hybrimoe.runtime.pages import allocate_blobs
from hybrimoe.simd.isa import HOST_ISA
from hybrimoe.simd.jit import inner, kernel
from hybrimoe.simd.threads import fork_join, launch
from hybrimoe.simd.vectors import take


def describe(threads: int | None = None) -> dict:
    """The machine and versions a number was measured on."""
    import numba

    return {
        "cpu": _cpu_name(),
        "threads": launch.threads(threads),
        "isa": HOST_ISA,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numba": numba.__version__,
    }


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        return names[0].split(":")[1].strip() if names else platform.machine()
    return platform.processor() or platform.machine()


@inner
def _read_worker(numbers, sums, work):
    """Sum 64 KiB at a time, from whichever part is next."""
    tile, size = take(work, 0), 16384
    while tile < numbers.size // size:
        total = np.float32(0)
        part = numbers[tile * size : (tile + 1) * size]
        for i in range(size):
            total += part[i]
        sums[tile] = total
        tile = take(work, 0)


@kernel
def _read(threads, numbers, sums, work):
    work[:] = 0
    fork_join(threads, _read_worker, (numbers, sums, work))


class ReadBandwidth:
    """How fast this machine reads memory right now, with the threads the kernels use.

    Measured between the timed runs, not once: on shared machines it drifts by tens of percent.
    """

    def __init__(self, threads: int, megabytes: int = 256) -> None:
        slab = allocate_blobs(1, _sized(megabytes << 20)).reshape(-1)
        self.numbers = slab[: megabytes << 20].view(np.float32)
        self.numbers[:] = 1  # untouched pages would all be one page of zeros
        self.sums, self.work = (
            np.zeros(self.numbers.size // 16384, np.float32),
            np.zeros(8, np.int64),
        )
        self.threads, self.seconds = threads, []
        _read(threads, self.numbers, self.sums, self.work)

    def sample(self) -> None:
        """Time one pass over the buffer."""
        start = time.perf_counter()
        _read(self.threads, self.numbers, self.sums, self.work)
        self.seconds.append(time.perf_counter() - start)

    @property
    def gb_s(self) -> float:
        """Median of the samples so far, in GB/s."""
        return self.numbers.nbytes / float(np.median(self.seconds)) / 1e9


def _sized(size: int):
    layout = expert_layout("float32", 32, 32, True, False)
    return layout._replace(expert_bytes=size)


def random_layer(fmt: str, experts: int, hidden: int, inner_dim: int, bias: bool = False):
    """A `PackedLayer` of random experts: eight different ones, repeated."""
    layout = expert_layout(fmt, hidden, inner_dim, True, bias)
    few, blobs = min(8, experts), allocate_blobs(experts, layout)
    fill_random(fmt, layout, blobs[:few])
    for start in range(few, experts, few):
        blobs[start : start + few] = blobs[: len(blobs[start : start + few])]
    return PackedLayer(fmt, layout, Gate(0), hidden, blobs)


def routing(rng: np.random.Generator, tokens: int, experts: int, top_k: int) -> np.ndarray:
    """Expert ids [T, K] int64: uniform, distinct within a token."""
    return np.argsort(rng.random((tokens, experts)), 1)[:, :top_k].astype(np.int64)


def finish(name: str, results: list[dict], machine: dict) -> None:
    """End a benchmark with its one JSON line."""
    print(json.dumps({"benchmark": name, "machine": machine, "results": results}))
    sys.stdout.flush()


if "OMP_WAIT_POLICY" in os.environ:
    print(f"note: OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}", file=sys.stderr)
