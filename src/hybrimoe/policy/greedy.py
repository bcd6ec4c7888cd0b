"""The paper's greedy on three timelines, with refusal: the core of `Hybrid`.

Arguments as in `planning`.
"""

import numpy as np

from hybrimoe.policy.cost import FIRST, LATENCY, LOAD_CONTENDED, SHARDS
from hybrimoe.policy.jit import compiled, inlined, inner
from hybrimoe.policy.plan import (
    BETTER,
    CPU,
    GPU,
    LINK,
    by_tokens,
    cpu_s,
    gpu_s,
    list_experts,
    makespan,
    relative,
)
from hybrimoe.policy.timeline import Array


@compiled
def plan_hybrid(
    experts: Array, tokens: Array, ready: Array, free: Array, now: float, cost: Array, out: Array
) -> tuple[int, int, int, float]:
    """Write a plan into `out` [4, A] and return the lengths of its three lists and its makespan."""
    order = by_tokens(tokens)
    seconds = hybrid(tokens, ready, relative(free, now), cost, out[3], order)
    gpu, cpu, copies = list_experts(experts, ready, int(cost[SHARDS]), out, order)
    return gpu, cpu, copies, seconds


@compiled
def gains_hybrid(
    tokens: Array,
    ready: Array,
    free: Array,
    now: float,
    cost: Array,
    arrival: float,
    gains: Array,
) -> None:
    """gains [A] = seconds saved if that expert were there `arrival` after the start."""
    order, lanes = by_tokens(tokens), relative(free, now)
    share, moved = np.empty(tokens.size, np.int32), ready.copy()
    before = hybrid(tokens, moved, lanes, cost, share, order)
    for i in range(tokens.size):
        gains[i] = 0.0
        if ready[i] > arrival:
            moved[i] = arrival
            gains[i] = before - hybrid(tokens, moved, lanes, cost, share, order)
            moved[i] = ready[i]


@inner
def hybrid(
    tokens: Array, ready: Array, lanes: Array, cost: Array, share: Array, order: Array
) -> float:
    """The paper's greedy (section IV-B) or a pure mode, then single moves while they save time."""
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
            for i in range(tokens.size):
                share[i] = trial[i]
    return float(_refuse(tokens, ready, lanes, cost, share, order, best))


@inner
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


@inlined
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


@inner
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
