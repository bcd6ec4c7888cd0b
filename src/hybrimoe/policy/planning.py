"""The compiled planning cores: small arrays in, shards per expert and the makespan out.

All cores share these arguments. tokens [A] int32; ready [A] float64, seconds from the layer's start
until an expert's weights are on the GPU, 0 for a resident and inf for an absent one; lanes [4]
float64, seconds until each lane is free; cost [11] float64, `CostModel.vector`; share [A] int32,
the result: how many of an expert's shards run on the GPU, the CPU computing the rest.

Unlike the kernels these return a number: the makespan is what a plan is compared by.
"""

import numpy as np

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
)
from hybrimoe.policy.jit import compiled, inlined, inner
from hybrimoe.policy.timeline import Array

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


@compiled
def makespan(
    tokens: Array, ready: Array, lanes: Array, cost: Array, share: Array, order: Array
) -> float:
    """Seconds from the layer's start until the last expert is done."""
    gpu, link, start, alone, contended = ends(tokens, ready, lanes, cost, share, order)
    if alone == 0.0:
        return float(gpu)
    return float(max(gpu, cpu_end(start, alone, contended, link)))


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
