"""Compiled books of what follows what, and the search for absent experts that are worth a slot."""

import numpy as np

from hybrimoe.policy.jit import compiled
from hybrimoe.policy.timeline import Array


@compiled
def follow(
    follows: Array,
    seen: Array,
    layer: int,
    size: int,
    experts: Array,
    tokens: Array,
    top_k: int,
    rate: float,
) -> None:
    """Move the rows of the experts `seen` before towards what is activated now.

    follows [L, E, E]: share of the tokens that used expert f right after a step that used e.
    seen [L, E]: 1 for the experts of the step before, which then are replaced. size: the layer's
    experts; a load of most of them, as prefill's, neither learns nor is learnt from.
    """
    before, table = seen[layer], follows[layer]
    total = 0
    for n in tokens:
        total += n
    rows = max(total / top_k, 1.0)
    if 2 * experts.size <= size:
        for e in range(before.size):
            if before[e] > 0:
                for f in range(before.size):
                    table[e, f] *= 1.0 - rate
                for i in range(experts.size):
                    table[e, experts[i]] += rate * min(tokens[i] / rows, 1.0)
    before[:] = 0
    if 2 * experts.size <= size:
        for e in experts:
            before[e] = 1


@compiled
def blend(
    score: Array,
    recent: Array,
    follows: Array,
    layer: int,
    experts: Array,
    tokens: Array,
    weight: float,
) -> None:
    """score[layer] = recent[layer] + weight * mean over this step's tokens of the rows they saw."""
    total = 0
    for n in tokens:
        total += n
    out = score[layer]
    for f in range(out.size):  # assigned as a whole, numba compiles an error's text for 3 s
        out[f] = recent[layer, f]
    for i in range(experts.size):
        share = weight * tokens[i] / max(total, 1)
        for f in range(out.size):
            out[f] += share * follows[layer, experts[i], f]


@compiled
def by_worth(
    worth: Array, layer: int, experts: Array, tokens: Array, ready: Array
) -> tuple[Array, Array]:
    """Experts and their tokens with the worthiest first, ties as they were; `ready` in place.

    Schedulers break ties by this order, so of equal experts they copy the one that will stay.
    """
    ordered, counts = experts.copy(), tokens.copy()
    for i in range(1, ordered.size):
        j = i
        while j > 0 and worth[layer, ordered[j - 1]] < worth[layer, ordered[j]]:
            ordered[j - 1], ordered[j] = ordered[j], ordered[j - 1]
            counts[j - 1], counts[j] = counts[j], counts[j - 1]
            ready[j - 1], ready[j] = ready[j], ready[j - 1]
            j -= 1
    return ordered, counts


@compiled
def most_wanted(
    worth: Array,
    slot: Array,
    sizes: Array,
    owner: Array,
    references: Array,
    arrival: Array,
    layer: int,
    window: int,
    now: float,
) -> tuple[int, int]:
    """(layer, expert) of the swap within a layer that gains most worth, (-1, -1) for none.

    sizes [L]: experts of each layer. Looks at `layer` and the `window` - 1 layers that ran before it;
    slots in use or on the wire cannot be swapped.
    """
    layers = worth.shape[0]
    least = np.full(layers, np.inf)
    for s in range(owner.shape[0]):
        held = owner[s, 0]
        if held >= 0 and references[s] == 0 and arrival[s] <= now:
            least[held] = min(least[held], worth[held, owner[s, 1]])
    best, where, expert = 0.0, -1, -1
    for back in range(min(window, layers)):
        held = (layer - back) % layers
        if least[held] == np.inf:
            continue
        for e in range(sizes[held]):
            if slot[held, e] < 0 and worth[held, e] - least[held] > best:
                best, where, expert = worth[held, e] - least[held], held, e
    return where, expert
