"""What a scheduler returns: the plan of one layer, how to write one, and what makes one sound."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hybrimoe.errors import PlanError
from hybrimoe.policy.cost import SHARDS, CostModel
from hybrimoe.policy.jit import compiled
from hybrimoe.policy.planning import by_tokens, list_experts, makespan, relative
from hybrimoe.policy.routing import Load
from hybrimoe.policy.timeline import Array, Timeline

Core = Callable[[Array, Array, Array, Array, float, Array, Array], tuple[int, int, int, float]]
FAULTS = (
    "",
    "a result has the wrong length",
    "shards lie outside [0, shards]",
    "an expert with shards on the GPU is not exactly once in gpu",
    "an expert with shards on the CPU is not exactly once in cpu",
    "copies are not exactly the absent experts in gpu",
)


class Plan(NamedTuple):
    """Where the experts of one layer run."""

    gpu: Array  # experts on the GPU, in order; those in `copies` wait for their copy
    cpu: Array  # experts on the CPU, in order
    copies: Array  # absent experts copied now, in order
    shards: Array  # [A] how many of an activated expert's shards run on the GPU, the CPU the rest
    makespan: float  # predicted seconds from the layer's start to the join


def place(load: Load, ready: Array, on_gpu: Array, timeline: Timeline, cost: CostModel) -> Plan:
    """The plan that runs the experts where `on_gpu` [A] is true on the GPU, the rest on the CPU."""
    share = np.where(on_gpu, cost.shards, 0).astype(np.int32)
    return place_shards(load, ready, share, timeline, cost)


def place_shards(
    load: Load, ready: Array, share: Array, timeline: Timeline, cost: CostModel
) -> Plan:
    """The plan that runs `share` [A] shards of each expert on the GPU, the rest on the CPU."""
    out = np.empty((4, share.size), np.int32)
    out[3] = share
    free, now = timeline.free, timeline.now
    gpu, cpu, copies, seconds = _place(
        load.experts, load.tokens, ready, free, now, cost.vector, out
    )
    return Plan(out[0, :gpu], out[1, :cpu], out[2, :copies], out[3], seconds)


def plan_by(core: Core, load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> Plan:
    """The plan of a compiled core, which fills [4, A] with its lists and shards."""
    out = np.empty((4, ready.size), np.int32)
    gpu, cpu, copies, seconds = core(
        load.experts, load.tokens, ready, timeline.free, timeline.now, cost.vector, out
    )
    return Plan(out[0, :gpu], out[1, :cpu], out[2, :copies], out[3], seconds)


def validate(plan: Plan, load: Load, ready: Array, shards: int, name: str = "a plan") -> None:
    """Raise PlanError unless every shard of every activated expert runs exactly once.

    name: the policy that made the plan, for the message.
    """
    try:
        fault = _fault(load.experts, ready, shards, plan.gpu, plan.cpu, plan.copies, plan.shards)
    except (TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"{name} returned no plan: {error}") from error
    if fault:
        raise PlanError(
            f"{name} broke its contract in layer {load.layer}: {FAULTS[fault]} (activated "
            f"{load.experts.tolist()}, gpu {plan.gpu.tolist()}, cpu {plan.cpu.tolist()}, "
            f"copies {plan.copies.tolist()}, shards {plan.shards.tolist()} of {shards})"
        )
    if not math.isfinite(plan.makespan):
        raise PlanError(f"{name} predicts {plan.makespan} seconds for layer {load.layer}")


@compiled
def left_to_cpu(share: Array, tokens: Array, shards: int) -> tuple[float, float]:
    """Experts that the CPU computes of a plan's `share` [A], and their tokens; parts count as parts."""
    experts = computed = 0
    for i in range(share.size):
        experts += shards - share[i]
        computed += (shards - share[i]) * tokens[i]
    return experts / shards, computed / shards


@compiled
def _place(
    experts: Array, tokens: Array, ready: Array, free: Array, now: float, cost: Array, out: Array
) -> tuple[int, int, int, float]:
    order = by_tokens(tokens)
    seconds = makespan(tokens, ready, relative(free, now), cost, out[3], order)
    gpu, cpu, copies = list_experts(experts, ready, int(cost[SHARDS]), out, order)
    return gpu, cpu, copies, seconds


@compiled
def _fault(
    experts: Array, ready: Array, shards: int, gpu: Array, cpu: Array, copies: Array, share: Array
) -> int:
    """Index into FAULTS of the first broken rule, 0 where the plan is sound."""
    if share.size != experts.size or copies.size > gpu.size:
        return 1
    on_gpu = on_cpu = copied = 0
    for i in range(experts.size):
        if share[i] < 0 or share[i] > shards:
            return 2
        times_gpu = times_cpu = times_copied = 0
        for e in gpu:
            times_gpu += e == experts[i]
        for e in cpu:
            times_cpu += e == experts[i]
        for e in copies:
            times_copied += e == experts[i]
        if times_gpu != (share[i] > 0):
            return 3
        if times_cpu != (share[i] < shards):
            return 4
        if times_copied != (share[i] > 0 and ready[i] == np.inf):
            return 5
        on_gpu, on_cpu, copied = on_gpu + times_gpu, on_cpu + times_cpu, copied + times_copied
    if on_gpu != gpu.size or on_cpu != cpu.size or copied != copies.size:
        return 3 if on_gpu != gpu.size else 4 if on_cpu != cpu.size else 5
    return 0
