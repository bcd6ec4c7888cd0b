"""Which experts are on the GPU: the one slot table, and who may take which slot.

`Cache` owns every array: the table, what is in use, and the books that its `Ranking` reads to say
what each expert is worth.
"""

from typing import NamedTuple

import numpy as np

from hybrimoe.errors import ConfigError, PolicyError
from hybrimoe.policy.rankings import Ranking, Static, UsageStats
from hybrimoe.policy.routing import Load
from hybrimoe.policy.slots import (
    claim,
    claim_copies,
    claim_each,
    evict,
    hold_slots,
    lacks_any,
    note,
    occupy,
    ready_times,
    release_slots,
)
from hybrimoe.policy.timeline import Array
from hybrimoe.policy.transitions import most_wanted
from hybrimoe.sizes import expert_counts

FLOOR = 0.75  # of an equal share: what one layer gives up beyond helps no other layer as much


class Move(NamedTuple):
    """One copy of an expert, or of some of its shards, into a slot."""

    layer: int
    expert: int
    slot: int
    generation: int  # what the slot's stamp is once the copy is ordered
    first: int = 0  # shards [first, last); last = -1 means to the end
    last: int = -1
    victim: tuple[int, int] = (-1, -1)  # (layer, expert) that gave up the slot


class Cache:
    """The slot table: which expert of which layer is in which slot, and who may take it.

    experts: how many a layer has, or [L] where layers differ; E is the most of any layer, and what a
        layer lacks of that never has a slot.
    slots: experts that fit. floor: slots that no other layer may take from a layer, in model scope.
    frequency: [L, E] how often each expert was used before, for quotas by frequency.
    staging: further slots, behind the others, for experts that pass through without staying.
    """

    def __init__(
        self,
        ranking: Ranking,
        slots: int,
        layers: int,
        experts: int | Array,
        top_k: int = 1,
        *,
        floor: int | None = None,
        frequency: Array | None = None,
        staging: int = 2,
    ) -> None:
        self.sizes = expert_counts(layers, experts)  # [L] experts of each layer
        self.ranking, self.staging = ranking, staging
        self.layers, self.experts = layers, int(self.sizes.max())
        _check(slots, self.experts, top_k, staging)
        self.books = UsageStats(layers, self.sizes, top_k)
        self.generation: Array = np.zeros(0, np.int64)
        self._least = floor
        self._by_layer = ranking.scope == "layer"
        self.crowded = False  # the latest load activated most experts of its layer
        self._within = self._by_layer
        self._staged = 0
        self._lay_out(slots, frequency)

    def _lay_out(self, slots: int, frequency: Array | None) -> None:
        """An empty table of so many slots; stamps go on from where they were."""
        layers, experts = self.layers, self.experts
        self.slots = min(slots, int(self.sizes.sum()))
        total, newest = self.slots + self.staging, int(self.generation.max(initial=-1))
        self.slot: Array = np.full((layers, experts), -1, np.int32)
        self.owner: Array = np.full((self.slots, 2), -1, np.int32)
        self.occupied: Array = np.zeros(layers, np.int32)
        self.references: Array = np.zeros(total, np.int32)
        self.generation = np.full(total, newest + 1, np.int64)
        self.arrival: Array = np.zeros(total)
        self._share_out(frequency)

    def _share_out(self, frequency: Array | None) -> None:
        """What of the slots is each layer's own, by the rules of the ranking."""
        ranking, share = self.ranking, self.slots // self.layers
        kept = 0 if ranking.frozen else int(FLOOR * share)
        self.floor = max(min(self.books.top_k, share), kept) if self._least is None else self._least
        self.quota = _equal(self.slots, self.sizes)
        if ranking.shares == "frequency" and frequency is not None:
            self.quota = quotas(frequency, self.slots, self.sizes)

    def rank_by(self, ranking: Ranking) -> None:
        """From now on another ranking decides, with new books; who is resident stays."""
        self.ranking, self.books = ranking, UsageStats(self.layers, self.sizes, self.books.top_k)
        self._by_layer = ranking.scope == "layer"
        self._within = self._by_layer or self.crowded
        self._share_out(None)

    def resident(self, layer: int) -> Array:
        """[E] bool: has a slot, be it still on the wire."""
        found: Array = self.slot[layer] >= 0
        return found

    def lacks(self, first: int, end: int) -> bool:
        """Whether any expert of the layers from `first` to before `end` has no slot."""
        return bool(lacks_any(self.slot, self.sizes, first, min(end, self.layers)))

    def ready(self, layer: int, experts: Array, now: float = 0.0) -> Array:
        """[A] seconds from now until each expert is on the GPU: 0 resident, inf absent."""
        times: Array = np.empty(experts.size)
        ready_times(self.slot, self.arrival, layer, experts, now, times)
        return times

    def observe(self, load: Load) -> None:
        """Learn from what a router asked for, hit or not.

        A pass that runs most experts of every layer, as prefill does, comes to the other layers'
        experts before it comes back: until the next load, slots do not move between layers.
        """
        books = self.books
        self.crowded = 2 * load.experts.size > self.sizes.item(load.layer)
        self._within = self._by_layer or self.crowded
        books.tick += 1
        note(
            load.layer,
            load.experts,
            load.tokens,
            books.tick,
            books.top_k,
            *(books.steps, books.count, books.last, books.previous, books.rate),
        )
        self.ranking.observe(books, load)

    def worth(self, layer: int) -> Array:
        """[E] what each expert of a layer is worth; the victim is the resident worth least."""
        worth: Array = self.ranking.worth(self.books)[layer]
        return worth

    def victim(
        self, layer: int, keep: Array | list[int] | None = None, now: float = 0.0
    ) -> tuple[int, float]:
        """The slot that `layer` would take next and what it is worth, (-1, inf) for none.

        An empty slot is worth -inf. Slots in use, on the wire, or of `keep` are never taken.
        """
        kept = _kept(keep)
        slot, worth = evict(
            self.ranking.worth(self.books),
            *(self.owner, self.references, self.arrival, self.occupied, self.quota),
            *(self.floor, self._within, layer, kept, now),
        )
        return int(slot), float(worth)

    def rate_in(self, slot: int) -> float:
        """How often the expert in a slot was used of late, 0 for an empty slot."""
        layer, expert = self.owner.item(slot, 0), self.owner.item(slot, 1)
        return 0.0 if layer < 0 else float(self.books.rate.item(layer, expert))

    def admit(
        self,
        layer: int,
        expert: int,
        keep: Array | list[int] | None = None,
        now: float = 0.0,
        force: bool = False,
        anywhere: bool = False,
    ) -> Move | None:
        """Give an absent expert a slot, or None where no slot is to be had or it is not worth one.

        force: ask only for a slot, not whether the ranking prefers the newcomer. anywhere: take it
        from any layer, even from one at its floor.
        """
        if self.slot[layer, expert] >= 0 or (self.ranking.frozen and not force):
            return None
        slot, generation, *victim = claim(
            self.ranking.worth(self.books),
            *(self.owner, self.references, self.arrival, self.occupied, self.quota),
            *(
                0 if anywhere else self.floor,
                self._within and not anywhere,
                layer,
                _kept(keep),
                now,
            ),
            *(self.slot, self.generation, expert, self.ranking.admission and not force),
        )
        if slot < 0:
            return None
        return Move(layer, expert, slot, generation, victim=(victim[0], victim[1]))

    def admit_best(self, layer: int, window: int, now: float) -> Move | None:
        """`admit` for the best swap in a layer or the `window` - 1 before it, None for no gain."""
        if self.ranking.frozen:
            return None
        worth = self.ranking.worth(self.books)
        table = (self.slot, self.sizes, self.owner, self.references, self.arrival)
        where, expert = most_wanted(worth, *table, layer, window, now)
        return None if where < 0 else self.admit(where, expert, None, now)

    def admit_each(
        self, layer: int, experts: Array, keep: Array, now: float, limit: int
    ) -> list[Move]:
        """`admit` for up to `limit` of the absent ones among these experts, worthiest first."""
        if self.ranking.frozen:
            return []
        claims: Array = np.empty((experts.size, 5), np.int64)
        count = claim_each(
            self.ranking.worth(self.books),
            *(self.owner, self.references, self.arrival, self.occupied, self.quota),
            *(self.floor, self._within, layer, keep, now),
            *(self.slot, self.generation, experts, limit, self.ranking.admission, claims),
        )
        return [
            Move(layer, expert, slot, generation, 0, -1, (victim_layer, victim))
            for expert, slot, generation, victim_layer, victim in claims[:count].tolist()
        ]

    def admit_copies(
        self, load: Load, copies: Array, share: Array, shards: int, now: float, least: int = 0
    ) -> list[list[int]]:
        """`admit` for the absent experts a plan copies, worthiest first, in the plan's order.

        share [A]: how many of an expert's `shards` are copied; with fewer than `least` it does not
        stay. Of each copy [expert, shards, slot, stamp, victim's layer, victim], slot -1 for none.
        """
        rows: Array = np.empty((copies.size, 6), np.int64)
        rows[:, 0] = copies
        least = shards + 1 if self.ranking.frozen else least
        claim_copies(
            self.ranking.worth(self.books),
            *(self.owner, self.references, self.arrival, self.occupied, self.quota),
            *(self.floor, self._within, load.layer, load.experts, now),
            *(self.slot, self.generation, share, shards, least, self.ranking.admission, rows),
        )
        return rows.tolist()

    def stage(self, layer: int, expert: int) -> Move:
        """A passing slot for an expert that is used once; they are taken in turn."""
        if self.staging == 0:
            raise PolicyError(
                f"expert {expert} of layer {layer} needs a staging slot, there is none"
            )
        slot = self.slots + self._staged % self.staging
        self._staged += 1
        self.generation[slot] += 1
        return Move(layer, expert, slot, int(self.generation[slot]))

    def hold(self, layer: int, experts: Array) -> Array:
        """Mark the slots of some experts as in use; returns them for `release`."""
        slots: Array = np.empty(experts.size, np.int64)
        return slots[: hold_slots(self.slot, layer, experts, self.references, slots)]

    def release(self, slots: Array) -> None:
        """The reverse of `hold`."""
        if release_slots(slots, self.references) < 0:
            raise PolicyError(f"slots {slots.tolist()} were released more often than held")

    def drop(self, layer: int, expert: int) -> None:
        """Give up an expert's slot, for instance because its copy failed."""
        slot = int(self.slot[layer, expert])
        if slot < 0:
            return
        if self.references[slot]:
            raise PolicyError(f"slot {slot} of expert {expert}, layer {layer}, is in use")
        self.slot[layer, expert] = -1
        self.owner[slot] = -1
        self.arrival[slot] = 0.0
        self.generation[slot] += 1
        self.occupied[layer] -= 1

    def resize(self, slots: int) -> list[Move]:
        """Start again with so many slots: nothing is in use, and the worthiest experts return.

        What was observed is kept. Every stamp is newer than those before, so that a copy ordered
        earlier is known to be stale. Returns what to copy.
        """
        _check(slots, self.experts, self.books.top_k, self.staging)
        worth = np.asarray(self.ranking.worth(self.books), np.float64)
        self._lay_out(slots, self.books.count if self.books.tick else None)
        return self.fill(worth)

    def fill(self, frequency: Array | None = None) -> list[Move]:
        """Take the empty slots for the most frequent experts [L, E], and say what to copy."""
        frequency = np.zeros((self.layers, self.experts)) if frequency is None else frequency
        whole = isinstance(self.ranking, Static) and self.ranking.by == "layer"
        wanted = _whole_layers(self) if whole else _most_frequent(self, frequency)
        moves = []
        for layer, expert in wanted:
            if self.slot[layer, expert] < 0:
                slot = int(np.flatnonzero(self.owner[:, 0] < 0)[0])
                occupy(self.owner, self.occupied, self.slot, self.generation, slot, layer, expert)
                self.arrival[slot] = 0.0
                moves.append(Move(layer, expert, slot, int(self.generation[slot])))
        return moves


def quotas(frequency: Array, slots: int, sizes: Array | None = None) -> Array:
    """[L] slots per layer that hit most often if each layer keeps its most frequent experts.

    This is AdapMoE's dynamic programme: a layer's gain from one more slot only falls, so taking the
    largest gain each time is the optimum. sizes: [L] experts of each layer, None for all E.
    """
    gains = -np.sort(-frequency / np.maximum(frequency.sum(axis=1, keepdims=True), 1e-300), axis=1)
    if sizes is not None:
        gains[np.arange(gains.shape[1]) >= sizes[:, None]] = -np.inf
    best = np.argsort(-gains, axis=None, kind="stable")[:slots]
    return np.bincount(best // frequency.shape[1], minlength=frequency.shape[0]).astype(np.int32)


def _kept(keep: Array | list[int] | None) -> Array:
    return np.zeros(0, np.int32) if keep is None else np.asarray(keep, np.int32)


def _equal(slots: int, sizes: Array) -> Array:
    """[L] slots dealt out evenly; what a layer has no experts for goes to the others."""
    share: Array = np.zeros(sizes.size, np.int32)
    while left := min(slots, int(sizes.sum())) - int(share.sum()):
        lacking = np.flatnonzero(share < sizes)[:left]
        share[lacking] += np.minimum(left // lacking.size, (sizes - share)[lacking])
    return share


def _whole_layers(cache: Cache) -> list[tuple[int, int]]:
    pairs = [(layer, e) for layer, size in enumerate(cache.sizes.tolist()) for e in range(size)]
    return pairs[: cache.slots]


def _most_frequent(cache: Cache, frequency: Array) -> list[tuple[int, int]]:
    """Each layer's quota or floor of its most frequent experts, then the best of the others.

    Where slots move between layers later, layers start alike: long prompts come first, and for them
    a layer with few experts on the GPU costs more than another one saves.
    """
    exists = np.arange(cache.experts) < cache.sizes[:, None]
    frequency = np.where(exists, frequency, -np.inf)
    order = np.argsort(-frequency, axis=1, kind="stable")
    alike = cache.ranking.scope == "layer" or not cache.ranking.frozen
    least = cache.quota if alike else np.minimum(cache.floor, cache.sizes)
    wanted = [
        (layer, int(e)) for layer in range(cache.layers) for e in order[layer, : least[layer]]
    ]
    if cache.ranking.scope == "model":
        taken = set(wanted)
        best = np.argsort(-frequency, axis=None, kind="stable")
        pairs = [divmod(int(i), cache.experts) for i in best]
        wanted += [pair for pair in pairs if exists[pair] and pair not in taken]
    return wanted[: cache.slots]


def _check(slots: int, experts: int, top_k: int, staging: int) -> None:
    if slots < 0 or staging < 0:
        raise ConfigError(f"slots and staging must be at least 0, got {slots} and {staging}")
    if not 1 <= top_k <= experts:
        raise ConfigError(f"top_k must lie in [1, {experts}], got {top_k}")
