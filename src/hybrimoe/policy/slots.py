"""Compiled book-keeping of the cache: counts, scores, the victim search."""

import numpy as np

from hybrimoe.policy.jit import compiled, inlined, inner
from hybrimoe.policy.timeline import Array

RATE = 0.05  # weight of the newest step in UsageStats.rate: the last twenty steps count most


@compiled
def ready_times(
    slot: Array, arrival: Array, layer: int, experts: Array, now: float, times: Array
) -> None:
    """times [A] = seconds from now until each expert is there, inf without a slot."""
    for i in range(experts.size):
        s = slot[layer, experts[i]]
        times[i] = np.inf if s < 0 else max(arrival[s] - now, 0.0)


@compiled
def tally(ready: Array) -> tuple[int, int]:
    """How many experts are there, and how many absent."""
    here = absent = 0
    for r in ready:
        here += r == 0.0
        absent += r == np.inf
    return here, absent


@compiled
def lacks_any(slot: Array, sizes: Array, first: int, end: int) -> bool:
    """Whether any expert of the layers from `first` to before `end` has no slot."""
    for layer in range(first, end):
        for s in slot[layer, : sizes[layer]]:
            if s < 0:
                return True
    return False


@compiled
def place_in_slots(wave: Array, on_gpu: Array, ids: Array, nowhere: int) -> tuple[Array, Array]:
    """What a launch over slots is called with: ids [T, K] int64 as slots, and shards per slot.

    wave [N, 2]: experts and their slots; ids of others become `nowhere`, the row behind all slots.
    on_gpu [E]: shards of each expert to compute. shards [nowhere + 1, 2] int32: their range.
    """
    table = np.full(on_gpu.size, nowhere, np.int64)
    shards = np.zeros((nowhere + 1, 2), np.int32)
    for expert, slot in wave:
        table[expert] = slot
        shards[slot, 1] = on_gpu[expert]
    placed = np.empty(ids.shape, np.int64)
    for t in range(ids.shape[0]):
        for k in range(ids.shape[1]):
            placed[t, k] = table[ids[t, k]]
    return placed, shards


@compiled
def note(
    layer: int,
    experts: Array,
    tokens: Array,
    tick: int,
    top_k: int,
    steps: Array,
    count: Array,
    last: Array,
    previous: Array,
    rate: Array,
) -> None:
    """Count one load. A load of T tokens moves the rates as T steps of its mean would."""
    steps[layer] += 1
    total = 0
    for n in tokens:
        total += n
    rows = max(total / top_k, 1.0)
    keep = (1.0 - RATE) ** rows
    for e in range(rate.shape[1]):
        rate[layer, e] *= keep
    for i in range(experts.size):
        e = experts[i]
        count[layer, e] += tokens[i]
        previous[layer, e] = last[layer, e]
        last[layer, e] = tick
        rate[layer, e] += (1.0 - keep) * min(tokens[i] / rows, 1.0)


@compiled
def top_p_update(
    score: Array, layer: int, scores: Array, tokens: Array, top_k: int, p: int, alpha: float
) -> None:
    """score[layer] = alpha * TopP(mean scores) + (1 - alpha) * score[layer], once per token."""
    total = 0
    for n in tokens:
        total += n
    rows = max(total / top_k, 1.0)
    keep = 1.0 - alpha if rows == 1.0 else (1.0 - alpha) ** rows
    least = _threshold(scores, p)
    for e in range(scores.size):
        s = scores[e] / rows if scores[e] >= least else 0.0
        score[layer, e] = (1.0 - keep) * s + keep * score[layer, e]


@inner
def _threshold(scores: Array, p: int) -> float:
    """The p-th largest score, or the smallest where there are fewer."""
    if p >= scores.size:
        return -np.inf
    largest = np.full(p, -np.inf)
    for s in scores:
        if s > largest[p - 1]:
            j = p - 1
            while j > 0 and largest[j - 1] < s:
                largest[j] = largest[j - 1]
                j -= 1
            largest[j] = s
    return float(largest[p - 1])


@compiled
def evict(
    worth: Array,
    owner: Array,
    references: Array,
    arrival: Array,
    occupied: Array,
    quota: Array,
    floor: int,
    by_layer: bool,
    layer: int,
    keep: Array,
    now: float,
) -> tuple[int, float]:
    """The slot `layer` may take and what its expert is worth: -inf if empty, (-1, inf) for none."""
    within = not by_layer or occupied[layer] < quota[layer]
    chosen, least = -1, np.inf
    for s in range(owner.shape[0]):
        held = owner[s, 0]
        if held < 0:
            if within and references[s] == 0:
                return s, -np.inf
            continue
        if references[s] > 0 or arrival[s] > now:
            continue
        if held != layer and (by_layer or occupied[held] <= floor):
            continue
        value = worth[held, owner[s, 1]]
        if value < least:
            if held == layer and _among(owner[s, 1], keep):
                continue
            chosen, least = s, value
    return chosen, least


@inlined
def _among(expert: int, experts: Array) -> bool:
    for e in experts:  # noqa: SIM110 (compiled: a generator would be slower)
        if e == expert:
            return True
    return False


@compiled
def occupy(
    owner: Array,
    occupied: Array,
    slot: Array,
    generation: Array,
    taken: int,
    layer: int,
    expert: int,
) -> None:
    """Hand a slot to an expert and stamp it anew."""
    if owner[taken, 0] >= 0:
        slot[owner[taken, 0], owner[taken, 1]] = -1
        occupied[owner[taken, 0]] -= 1
    owner[taken, 0] = layer
    owner[taken, 1] = expert
    slot[layer, expert] = taken
    occupied[layer] += 1
    generation[taken] += 1


@compiled
def claim(
    worth: Array,
    owner: Array,
    references: Array,
    arrival: Array,
    occupied: Array,
    quota: Array,
    floor: int,
    by_layer: bool,
    layer: int,
    keep: Array,
    now: float,
    slot: Array,
    generation: Array,
    expert: int,
    admission: bool,
) -> tuple[int, int, int, int]:
    """Evict and occupy in one call: (slot, its stamp, the victim's layer and expert), slot -1 for
    no."""
    taken, least = evict(
        *(worth, owner, references, arrival, occupied, quota, floor, by_layer, layer, keep, now)
    )
    if taken < 0 or (admission and worth[layer, expert] <= least):
        return -1, 0, -1, -1
    victim_layer, victim = owner[taken, 0], owner[taken, 1]
    occupy(owner, occupied, slot, generation, taken, layer, expert)
    arrival[taken] = now
    return taken, generation[taken], victim_layer, victim


@compiled
def claim_each(
    worth: Array,
    owner: Array,
    references: Array,
    arrival: Array,
    occupied: Array,
    quota: Array,
    floor: int,
    by_layer: bool,
    layer: int,
    keep: Array,
    now: float,
    slot: Array,
    generation: Array,
    wanted: Array,
    limit: int,
    admission: bool,
    claims: Array,
) -> int:
    """Claim slots for up to `limit` of the absent experts among `wanted`, worthiest first.

    claims [A, 5]: expert, slot, stamp, and the victim's layer and expert of each claim that
    succeeded; returns how many did.
    """
    tried = np.zeros(wanted.size, np.bool_)
    count = 0
    while count < limit:
        best = _worthiest(worth, slot, layer, wanted, tried)
        if best < 0:
            break
        tried[best] = True
        found = claim(
            *(worth, owner, references, arrival, occupied, quota, floor, by_layer, layer, keep),
            *(now, slot, generation, wanted[best], admission),
        )
        if found[0] < 0:
            break  # what is worth less will not get a slot either
        claims[count, 0] = wanted[best]
        claims[count, 1], claims[count, 2], claims[count, 3], claims[count, 4] = found
        count += 1
    return count


@compiled
def claim_copies(
    worth: Array,
    owner: Array,
    references: Array,
    arrival: Array,
    occupied: Array,
    quota: Array,
    floor: int,
    by_layer: bool,
    layer: int,
    experts: Array,
    now: float,
    slot: Array,
    generation: Array,
    share: Array,
    shards: int,
    least: int,
    admission: bool,
    rows: Array,
) -> None:
    """Claim slots for the experts a plan copies, worthiest first; their order stays the plan's.

    experts, share [A]: the layer's, and how many of `shards` the plan copies of each; of fewer than
    `least` nothing stays. rows [n, 6]: expert on entry; then its shards, slot (-1 for none), stamp,
    and the victim's layer and expert. An expert copied in part has not arrived until the rest has.
    """
    count = rows.shape[0]
    copies, tried = rows[:, 0], np.zeros(count, np.bool_)
    for n in range(count):
        for i in range(experts.size):
            if experts[i] == copies[n]:
                rows[n, 1] = share[i]
        rows[n, 2] = rows[n, 3] = rows[n, 4] = rows[n, 5] = -1
        tried[n] = rows[n, 1] < least
    while True:
        best = _worthiest(worth, slot, layer, copies, tried)
        if best < 0:
            return
        tried[best] = True
        found = claim(
            *(worth, owner, references, arrival, occupied, quota, floor, by_layer, layer, experts),
            *(now, slot, generation, copies[best], admission),
        )
        if found[0] < 0:
            return
        rows[best, 2], rows[best, 3], rows[best, 4], rows[best, 5] = found
        if rows[best, 1] < shards:
            arrival[found[0]] = np.inf


@inner
def _worthiest(worth: Array, slot: Array, layer: int, wanted: Array, tried: Array) -> int:
    """Which of the absent experts that were not tried yet is worth most, -1 for none."""
    best = -1
    for i in range(wanted.size):
        free = not tried[i] and slot[layer, wanted[i]] < 0
        if free and (best < 0 or worth[layer, wanted[i]] > worth[layer, wanted[best]]):
            best = i
    return best


@compiled
def hold_slots(slot: Array, layer: int, experts: Array, references: Array, held: Array) -> int:
    """Add a reference to the slot of each expert that has one: held[:n] are those, returns n."""
    count = 0
    for e in experts:
        s = slot[layer, e]
        if s >= 0:
            references[s] += 1
            held[count] = s
            count += 1
    return count


@compiled
def release_slots(slots: Array, references: Array) -> int:
    """Take a reference away from each slot; returns the least count that is left."""
    least = 0
    for s in slots:
        references[s] -= 1
        least = min(least, references[s])
    return least
