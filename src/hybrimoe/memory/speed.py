"""Tokens per second to expect, and which resource bounds them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hybrimoe.calibration.measure import Subject, fingerprint, stand_in
from hybrimoe.calibration.store import kept
from hybrimoe.formats.layout import expert_layout, split
from hybrimoe.formats.registry import FORMATS, named
from hybrimoe.models.bytes import Footprint
from hybrimoe.models.spec import ExpertSpec
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.profiles import SHAPES
from hybrimoe.simd.threads import launch
from hybrimoe.simulation.simulator import simulate
from hybrimoe.simulation.synthesis import synthesise

TOKENS = 48
"""Decoded tokens of made-up routing that a plan with a GPU is replayed on."""
MOST_LAYERS = 24
"""Layers of that routing; a deeper model is this one longer."""
OPERATION_S = 13e-6
"""Seconds of one torch operation of transformers' code on a CPU, Python around it and the little that
it computes included. Models of 4 and of 24 small layers differ by 1780 operations and, less their
weights, by 22 to 24 ms per token on two Zen 4 cores (`small` and `deep` of
benchmarks/plan_speed.py). Faster cores take less."""
LAUNCH_S = 5e-6
"""The host's part of one torch operation that runs on a GPU."""
LAYER_S = 70e-6
"""Handing one layer to the expert kernels (benchmarks/overhead.py)."""
TORCH_SHARE = {torch.bfloat16: 0.23, torch.float16: 0.55, torch.float32: 0.36}
"""What torch's `linear` on one token reaches of the memory's read speed, by the weights' dtype: about
10, 24 and 16 of 44 GB/s on two Zen 4 cores, the first within `wide` and `qwen3` of
benchmarks/plan_speed.py, the others alone."""
STAND_IN_CORES = 8
"""Cores of the machine behind the stand-in profile."""
CORE_BANDWIDTH = 20e9
"""Bytes per second that one core draws from memory: 16 to 32 GB/s on Zen 4 (benchmarks/LOG.md). Few
cores reach less than the memory of the stand-in gives."""
BOUNDS = {"CPU": "the CPU", "GPU": "the GPU", "LINK": "the link", "POLICY": "the host's planning"}


@dataclass(frozen=True)
class Speed:
    """Decoding one short sequence. bound: what takes most of the time. source: where the costs are
    from. measured: whether what experts cost was; the rest never is."""

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
    largest = _largest(footprint, weights)
    if slots:
        seconds, bound = _hybrid(footprint, cost, slots)
    else:
        experts = footprint.packed_bytes(weights) / footprint.experts
        share = TORCH_SHARE[largest.dtype] / read_share(largest.fmt(weights))
        seconds, bound = _cpu(footprint, cost, experts, share)
    return Speed(1 / seconds, bound, cost.source, measured)


def machine_cost(footprint: Footprint, weights: str, gpu: str | None) -> tuple[CostModel, bool]:
    """What the largest expert costs here, and whether that was measured.

    A calibration for experts of another shape serves as well: what it costs to read a byte and to
    multiply a weight does not depend on how they are divided.
    """
    largest = _largest(footprint, weights)
    layout, fmt = largest.layout(weights), largest.fmt(weights)
    device: Any = _Device(gpu) if gpu else None
    others = SHAPES.values() if fmt in FORMATS else ()  # of one format, not of two
    shapes = (expert_layout(fmt, s.hidden, s.intermediate, True, False) for s in others)
    for other in (layout, *shapes):
        key = fingerprint(Subject(fmt, other, list), device, launch.threads())
        found = kept(key)
        if found is not None:
            return _resized(found, layout.expert_bytes, layout.shards), True
    return _of_cores(stand_in(layout), launch.threads()), False


def read_share(fmt: str) -> float:
    """What our kernels reach of the memory's read speed, the less of gate and up, and down."""
    return min(named(part).read_share for part in split(fmt))


def _largest(footprint: Footprint, weights: str) -> ExpertSpec:
    return max(footprint.layers, key=lambda layer: layer.layout(weights).expert_bytes)


def _of_cores(cost: CostModel, cores: int) -> CostModel:
    """The stand-in with as few cores as there are here."""
    if cores >= STAND_IN_CORES:
        return cost
    fewer, least = STAND_IN_CORES / cores, cost.expert_bytes / (cores * CORE_BANDWIDTH)
    return dataclasses.replace(
        cost,
        cpu_expert=max(cost.cpu_expert, least),
        cpu_expert_contended=max(cost.cpu_expert_contended, least),
        cpu_token=cost.cpu_token * fewer,
        source=f"{cost.source}; its rates are scaled to {cores} cores",
    )


def _resized(cost: CostModel, expert_bytes: int, shards: int) -> CostModel:
    ratio = expert_bytes / cost.expert_bytes
    names = ("cpu_expert", "cpu_token", "cpu_expert_contended", "gpu_read", "gpu_token")
    scaled: dict[str, Any] = {name: getattr(cost, name) * ratio for name in names}
    return dataclasses.replace(cost, **scaled, expert_bytes=expert_bytes, shards=shards)


def _cpu(
    footprint: Footprint, cost: CostModel, expert_bytes: float, dense_share: float
) -> tuple[float, str]:
    """Everything on the CPU: experts by the cost model, the rest by torch.

    expert_bytes: of one expert on average. dense_share: how fast torch reads weights, our kernels 1.
    """
    layers, byte_s = len(footprint.layers), cost.cpu_expert / cost.expert_bytes
    activated = layers * footprint.top_k
    shares = {
        "DRAM": activated * expert_bytes * byte_s,
        "the CPU": activated * cost.cpu_token,
        "torch's dense layers": footprint.dense_read_bytes * byte_s / dense_share,
        "Python and torch": footprint.forward.operations * OPERATION_S + layers * LAYER_S,
    }
    return sum(shares.values()), max(shares, key=shares.__getitem__)


def _hybrid(footprint: Footprint, cost: CostModel, slots: int) -> tuple[float, str]:
    """A replay of made-up routing with as large a share of the experts on the GPU."""
    layers = min(len(footprint.layers), MOST_LAYERS)
    per_layer = footprint.experts // len(footprint.layers)
    k = min(footprint.top_k, per_layer)
    dense = footprint.dense_read_bytes / len(footprint.layers)
    bandwidth = cost.expert_bytes / cost.gpu_read
    host = footprint.forward.operations / len(footprint.layers) * LAUNCH_S
    cost = dataclasses.replace(cost, dense_read=dense / bandwidth, dense_launch=host)
    trace = synthesise(layers, per_layer, k, tokens=TOKENS)
    share = min(slots / footprint.experts, 1.0)
    result = simulate(trace, cost, vram=max(share, k / (layers * per_layer)))
    assert result.decode_s_per_token is not None
    busiest = max(result.lanes, key=result.lanes.__getitem__)
    bound = "DRAM" if busiest == "CPU" and cost.cpu_expert > cost.cpu_token else BOUNDS[busiest]
    return result.decode_s_per_token * len(footprint.layers) / layers, bound
