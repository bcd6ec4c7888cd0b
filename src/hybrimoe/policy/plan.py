"""What a scheduler returns: the plan of one layer, how to write one, and what makes one sound."""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from hybrimoe.errors import PlanError
from hybrimoe.policy.cost import (
    EXPERT,
    EXPERT_CONTENDED,
    FIRST,
    GPU_TOKEN,
    LATENCY,
    LAUNCH,
    LOAD,
    LOAD_CONTENDED,
    READ,
    SHARDS,
    TOKEN,
    CostModel,
)
from hybrimoe.policy.jit import compiled, inlined, inner
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


@compiled
def makespan(
    tokens: Array, ready: Array, lanes: Array, cost: Array, share: Array, order: Array
) -> float:
    """Seconds from the layer's start until the last expert is done."""
    gpu, link, start, alone, contended = ends(tokens, ready, lanes, cost, share, order)
    if alone == 0.0:
        return float(gpu)
    return float(max(gpu, cpu_end(start, alone, contended, link)))


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


CPU, GPU, LINK = 0, 1, 2
BETTER = 1 - 1e-9  # a plan must beat another by more than rounding before it replaces it


@inlined
def cpu_s(n: int, cost: Array) -> float:
    """Seconds of one expert on the CPU, without the first expert's extra."""
    return float(cost[EXPERT] + cost[TOKEN] * n)


@inlined
def gpu_s(n: int, part: float, cost: Array) -> float:
    """Seconds of a part of one expert on the GPU."""
    return float(max(cost[READ], cost[GPU_TOKEN] * n) * part + cost[LAUNCH])


@compiled
def cpu_end(start: float, alone: float, contended: float, link_end: float) -> float:
    """When CPU work ends that runs at its contended speed for as long as the link is busy.

    alone, contended: seconds of the same work at either speed.
    """
    overlap = link_end - start
    if overlap <= 0.0 or alone <= 0.0:
        return start + alone
    if contended <= overlap:
        return start + contended
    return start + overlap + alone * (1.0 - overlap / contended)


@compiled
def by_tokens(tokens: Array) -> Array:
    """Indices by falling tokens; ties keep their order, so that plans are reproducible."""
    order = np.arange(tokens.size)
    for i in range(1, tokens.size):
        j = i
        while j > 0 and tokens[order[j - 1]] < tokens[order[j]]:
            order[j - 1], order[j] = order[j], order[j - 1]
            j -= 1
    return order


@inner
def ends(
    tokens: Array, ready: Array, lanes: Array, cost: Array, share: Array, order: Array
) -> tuple[float, float, float, float, float]:
    """When GPU and link end, when the CPU's experts start, and their seconds alone and contended.

    The GPU takes residents, then experts on the wire, then copies, each by falling tokens; the
    link is in that order too, so nothing waits for a later arrival.
    """
    shards = cost[SHARDS]
    alone, contended = 0.0, 0.0
    gpu, link, wire, copied = lanes[GPU], lanes[LINK], 0, 0
    for i in order:
        part = share[i] / shards
        if share[i] < shards:
            alone += (1 - part) * cpu_s(tokens[i], cost)
            contended += (1 - part) * (cost[EXPERT_CONTENDED] + cost[TOKEN] * tokens[i])
        if share[i] > 0:
            if ready[i] == 0.0:
                gpu += gpu_s(tokens[i], part, cost)
            elif ready[i] == np.inf:
                copied += 1
            else:
                wire += 1
    if wire:
        gpu = _wire(tokens, ready, cost, share, order, gpu)
    if copied:
        load = cost[LOAD_CONTENDED] if alone > 0.0 else cost[LOAD]
        for i in order:
            if share[i] > 0 and ready[i] == np.inf:
                link += cost[LATENCY] + load * share[i] / shards
                gpu = max(gpu, link) + gpu_s(tokens[i], share[i] / shards, cost)
    return gpu, link, lanes[CPU] + cost[FIRST], alone, contended


@inner
def _wire(
    tokens: Array, ready: Array, cost: Array, share: Array, order: Array, gpu: float
) -> float:
    """The GPU's end after the experts that are on the wire, in the order they arrive."""
    last = 0.0
    while True:
        arrival = np.inf
        for i in order:
            if share[i] > 0 and last < ready[i] < arrival:
                arrival = ready[i]
        if arrival == np.inf:
            return float(gpu)
        for i in order:
            if share[i] > 0 and ready[i] == arrival:
                gpu = max(gpu, arrival) + gpu_s(tokens[i], share[i] / cost[SHARDS], cost)
        last = arrival


@inner
def relative(free: Array, now: float) -> Array:
    """[4] seconds until each lane is free."""
    return np.maximum(free - now, 0.0)


@inner
def list_experts(
    experts: Array, ready: Array, shards: int, out: Array, order: Array
) -> tuple[int, int, int]:
    """Write the lists of a plan whose shards stand in out[3]: residents, arrivals, copies; CPU."""
    gpu = cpu = copies = 0
    for i in order[::-1]:
        if out[3, i] < shards:
            out[1, cpu] = experts[i]
            cpu += 1
    last = -1.0
    while True:
        arrival = np.inf
        for i in order:
            if out[3, i] > 0 and last < ready[i] < arrival:
                arrival = ready[i]
        for i in order:
            if out[3, i] > 0 and ready[i] == arrival:
                out[0, gpu] = experts[i]
                gpu += 1
                if arrival == np.inf:
                    out[2, copies] = experts[i]
                    copies += 1
        if arrival == np.inf:
            return gpu, cpu, copies
        last = arrival
