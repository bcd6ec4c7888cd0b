"""Plans that divide one expert between link and CPU: the core of `Split`.

Arguments as in `planning`.
"""

import numpy as np

from hybrimoe.policy.cost import EXPERT, EXPERT_CONTENDED, FIRST, LATENCY, LOAD_CONTENDED, SHARDS
from hybrimoe.policy.jit import compiled, inner
from hybrimoe.policy.plan import (
    BETTER,
    CPU,
    GPU,
    LINK,
    by_tokens,
    cpu_end,
    cpu_s,
    gpu_s,
    list_experts,
    makespan,
    relative,
)
from hybrimoe.policy.timeline import Array


@compiled
def plan_split(
    experts: Array, tokens: Array, ready: Array, free: Array, now: float, cost: Array, out: Array
) -> tuple[int, int, int, float]:
    """Write a plan into `out` [4, A] and return the lengths of its three lists and its makespan."""
    order = by_tokens(tokens)
    seconds = split(tokens, ready, relative(free, now), cost, out[3], order)
    gpu, cpu, copies = list_experts(experts, ready, int(cost[SHARDS]), out, order)
    return gpu, cpu, copies, seconds


@compiled
def gains_split(
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
    before = split(tokens, moved, lanes, cost, share, order)
    for i in range(tokens.size):
        gains[i] = 0.0
        if ready[i] > arrival:
            moved[i] = arrival
            gains[i] = before - split(tokens, moved, lanes, cost, share, order)
            moved[i] = ready[i]


@inner
def split(
    tokens: Array, ready: Array, lanes: Array, cost: Array, share: Array, order: Array
) -> float:
    """The best of all plans that copy the k absent experts with most tokens, divide the next one
    between link and CPU, and let the CPU steal the s residents with fewest tokens."""
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
        for i in range(tokens.size):
            share[i] = shards
        return float(seconds)
    for k in range(held - stolen, held):
        share[here[k]] = 0
    for k in range(whole):
        share[missing[k]] = shards
    if part:
        share[missing[whole]] = part
    return float(makespan(tokens, ready, lanes, cost, share, order))


@inner
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


@inner
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
