"""Tokens per second to expect, and which resource bounds them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from hybrimoe.kernels.layout import expert_layout
from hybrimoe.kernels.threads import launch
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.profiles import SHAPES
from hybrimoe.policy.simulator import simulate
from hybrimoe.policy.synthesis import synthesise
from hybrimoe.runtime import formats
from hybrimoe.runtime.loading.footprint import Footprint
from hybrimoe.runtime.measuring.calibration import Subject, fingerprint, stand_in
from hybrimoe.runtime.measuring.calibration_cache import kept

TOKENS = 48
"""Decoded tokens of made-up routing that a plan with a GPU is replayed on."""
MOST_LAYERS = 24
"""Layers of that routing; a deeper model is this one longer."""
OPERATION_S, LAYER_S = 5e-6, 70e-6
"""Host seconds of one eager torch operation, and of handing one layer to the expert kernels
(benchmarks/overhead.py)."""
BOUNDS = {"CPU": "the CPU", "GPU": "the GPU", "LINK": "the link", "POLICY": "the host's planning"}


@dataclass(frozen=True)
class Speed:
    """Decoding one sequence. bound: what takes most of the time. source: where the costs are from."""

    decode_tokens_s: float
    bound: str
    source: str
    measured: bool


class _Device(NamedTuple):
    name: str


def expected_speed(footprint: Footprint, weights: str, slots: int, gpu: str | None = None) -> Speed:
    """Predict decoding from this machine's calibration, or from the shipped profile.

    gpu: the name of this machine's GPU, None without one.
    """
    cost, measured = machine_cost(footprint, weights, gpu)
    seconds, bound = _hybrid(footprint, cost, slots) if slots else _cpu(footprint, cost)
    return Speed(1 / seconds, bound, cost.source, measured)


def machine_cost(footprint: Footprint, weights: str, gpu: str | None) -> tuple[CostModel, bool]:
    """What an expert costs here, and whether that was measured.

    A calibration for experts of another shape serves as well: what it costs to read a byte and to
    multiply a weight does not depend on how they are divided.
    """
    largest = max(footprint.layers, key=lambda layer: layer.layout(weights).expert_bytes)
    layout, fmt = largest.layout(weights), formats.format_of(weights, largest.dtype)
    device: Any = _Device(gpu) if gpu else None
    shapes = (expert_layout(fmt, s.hidden, s.intermediate, True, False) for s in SHAPES.values())
    for other in (layout, *shapes):
        key = fingerprint(Subject(fmt, other, list), device, launch.threads())
        found = kept(key)
        if found is not None:
            return _resized(found, layout.expert_bytes, layout.shards), True
    return stand_in(layout), False


def _resized(cost: CostModel, expert_bytes: int, shards: int) -> CostModel:
    ratio = expert_bytes / cost.expert_bytes
    names = ("cpu_expert", "cpu_token", "cpu_expert_contended", "gpu_read", "gpu_token")
    scaled: dict[str, Any] = {name: getattr(cost, name) * ratio for name in names}
    return dataclasses.replace(cost, **scaled, expert_bytes=expert_bytes, shards=shards)


def _cpu(footprint: Footprint, cost: CostModel) -> tuple[float, str]:
    """Everything on the CPU: experts by the cost model, dense weights at the speed of its reads."""
    read = footprint.top_k * cost.cpu_expert
    compute = footprint.top_k * cost.cpu_token
    dense = footprint.dense_read_bytes * cost.cpu_expert / cost.expert_bytes
    layers = len(footprint.layers)
    host = footprint.forward.operations * OPERATION_S + layers * LAYER_S
    shares = {"DRAM": layers * read + dense, "the CPU": layers * compute, "Python and torch": host}
    return sum(shares.values()), max(shares, key=shares.__getitem__)


def _hybrid(footprint: Footprint, cost: CostModel, slots: int) -> tuple[float, str]:
    """A replay of made-up routing with as large a share of the experts on the GPU."""
    layers = min(len(footprint.layers), MOST_LAYERS)
    per_layer = footprint.experts // len(footprint.layers)
    k = min(footprint.top_k, per_layer)
    dense = footprint.dense_read_bytes / len(footprint.layers)
    bandwidth = cost.expert_bytes / cost.gpu_read
    host = footprint.forward.operations / len(footprint.layers) * OPERATION_S
    cost = dataclasses.replace(cost, dense_read=dense / bandwidth, dense_launch=host)
    trace = synthesise(layers, per_layer, k, tokens=TOKENS)
    share = min(slots / footprint.experts, 1.0)
    result = simulate(trace, cost, vram=max(share, k / (layers * per_layer)))
    assert result.decode_s_per_token is not None
    busiest = max(result.lanes, key=result.lanes.__getitem__)
    bound = "DRAM" if busiest == "CPU" and cost.cpu_expert > cost.cpu_token else BOUNDS[busiest]
    return result.decode_s_per_token * len(footprint.layers) / layers, bound
