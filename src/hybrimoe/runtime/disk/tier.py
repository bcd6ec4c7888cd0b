"""The experts that do not fit into host memory: on disk, with the worthiest of them in slots of RAM.

The tier has the parts that an accelerator has: a slab of equal slots, the policies' `Cache` that says
who has one, a link with a timeline of its own (its LINK leads to the disk), and forecasts that fill the
link's idle time. What differs is that nobody computes on the other side: an expert is read before it is
used, so every miss is given a slot, and whoever needs it waits.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from hybrimoe.errors import ConfigError, PolicyError
from hybrimoe.kernels.cpu.run_layer import run_layer
from hybrimoe.policy.cache import Cache, Move
from hybrimoe.policy.forecasts import Markov, Trust
from hybrimoe.policy.rankings import NextToken
from hybrimoe.policy.routing import Forecast, Load
from hybrimoe.policy.timeline import Lane, Span, Timeline
from hybrimoe.runtime.disk.file import ExpertFile
from hybrimoe.runtime.disk.job import Job, in_float32, load_of, narrow, shards_of
from hybrimoe.runtime.disk.reader import Read, Reader
from hybrimoe.runtime.disk.sizes import TierSizes
from hybrimoe.runtime.pages import allocate

LEAST = 0.35
"""A forecast less probable than this is not worth a read, which may hold up one that is waited for."""
AHEAD = 8
"""Reads ordered on forecasts at a time."""
RARE = 0.25
"""Absent experts per layer below which a router asked early, 0.4 ms, costs more than it saves."""
NOTHING = (-1, -1, -1)
Foresee = Callable[[], Sequence[Forecast]]


class DiskTier:
    """Slots in RAM for the experts of a whole model, which lie in `backing`. Any thread may call.

    sizes: how many slots of how many bytes. top_k: experts that one token activates.
    trace: keep the span of every read.
    """

    def __init__(
        self, sizes: TierSizes, top_k: int, backing: ExpertFile, trace: bool = False
    ) -> None:
        layers, experts = len(sizes.experts), np.array(sizes.experts)
        top_k = min(top_k, max(sizes.experts))
        self.sizes, self.backing = sizes, backing
        self.cache = Cache(NextToken(scope="model"), sizes.slots, layers, experts, top_k, staging=0)
        self.slab = allocate(sizes.slots, sizes.slot_bytes)
        self.reader = Reader()
        self.forecaster, self.trust = Markov(layers, experts, top_k), Trust(1)
        self.timeline = Timeline(trace=trace)
        self.make_room: Callable[[], bool] = lambda: False
        """Called when every slot is held: gives one back, or returns False."""
        self._origin = time.perf_counter()
        self._lock, self._pid = threading.RLock(), os.getpid()
        self._content = [NOTHING] * sizes.slots  # layer, expert, stamp: what a slot really holds
        self._reads: dict[int, Read] = {}  # by slot
        self._guesses: dict[int, int] = {}  # slot and stamp of forecast experts not yet asked for
        self._lent: list[int] = []
        self._counted: set[tuple[int, int]] = set()  # what of the layer at hand `want` has counted
        self._absent = 1.0  # experts per layer that RAM lacked of late, but for forecasts
        self._is_sound = True  # whether the last call came to its end
        self.reset()

    def reset(self) -> None:
        """Start counting anew; what is in RAM stays."""
        self.hits = self.misses = self.late = 0
        self.guessed = self.guesses_used = 0
        self.reads = self.read_bytes = 0
        self.disk_s = self.waited_s = 0.0
        if self.timeline.spans is not None:
            self.timeline.spans.clear()

    def run(self, job: Job, foresee: Foresee = lambda: ()) -> None:
        """`run_layer` for a layer on disk, in as many parts as RAM asks for.

        Parts follow each other in rising order of experts, so that the output has the very bits that
        it has with all experts in RAM. foresee: says what the next layer will ask for, while the
        disk reads for this one; where it says nothing the tier makes forecasts of its own. Raises
        DiskReadError.
        """
        with self._entered():
            load, before = load_of(job), self.misses + self.guesses_used
            self._observe(load)
            held: set[int] = set()
            try:
                self._run(job, load, held, foresee)
            finally:
                self._release(held)
            self._absent += 0.02 * (self.misses + self.guesses_used - before - self._absent)

    def want(self, layer: int, experts: Iterable[int]) -> None:
        """Have absent experts read, as far as there are slots; somebody will ask for them next."""
        with self._entered():
            keep = np.asarray(list(experts), np.int32)
            self._counted.clear()
            for expert in keep.tolist():
                if not self._has_slot(layer, expert, keep):
                    return
                self._count(self._ensure(layer, expert, urgent=True))
                self._counted.add((layer, expert))

    def is_here(self, layer: int, expert: int) -> bool:
        """Whether an expert can be lent without waiting for the disk."""
        with self._entered():
            slot = self.cache.slot.item(layer, expert)
            return slot >= 0 and self._content[slot] == self._owner(slot)

    def expect(self, layer: int, expert: int) -> None:
        """Have an expert read when the disk has nothing else to do; it will be lent later."""
        with self._entered():
            if self._has_slot(layer, expert, None):
                self._ensure(layer, expert, urgent=False)

    def borrow(self, layer: int, expert: int) -> tuple[np.ndarray, int]:
        """An expert's bytes, and the slot to `release` when nobody reads them any more."""
        with self._entered():
            held: set[int] = set()
            try:
                self._await(layer, self._claim(layer, deque([expert]), 1, held))
            except BaseException:
                self._release(held)
                raise
            slot = held.pop()
            self._lent.append(slot)
            return self.slab[slot], slot

    def release(self, slot: int) -> None:
        """The reverse of `borrow`."""
        with self._lock:
            self._lent.remove(slot)
            self.cache.release(np.array([slot]))

    def blobs(self, layer: int, below: bool = False) -> np.ndarray:
        """All experts of a layer, [E, expert_bytes] uint8, in memory of their own.

        below: without what `ExpertFile.cover` has put above them.
        """
        return self.backing.layer(layer, self.empty(layer), below)

    def empty(self, layer: int) -> np.ndarray:
        """Memory for all experts of a layer."""
        return allocate(self.sizes.experts[layer], self.sizes.expert_bytes[layer])

    def forget(self, layer: int) -> None:
        """What slots hold of a layer is not what is on disk any more; nobody has borrowed it."""
        with self._entered():
            for slot in np.flatnonzero(self.cache.owner[:, 0] == layer).tolist():
                if slot in self._reads:
                    self._finish(slot, self._reads[slot])
                self._content[slot] = NOTHING

    def to_dict(self) -> dict[str, Any]:
        """Totals for the report, since the last reset."""
        asked = self.hits + self.late + self.misses
        return {
            "slots": self.cache.slots,
            "experts": sum(self.sizes.experts),
            "ram_bytes": self.slab.nbytes,
            "hits": self.hits,
            "late": self.late,
            "misses": self.misses,
            "hit_rate": self.hits / asked if asked else 0.0,
            "forecast": self.guessed,
            "forecast_used": self.guesses_used,
            "reads": self.reads,
            "read_bytes": self.read_bytes,
            "disk_s": self.disk_s,
            "waited_s": self.waited_s,
            "direct": self.backing.is_direct,
        }

    def spans(self) -> list[Span]:
        """Every read since the last reset; ConfigError without `trace=True`."""
        if self.timeline.spans is None:
            raise ConfigError("spans are kept with hybrimoe.wrap(model, trace=True) only")
        return self.timeline.spans

    def close(self) -> None:
        """End the reads and close the files; a temporary one is gone with it."""
        try:
            self.reader.close()
        finally:
            self.backing.close()

    def _run(self, job: Job, load: Load, held: set[int], foresee: Foresee) -> None:
        index, waiting = job.number, deque(np.sort(load.experts).tolist())
        free = self.cache.slots - int(np.count_nonzero(self.cache.references))
        # While one half of the slots computes, the other one is filled.
        half = max(free // 2, 1)
        part = self._claim(index, waiting, len(waiting) if len(waiting) <= free else half, held)
        if not waiting:
            self._look_ahead(load, foresee)
            self._await(index, part)
            self._compute(job, job.shards)
            return
        wide, is_first = in_float32(job), True
        while part:
            following = self._claim(index, waiting, half, held)
            self._await(index, part)
            self._compute(wide, shards_of(job, part), add=not is_first)
            self._release(held, self.cache.slot[index, part].tolist())
            part, is_first = following or self._claim(index, waiting, half, held), False
        narrow(wide.out, job)

    def _compute(self, job: Job, shards: np.ndarray | None, add: bool = False) -> None:
        layer = job.layer
        layout = layer.layout._replace(expert_bytes=self.sizes.slot_bytes)
        place = np.maximum(self.cache.slot[job.number, : layer.experts], 0)
        run_layer(
            layer._replace(layout=layout, blobs=self.slab, place=place),
            *(job.x, job.ids, job.weights, job.out, job.workspace, job.dtype, job.threads, shards),
            add=add,
        )

    def _observe(self, load: Load) -> None:
        self.cache.observe(load)
        self.trust.settle(load)
        self.forecaster.observe(load)
        needed = set(load.experts.tolist())
        for slot, stamp in list(self._guesses.items()):
            owner, expert = self.cache.owner[slot].tolist()
            if owner != load.layer or self.cache.generation[slot] != stamp:
                continue
            del self._guesses[slot]
            if expert in needed:
                self.guesses_used += 1
            elif slot in self._reads and self.reader.cancel(self._reads[slot]):
                del self._reads[slot]  # it would hold up what is waited for
                self.cache.drop(owner, expert)

    def _claim(self, layer: int, waiting: deque[int], most: int, held: set[int]) -> list[int]:
        """Take up to `most` experts off `waiting` into slots that nobody may take, and read them."""
        part: list[int] = []
        keep = np.array(waiting, np.int32)
        while waiting and len(part) < most:
            expert = waiting[0]
            if not self._has_slot(layer, expert, keep):
                if held:
                    break  # there will be slots when these are done
                self._force_slot(layer, expert)
            found = self._ensure(layer, expert, urgent=True)
            if (layer, expert) not in self._counted:
                self._count(found)
            slots = self.cache.hold(layer, np.array([expert], np.int32))
            held.add(int(slots[0]))
            part.append(waiting.popleft())
        return part

    def _has_slot(self, layer: int, expert: int, keep: np.ndarray | None) -> bool:
        cache = self.cache
        if cache.slot[layer, expert] >= 0 or cache.admit(layer, expert, keep, force=True):
            return True
        return cache.admit(layer, expert, keep, force=True, anywhere=True) is not None

    def _force_slot(self, layer: int, expert: int) -> None:
        """A slot where those that are needed later, on the wire or lent are in the way."""
        while not self._has_slot(layer, expert, None):
            if self._reads:
                slot, read = next(iter(self._reads.items()))
                self._finish(slot, read)
            elif not self.make_room():
                raise PolicyError(f"all {self.cache.slots} slots of RAM are in use")

    def _ensure(self, layer: int, expert: int, urgent: bool) -> str:
        """Order the read of an expert that has a slot; says whether it was there, late or missing."""
        cache = self.cache
        slot = cache.slot.item(layer, expert)
        content = self._owner(slot)
        if self._content[slot] == content:
            return "here"
        read = self._reads.get(slot)
        if read is None:
            self._content[slot] = NOTHING
            cache.arrival[slot] = np.inf  # from now on nobody may take the slot
            read = self._reads[slot] = Read(partial(self._fill, slot, content))
            found = "absent"
        else:
            found = "late"
        self.reader.submit(read, urgent)
        return found

    def _owner(self, slot: int) -> tuple[int, int, int]:
        """What a slot should hold."""
        owner = self.cache.owner
        return owner.item(slot, 0), owner.item(slot, 1), self.cache.generation.item(slot)

    def _fill(self, slot: int, content: tuple[int, int, int]) -> None:
        """Runs in the reader's thread."""
        self.backing.read(*content[:2], self.slab[slot])
        self._content[slot] = content

    def _count(self, found: str) -> None:
        self.hits += found == "here"
        self.late += found == "late"
        self.misses += found == "absent"

    def _await(self, layer: int, experts: list[int]) -> None:
        """Wait until experts that have slots are there."""
        for expert in experts:
            slot = self.cache.slot.item(layer, expert)
            read = self._reads.get(slot)
            if read is not None:
                self._finish(slot, read)

    def _finish(self, slot: int, read: Read) -> None:
        started = time.perf_counter()
        try:
            self.reader.wait(read)
        except KeyboardInterrupt:
            raise  # it is still being read
        except BaseException:
            self._settle(slot, read)
            raise
        finally:
            self.waited_s += time.perf_counter() - started
        self._settle(slot, read)

    def _settle(self, slot: int, read: Read) -> None:
        """Book a read that is over; the slot may be taken again."""
        layer, expert = self.cache.owner[slot].tolist()
        size = self.sizes.expert_bytes[layer]
        self.reads, self.read_bytes = self.reads + 1, self.read_bytes + size
        self.disk_s += read.seconds
        start = read.start - self._origin
        self.timeline.free[Lane.LINK] = start + read.seconds
        if self.timeline.spans is not None:
            span = Span(Lane.LINK, start, read.seconds, f"expert {expert}", layer, bytes=size)
            self.timeline.spans.append(span)
        self.cache.arrival[slot] = 0.0
        del self._reads[slot]

    def _look_ahead(self, load: Load, foresee: Foresee) -> None:
        """Order what the next layer will probably use, behind all that this one waits for."""
        if self.cache.crowded or not self.cache.lacks(load.layer + 1, load.layer + 2):
            return  # ids of single tokens say little of a prompt
        told = foresee() if self._absent > RARE else ()
        forecasts = told or self.forecaster.forecast(load.layer)
        self.trust.expect(load.layer, forecasts)
        factor, cache = min(self.trust.factor(0), 1.0), self.cache
        for forecast in forecasts:
            chances = (forecast.probability * factor).tolist()
            for expert, chance in zip(forecast.experts.tolist(), chances):
                if chance < LEAST or self._ordered_ahead() >= AHEAD:
                    return
                if cache.slot[forecast.layer, expert] < 0:
                    self._guess(forecast.layer, expert, chance, forecast.experts)

    def _ordered_ahead(self) -> int:
        return sum(not read.urgent for read in self._reads.values())

    def _guess(self, layer: int, expert: int, chance: float, keep: np.ndarray) -> None:
        slot, _ = self.cache.victim(layer, keep)
        if slot < 0 or self.cache.rate_in(slot) >= chance:
            return
        move = self.cache.admit(layer, expert, keep, force=True)
        assert isinstance(move, Move)
        self._ensure(layer, expert, urgent=False)
        self._guesses[move.slot] = move.generation
        self.guessed += 1

    def _release(self, held: set[int], slots: list[int] | None = None) -> None:
        for slot in list(held) if slots is None else slots:
            held.discard(slot)
            self.cache.release(np.array([slot]))

    @contextmanager
    def _entered(self) -> Iterator[None]:
        """One caller at a time, and books that are right whatever interrupted the one before."""
        if self._pid != os.getpid():
            self._after_fork()
        with self._lock:
            if not self._is_sound:
                self.cache.references[:] = 0
                np.add.at(self.cache.references, self._lent, 1)
                under_way = np.isin(np.arange(self.cache.slots), list(self._reads))
                self.cache.arrival[~under_way] = 0.0
                for read in self._reads.values():
                    read.urgent = False  # who waited for it has left; if it fails it is read again
            for slot, read in list(self._reads.items()):
                if read.done and not (read.error and read.urgent):  # else it will be raised
                    self._settle(slot, read)
            self._is_sound = False
            yield
            self._is_sound = True

    def _after_fork(self) -> None:
        """A child has the slots and the files, but neither the reader's threads nor their reads."""
        self._pid, self._lock, self._is_sound = os.getpid(), threading.RLock(), False
        for slot in self._reads:
            self.cache.arrival[slot] = 0.0
        self._reads.clear()
