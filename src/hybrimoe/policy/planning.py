"""The compiled planning cores: small arrays in, shards per expert and the makespan out.

All cores share these arguments. tokens [A] int32; ready [A] float64, seconds from the layer's start
until an expert's weights are on the GPU, 0 for a resident and inf for an absent one; lanes [4]
float64, seconds until each lane is free; cost [11] float64, `CostModel.vector`; share [A] int32,
the result: how many of an expert's shards run on the GPU, the CPU computing the rest.

Unlike the kernels these return a number: the makespan is what a plan is compared by.
"""

import numpy as np
from numba import njit

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
from hybrimoe.policy.timeline import Array

CPU, GPU, LINK = 0, 1, 2
BETTER = 1 - 1e-9  # a plan must beat another by more than rounding before it replaces it


@njit(cache=True, inline="always")
def cpu_s(n: int, cost: Array) -> float:
    """Seconds of one expert on the CPU, without the first expert's extra."""
    return float(cost[EXPERT] + cost[TOKEN] * n)


@njit(cache=True, inline="always")
def gpu_s(n: int, part: float, cost: Array) -> float:
    """Seconds of a part of one expert on the GPU."""
    return float(max(cost[READ], cost[GPU_TOKEN] * n) * part + cost[LAUNCH])


@njit(cache=True)
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


@njit(cache=True)
def by_tokens(tokens: Array) -> Array:
    """Indices by falling tokens; ties keep their order, so that plans are reproducible."""
    order = np.arange(tokens.size)
    for i in range(1, tokens.size):
        j = i
        while j > 0 and tokens[order[j - 1]] < tokens[order[j]]:
            order[j - 1], order[j] = order[j], order[j - 1]
            j -= 1
    return order


@njit(cache=True)
def makespan(
    tokens: Array, ready: Array, lanes: Array, cost: Array, share: Array, order: Array
) -> float:
    """Seconds from the layer's start until the last expert is done."""
    gpu, link, start, alone, contended = ends(tokens, ready, lanes, cost, share, order)
    if alone == 0.0:
        return float(gpu)
    return float(max(gpu, cpu_end(start, alone, contended, link)))


@njit(cache=True)
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


@njit(cache=True)
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


@njit(cache=True)
def hybrid(tokens: Array, ready: Array, lanes: Array, cost: Array, share: Array) -> float:
    """The paper's greedy (section IV-B) or a pure mode, then single moves while they save time."""
    order = by_tokens(tokens)
    _greedy(tokens, ready, lanes, cost, share, order)
    best = makespan(tokens, ready, lanes, cost, share, order)
    trial = np.empty_like(share)
    for mode in range(3):
        for i in range(tokens.size):
            on_gpu = mode == 1 or (mode == 0 and ready[i] < np.inf)
            trial[i] = np.int32(cost[SHARDS]) if on_gpu else 0
        seconds = makespan(tokens, ready, lanes, cost, trial, order)
        if seconds < best:
            best = seconds
            share[:] = trial
    return float(_refuse(tokens, ready, lanes, cost, share, order, best))


@njit(cache=True)
def _greedy(
    tokens: Array, ready: Array, lanes: Array, cost: Array, share: Array, order: Array
) -> None:
    """Give the timeline that would finish its own next operation first that operation.

    GPU: the cached expert with most tokens. CPU: the uncached one with fewest, then cached ones.
    Link: the uncached one with most, which then is a cached one that arrives late.
    """
    shards, count = np.int32(cost[SHARDS]), tokens.size
    where = np.empty(count)
    absent, gpu_left, cpu_left = 0, 0.0, 0.0
    for i in range(count):
        where[i] = ready[i]
        share[i] = -1
        if ready[i] == np.inf:
            absent += 1
            cpu_left += cpu_s(tokens[i], cost)
        else:
            gpu_left += gpu_s(tokens[i], 1.0, cost)
    gpu, cpu, link = lanes[GPU], lanes[CPU] + cost[FIRST], lanes[LINK]
    load = cost[LATENCY] + cost[LOAD_CONTENDED]
    for _ in range(2 * count):
        top, high, low, steal = _queues(where, share, order)
        if top < 0 and high < 0:
            return
        gpu_done = cpu_done = link_done = np.inf
        if top >= 0:
            gpu_done = max(gpu, where[top]) + gpu_s(tokens[top], 1.0, cost)
        taken = low if absent > 0 else steal
        cpu_done = cpu + cpu_s(tokens[taken], cost)
        if absent == 0 and cpu_done >= gpu + gpu_left:
            cpu_done = np.inf  # stealing it would not relieve the GPU in time
        if absent > 0:
            arrival = link + load
            if max(arrival, gpu) + gpu_s(tokens[high], 1.0, cost) < cpu + cpu_left:
                link_done = arrival  # else the CPU, which takes it last, is done sooner
        if gpu_done <= cpu_done and gpu_done <= link_done:
            gpu, share[top] = gpu_done, shards
            gpu_left -= gpu_s(tokens[top], 1.0, cost)
        elif cpu_done <= link_done:
            cpu, share[taken] = cpu_done, 0
            if absent > 0:
                absent -= 1
                cpu_left -= cpu_s(tokens[taken], cost)
            else:
                gpu_left -= gpu_s(tokens[taken], 1.0, cost)
        else:
            link, where[high] = link_done, link_done
            absent -= 1
            cpu_left -= cpu_s(tokens[high], cost)
            gpu_left += gpu_s(tokens[high], 1.0, cost)


@njit(cache=True, inline="always")
def _queues(where: Array, share: Array, order: Array) -> tuple[int, int, int, int]:
    """First and last unassigned expert of each kind: cached most, uncached most and least, cached
    least."""
    top = high = low = steal = -1
    for i in order:
        if share[i] < 0:
            if where[i] == np.inf:
                low = i
                if high < 0:
                    high = i
            else:
                steal = i
                if top < 0:
                    top = i
    return top, high, low, steal


@njit(cache=True)
def _refuse(
    tokens: Array, ready: Array, lanes: Array, cost: Array, share: Array, order: Array, best: float
) -> float:
    """Move single experts back to where their weights are, or away, while that does not cost time.

    A copy that saves nothing is refused even where it costs nothing: the link has other uses.
    """
    shards = np.int32(cost[SHARDS])
    changed = True
    while changed:
        changed = False
        for i in order[::-1]:
            old = share[i]
            home = shards if ready[i] < np.inf else 0
            share[i] = 0 if old > 0 else shards
            seconds = makespan(tokens, ready, lanes, cost, share, order)
            bound = best if share[i] == home else best * BETTER
            if seconds < bound or (seconds == bound and share[i] == home):
                best = seconds
                changed = True
            else:
                share[i] = old
    return best


@njit(cache=True)
def split(tokens: Array, ready: Array, lanes: Array, cost: Array, share: Array) -> float:
    """The best of all plans that copy the k absent experts with most tokens, divide the next one
    between link and CPU, and let the CPU steal the s residents with fewest tokens."""
    order = by_tokens(tokens)
    shards = int(cost[SHARDS])
    here, missing, held = _sides(ready, order)
    for i in range(tokens.size):
        share[i] = shards if ready[i] < np.inf else 0
    best = makespan(tokens, ready, lanes, cost, share, order)
    stolen, whole, part = 0, 0, 0
    done = np.empty(held + 1)
    done[0] = lanes[GPU]
    for k in range(held):
        i = here[k]
        done[k + 1] = max(done[k], ready[i]) + gpu_s(tokens[i], 1.0, cost)
    for s in range(held + 1):
        if done[held - s] >= best:
            continue
        found, k, x = _divide(tokens, lanes, cost, here, missing, held, s, done[held - s], best)
        if found < best * BETTER:
            best, stolen, whole, part = found, s, k, x
    everywhere = np.full(tokens.size, np.int32(shards))
    seconds = makespan(tokens, ready, lanes, cost, everywhere, order)
    if seconds < best * BETTER:
        share[:] = everywhere
        return float(seconds)
    for k in range(held - stolen, held):
        share[here[k]] = 0
    for k in range(whole):
        share[missing[k]] = shards
    if part:
        share[missing[whole]] = part
    return float(makespan(tokens, ready, lanes, cost, share, order))


@njit(cache=True)
def _sides(ready: Array, order: Array) -> tuple[Array, Array, int]:
    """Experts that need no copy, residents first and then by arrival, and those that do."""
    here = np.empty(order.size, np.int64)
    missing = np.empty(order.size, np.int64)
    held = absent = 0
    for i in order:
        if ready[i] == np.inf:
            missing[absent] = i
            absent += 1
        else:
            j = held
            while j > 0 and ready[here[j - 1]] > ready[i]:
                here[j] = here[j - 1]
                j -= 1
            here[j] = i
            held += 1
    return here, missing[:absent], held


@njit(cache=True)
def _divide(
    tokens: Array,
    lanes: Array,
    cost: Array,
    here: Array,
    missing: Array,
    held: int,
    stolen: int,
    gpu: float,
    best: float,
) -> tuple[float, int, int]:
    """The best makespan with `stolen` residents on the CPU: (seconds, whole copies, shards of the
    next one)."""
    shards = int(cost[SHARDS])
    extra = cost[EXPERT_CONTENDED] - cost[EXPERT]
    start, link = lanes[CPU] + cost[FIRST], lanes[LINK]
    alone, experts = 0.0, 0.0
    for k in range(held - stolen, held):
        alone += cpu_s(tokens[here[k]], cost)
        experts += 1.0
    for i in missing:
        alone += cpu_s(tokens[i], cost)
        experts += 1.0
    if experts == 0.0:
        return np.inf, 0, 0
    whole, part = -1, 0
    for k in range(missing.size + 1):
        end = max(gpu, cpu_end(start, alone, alone + extra * experts, link))
        if end < best * BETTER:
            best, whole, part = end, k, 0
        if k == missing.size or (k == missing.size - 1 and stolen == 0 and shards == 1):
            break
        n, after = tokens[missing[k]], link + cost[LATENCY]
        for x in range(1, shards):
            arrival = after + cost[LOAD_CONTENDED] * x / shards
            done = max(gpu, arrival) + gpu_s(n, x / shards, cost)
            if done >= best:
                break
            left = alone - cpu_s(n, cost) * x / shards
            work = left + extra * (experts - x / shards)
            end = max(done, cpu_end(start, left, work, arrival))
            if end < best * BETTER:
                best, whole, part = end, k, x
        link = after + cost[LOAD_CONTENDED]
        gpu = max(gpu, link) + gpu_s(n, 1.0, cost)
        alone -= cpu_s(n, cost)
        experts -= 1.0
        if gpu >= best or (k == missing.size - 1 and stolen == 0):
            break  # more copies only end later; all on the GPU is tried by the caller
    return (best, whole, part) if whole >= 0 else (np.inf, 0, 0)
