"""Measures this machine into a `CostModel`: CPU kernel, GPU kernel and link, alone and together."""

from __future__ import annotations

import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numba
import psutil
import torch
from torch import nn

from hybrimoe.calibration import probes
from hybrimoe.calibration.fit import fit_contended, fit_cpu, fit_gpu, fit_link, misfit
from hybrimoe.calibration.random_experts import fill_random
from hybrimoe.calibration.store import Measured, cached
from hybrimoe.config import check_threads
from hybrimoe.errors import ConfigError, InsufficientMemoryError, WrappedModelError
from hybrimoe.formats.gate import Gate
from hybrimoe.formats.layout import Layout, expert_layout
from hybrimoe.formats.registry import choices, rounded
from hybrimoe.kernels.cpu.run_layer import PackedLayer
from hybrimoe.models.weights import format_of
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.profiles import Shape, profile
from hybrimoe.policy.profiles import shape as shape_by_model
from hybrimoe.runtime.devices.base import Accelerator
from hybrimoe.runtime.devices.cuda import TorchAccelerator
from hybrimoe.runtime.pages import allocate_blobs
from hybrimoe.runtime.pool import ExpertPool
from hybrimoe.simd.isa import HOST_ISA
from hybrimoe.simd.threads import launch, usable_cores
from hybrimoe.version import VERSION

DEFAULT_SHAPE = "qwen3-30b-a3b"
STAND_IN = "desktop"
"""The shipped profile whose numbers stand in for what is not measured here."""
CPU_S, GPU_S, LINK_S = 1.2, 0.6, 0.3
"""Seconds of measuring; the CPU's is spent up to three times, the others once."""
SLOWEST = 4.0
"""A copy in flight slows reading no more than this; more is noise."""


class Subject(NamedTuple):
    """The experts to measure: what they are, and how to get them."""

    fmt: str
    layout: Layout
    make: Callable[[], list[PackedLayer]]


def calibrate(
    model: nn.Module | None = None,
    *,
    shape: str | None = None,
    weights: str | None = None,
    device: str = "auto",
    threads: int | None = None,
    force: bool = False,
) -> CostModel:
    """Measure this machine for the experts of a wrapped model, or of a named shape, in 5 seconds.

    shape: a model's name in `hybrimoe.policy.profiles.SHAPES`, by default Qwen3-30B-A3B; weights:
    "native", "int8" or, by default, "int4". A wrapped model brings its own, and its threads.
    device: "cuda", "cpu", or "auto" for a GPU if there is one. Without a GPU the shipped desktop's
    GPU and link stand in, which `source` of the result says.
    The result is kept per machine, shape, format and threads; force: measure again all the same.
    Raises ConfigError, ProfileError for an unknown shape, WrappedModelError for an unwrapped model.
    """
    check_threads(threads)
    if model is None:
        subject = named_subject(shape or DEFAULT_SHAPE, weights or rounded()[-1])
    else:
        runtime = getattr(model, "hybrimoe", None)
        if runtime is None:
            raise WrappedModelError(
                "calibrate measures a wrapped model's experts; call hybrimoe.wrap(model) first"
            )
        for name, value in (("shape", shape), ("weights", weights)):
            if value is not None:
                raise ConfigError(f"{name} is the wrapped model's own, leave it out; got {value!r}")
        subject = pooled_subject(runtime.pool)
        threads = threads or runtime.threads
    return calibrated(subject, open_accelerator(device), threads, force)


def calibrated(
    subject: Subject,
    accelerator: Accelerator | None,
    threads: int | None = None,
    force: bool = False,
) -> CostModel:
    """The kept or newly measured cost of some experts; a busy or foreign cache only costs time."""
    count = launch.threads(threads)
    key = fingerprint(subject, accelerator, count)
    return cached(key, lambda: measure(subject, accelerator, count), force)


def measure(subject: Subject, accelerator: Accelerator | None, threads: int) -> Measured:
    """Time everything that can be timed, and let the shipped profile stand in for the rest."""
    layers = subject.make()
    numbers = stand_in(subject.layout).to_dict()
    if accelerator is None:
        return _measure_cpu(layers, threads, numbers)
    return _measure_all(layers, accelerator, threads, numbers)


def stand_in(layout: Layout, machine: str = STAND_IN) -> CostModel:
    """What an expert costs on a shipped hardware profile."""
    weights = 3 * layout.hidden * layout.inner
    like = Shape(layout.hidden, layout.inner, layout.hidden**2, layout.expert_bytes / weights)
    source = f"the shipped {machine} profile, nothing is measured"
    numbers = profile(machine).cost(like).to_dict()
    return CostModel.from_dict(numbers | {"shards": layout.shards, "source": source})


def pooled_subject(pool: ExpertPool) -> Subject:
    """The layers of a pool that share the largest expert's layout."""
    layers = [layer for layer in pool.layers if layer is not None]
    largest = max(layers, key=lambda layer: layer.layout.expert_bytes)
    if pool.tier is not None:  # its layers are placeholders of experts on the disk
        like = Shape(largest.hidden, largest.layout.inner, 0)
        return Subject(
            largest.fmt, largest.layout, lambda: [_random_layer(largest.fmt, largest.layout, like)]
        )
    equal = [
        layer for layer in layers if (layer.fmt, layer.layout) == (largest.fmt, largest.layout)
    ]
    return Subject(largest.fmt, largest.layout, lambda: equal)


def named_subject(model: str, weights: str) -> Subject:
    """Random experts of a named shape, as many as no cache holds."""
    if weights not in choices():
        raise ConfigError(f"weights must be one of {', '.join(choices())}, got {weights!r}")
    like, fmt = shape_by_model(model), format_of(weights, torch.bfloat16)
    layout = expert_layout(fmt, like.hidden, like.intermediate, True, False)
    return Subject(fmt, layout, lambda: [_random_layer(fmt, layout, like)])


def open_accelerator(device: str) -> Accelerator | None:
    """A GPU of its own, so that the slots of a wrapped model stay as they are; None without one."""
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"device must be one of auto, cpu, cuda, got {device!r}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device='cuda' needs a CUDA device, torch finds none; try 'cpu'")
    return TorchAccelerator() if device != "cpu" and torch.cuda.is_available() else None


def fingerprint(subject: Subject, accelerator: Accelerator | None, threads: int) -> dict[str, Any]:
    """All that a measurement depends on, as plain data."""
    return {
        "cpu": cpu_name(),
        "isa": HOST_ISA,
        "cores": usable_cores(),
        "threads": threads,
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "gpu": None if accelerator is None else accelerator.name,
        "driver": None if accelerator is None else _driver(),
        "torch": torch.__version__,
        "numba": numba.__version__,
        "hybrimoe": VERSION,
        "format": subject.fmt,
        "layout": list(subject.layout),
    }


def cpu_name() -> str:
    """The processor's model, or its architecture where the system does not say more."""
    found = Path("/proc/cpuinfo")
    lines = found.read_text().splitlines() if found.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _measure_cpu(layers: list[PackedLayer], threads: int, numbers: dict[str, Any]) -> Measured:
    """Without an accelerator a thread copies memory in the link's place, on a core of its own."""
    few = min(threads, usable_cores() - 1)
    cpu, slower = {}, numbers["cpu_expert_contended"] / numbers["cpu_expert"]
    how = f"with a copy in flight {slower:.2f} times longer as there"
    if few:
        with probes.MemoryTraffic() as traffic:
            alone, beside = probes.cpu_samples(layers, few, 2 * CPU_S, (None, traffic))
        cpu = fit_cpu(alone)
        slower = min(fit_contended(beside, cpu) / cpu["cpu_expert"], SLOWEST)
        how = f"a copy in flight being a thread's, measured beside {few}"
    if few < threads:  # the copying thread took a core; this is the speed of all of them
        alone = probes.cpu_samples(layers, threads, CPU_S)[0]
        cpu = fit_cpu(alone)
    source = (
        f"measured: {cpu_name()}, {threads} threads, {how}; GPU, link and the rest are those of the "
        f"shipped {STAND_IN} profile"
    )
    changed = {"cpu_expert_contended": cpu["cpu_expert"] * slower, "source": source}
    return Measured(CostModel.from_dict(numbers | cpu | changed), misfit(alone, cpu))


def _measure_all(
    layers: list[PackedLayer], accelerator: Accelerator, threads: int, numbers: dict[str, Any]
) -> Measured:
    slots = _allocate(accelerator, layers[0].layout.expert_bytes)
    try:
        with probes.copy_source(accelerator, layers[0]) as source:
            link = fit_link(probes.link_samples(accelerator, source, LINK_S))
            copy_s = link["link_latency"] + source.shape[1] / link["link_bandwidth"]
            traffic = probes.LinkTraffic(accelerator, source, copy_s)
            alone, contended = probes.cpu_samples(layers, threads, 2 * CPU_S, (None, traffic))
        gpu = fit_gpu(probes.gpu_samples(accelerator, layers[0], slots, GPU_S))
    finally:
        accelerator.allocate(0, 0)
    cpu: dict[str, Any] = fit_cpu(alone)
    cpu["cpu_expert_contended"] = fit_contended(contended, cpu)
    link["link_bandwidth_contended"] = _contended_bandwidth(traffic, link)
    measured = (
        f"measured: {cpu_name()}, {threads} threads, {accelerator.name} and the link; the dense part "
        f"and the policies' work are those of the shipped {STAND_IN} profile"
    )
    cost = CostModel.from_dict(numbers | cpu | link | gpu | {"source": measured})
    return Measured(cost, misfit(alone, cpu))


def _contended_bandwidth(traffic: probes.LinkTraffic, alone: dict[str, Any]) -> float:
    """Bytes per second of the copies that ran beside CPU experts; at most those of a lone copy."""
    samples = [s for s in traffic.samples if s.seconds > alone["link_latency"]]
    if not samples:  # every CPU run was shorter than a copy
        return float(alone["link_bandwidth"])
    seconds = sum(s.seconds - alone["link_latency"] for s in samples)
    return float(min(alone["link_bandwidth"], sum(s.bytes for s in samples) / seconds))


def _allocate(accelerator: Accelerator, slot_bytes: int) -> int:
    """Slots enough that their experts are not read from a cache, or as many as there is room for."""
    slots = max(max(probes.EXPERTS), probes.ROTATED // slot_bytes)
    while True:
        try:
            accelerator.allocate(slots, slot_bytes)
            return slots
        except InsufficientMemoryError:
            if slots == 1:
                raise
            slots //= 2


def _random_layer(fmt: str, layout: Layout, like: Shape) -> PackedLayer:
    """One random expert, repeated: every copy is read from memory all the same."""
    count = max(2 * max(probes.EXPERTS), probes.ROTATED // layout.expert_bytes)
    blobs = allocate_blobs(count, layout)
    fill_random(fmt, layout, blobs[:1])
    blobs[1:] = blobs[:1]
    return PackedLayer(fmt, layout, Gate(0), like.hidden, blobs)


def _driver() -> str:
    found = Path("/proc/driver/nvidia/version")
    system = found.read_text().splitlines()[0] if found.exists() else ""
    return f"cuda {torch.version.cuda} {system}".strip()
