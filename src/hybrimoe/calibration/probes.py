"""Timed runs of the CPU's experts, the accelerator's and the link, alone and together."""

from __future__ import annotations

import contextlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch

from hybrimoe.calibration.fit import Sample
from hybrimoe.errors import InsufficientMemoryError
from hybrimoe.kernels.cpu.run_layer import PackedLayer, run_layer
from hybrimoe.kernels.cpu.workspace import Workspace
from hybrimoe.runtime.devices.base import Accelerator
from hybrimoe.runtime.pages import allocate_blobs
from hybrimoe.simd.stopwatch import stopwatch

EXPERTS = (1, 2, 4, 8)
TOKENS = (1, 2, 3, 4, 6, 9, 14, 22, 32, 64, 128)
"""Not only powers of two, which the kernels' tiles of eight tokens favour."""
ROTATED = 256 << 20
"""Bytes of experts or of slots to go through: several times the last level of any cache."""
LEAST_ROUNDS = 2
PIECE = 1 << 20  # bytes that memory traffic copies at a time
SHARE = 40  # a run may take this part of the time given; longer ones are left to the law


class Deck:
    """Deals experts of equal layers so that each comes back only after all others."""

    def __init__(self, layers: Sequence[PackedLayer], seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.layers = list(layers)
        self.orders = [rng.permutation(len(layer.blobs)) for layer in layers]
        self._layer, self._at = 0, 0

    def deal(self, count: int) -> tuple[PackedLayer, np.ndarray]:
        """A layer and the ids [count] int64 of some of its experts."""
        if self._at + count > len(self.orders[self._layer]):
            self._layer, self._at = (self._layer + 1) % len(self.layers), 0
        ids = self.orders[self._layer][self._at : self._at + count]
        self._at += count
        return self.layers[self._layer], ids.astype(np.int64)


class Traffic(ABC):
    """What keeps the link or the memory busy beside CPU experts."""

    @abstractmethod
    def start(self, seconds: float) -> None:
        """Be busy for at least so long from now."""

    @abstractmethod
    def stop(self, begin: float, end: float) -> None:
        """The CPU worked from `begin` to `end`; wait for what is still under way."""


class MemoryTraffic(Traffic):
    """A thread that copies host memory while asked to, as a context manager; it needs a core."""

    def __init__(self) -> None:
        self._source, self._target = np.ones((2, 32, PIECE), np.uint8)
        self._go, self._busy, self._idle = (threading.Event() for _ in range(3))
        self._over = False
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._over = True
        self._go.set()
        self._thread.join()

    def start(self, seconds: float) -> None:
        self._idle.clear()
        self._go.set()
        self._busy.wait()

    def stop(self, begin: float, end: float) -> None:
        self._go.clear()
        self._idle.wait()

    def _run(self) -> None:
        piece = 0
        while True:
            self._go.wait()
            if self._over:
                return
            self._busy.set()
            while self._go.is_set() and not self._over:
                np.copyto(self._target[piece % 32], self._source[piece % 32])
                piece += 1
            self._busy.clear()
            self._idle.set()


class LinkTraffic(Traffic):
    """Copies of whole experts to the accelerator, as many as cover the CPU's work.

    samples: those copies that ran while the CPU worked from their beginning to their end.
    """

    def __init__(self, accelerator: Accelerator, source: np.ndarray, copy_s: float) -> None:
        self.accelerator, self.source, self.copy_s = accelerator, source, copy_s
        self.samples: list[Sample] = []
        self._events: list[Any] = []

    def start(self, seconds: float) -> None:
        for i in range(int(1.5 * seconds / self.copy_s) + 2):
            row = self.source[i % len(self.source)]
            self._events.append(self.accelerator.copy(row, 0, 0, ()))

    def stop(self, begin: float, end: float) -> None:
        for event in self._events:
            self.accelerator.wait(event)
            started, ended = self.accelerator.span(event)
            if begin <= started and ended <= end:
                size = self.source.shape[1]
                self.samples.append(Sample(1, 0, ended - started, size))
        self._events = []


def cpu_samples(
    layers: Sequence[PackedLayer],
    threads: int,
    budget_s: float,
    traffics: Sequence[Traffic | None] = (None,),
) -> list[list[Sample]]:
    """For each traffic, a typical run of each number of experts and tokens that the time allows.

    Runs beside each traffic take turns, so that what else the machine does slows them all.
    """
    run = _CpuRun(layers, threads)
    run(1, 1)  # compiles, or loads what was compiled
    deadline = stopwatch.clock() + budget_s
    expected = _first_round(run, budget_s / len(traffics))
    seconds: dict[tuple[int, int], list[list[float]]]
    seconds = {point: [[] for _ in traffics] for point in expected}
    rounds = 0
    while rounds < LEAST_ROUNDS or stopwatch.clock() < deadline:
        for point, runs in seconds.items():
            for traffic, taken in zip(traffics, runs):
                taken.append(run(*point, traffic, expected[point]))
        rounds += 1
    return [
        [Sample(*point, typical(runs[i])) for point, runs in seconds.items()]
        for i in range(len(traffics))
    ]


def _first_round(run: _CpuRun, budget_s: float) -> dict[tuple[int, int], float]:
    """Seconds of every point, leaving out what would take too long, known from about half of it."""
    found: dict[tuple[int, int], float] = {}
    longest = budget_s / SHARE
    for experts in (count for count in EXPERTS if count <= run.available):
        last = found[experts // 2, 1] if experts > 1 else 0.0
        for tokens in TOKENS:
            if 2 * last > longest and found:
                break
            last = found[experts, tokens] = run(experts, tokens)
        if (experts, 1) not in found:
            break
    return found


class _CpuRun:
    """Times one launch of the CPU's kernel."""

    def __init__(self, layers: Sequence[PackedLayer], threads: int) -> None:
        self.deck, self.threads = Deck(layers), threads
        self.available = min(len(layer.blobs) for layer in layers)
        self.workspace = Workspace()
        self.x = np.random.default_rng(0).standard_normal((max(TOKENS), layers[0].hidden))
        self.x = self.x.astype(np.float32)
        self.out = np.zeros_like(self.x)

    def __call__(
        self, experts: int, tokens: int, traffic: Traffic | None = None, expected_s: float = 0.0
    ) -> float:
        layer, ids = self.deck.deal(experts)
        routed = np.tile(ids, (tokens, 1))
        weights = np.full((tokens, experts), 1 / experts, np.float32)
        arrays = self.x[:tokens], routed, weights, self.out[:tokens], self.workspace
        if traffic is not None:
            traffic.start(expected_s)
        begin = stopwatch.clock()
        run_layer(layer, *arrays, threads=self.threads)
        end = stopwatch.clock()
        if traffic is not None:
            traffic.stop(begin, end)
        return end - begin


def link_samples(accelerator: Accelerator, source: np.ndarray, budget_s: float) -> list[Sample]:
    """Copies of a quarter, a half and a whole expert, one after the other.

    source [N, expert_bytes] uint8: what to copy.
    """
    size, found = source.shape[1], []
    deadline, turn = stopwatch.clock() + budget_s, 0
    while stopwatch.clock() < deadline or turn < 3:
        for part in (size // 4, size // 2, size):
            event = accelerator.copy(source[turn % len(source), :part], 0, 0, ())
            accelerator.wait(event)
            begin, end = accelerator.span(event)
            if turn:  # the first copies wake the link up
                found.append(Sample(1, 0, end - begin, part))
        turn += 1
    return found


def gpu_samples(
    accelerator: Accelerator, layer: PackedLayer, slots: int, budget_s: float
) -> list[Sample]:
    """A typical run of each number of experts and tokens, in the slots' rotation."""
    points = [(e, n) for n in TOKENS for e in EXPERTS if e <= slots]
    seconds: dict[tuple[int, int], list[float]] = {point: [] for point in points}
    deadline, at = 0.0, 0
    for turn in range(1 << 20):
        for experts, tokens in points:
            used = (at + np.arange(experts)) % slots
            at += experts
            taken = _gpu_run(accelerator, layer, slots, used, tokens)
            if turn:  # the first round compiles
                seconds[experts, tokens].append(taken)
        if not turn:
            deadline = stopwatch.clock() + budget_s
        elif stopwatch.clock() > deadline:
            break
    return [Sample(*point, typical(runs)) for point, runs in seconds.items()]


def _gpu_run(
    accelerator: Accelerator, layer: PackedLayer, slots: int, used: np.ndarray, tokens: int
) -> float:
    x = torch.ones(tokens, layer.hidden, device=accelerator.compute_device)
    weights = np.full((tokens, used.size), 1 / used.size, np.float32)
    shards = np.zeros((slots + 1, 2), np.int32)
    shards[used, 1] = layer.layout.shards
    ids, out = np.tile(used.astype(np.int64), (tokens, 1)), torch.empty_like(x)
    event = accelerator.experts(layer, x, ids, weights, shards, out, ())
    accelerator.wait(event)
    accelerator.fetch([out])  # what was staged for this run makes room for the next
    begin, end = accelerator.span(event)
    return end - begin


def typical(seconds: Sequence[float]) -> float:
    """The lower quartile: of few runs on a busy machine, one that was not interrupted."""
    return float(np.quantile(seconds, 0.25, method="lower"))


@contextlib.contextmanager
def copy_source(accelerator: Accelerator, layer: PackedLayer) -> Iterator[np.ndarray]:
    """Host memory [N, expert_bytes] uint8 of some experts, to copy from within the block.

    It is pinned, or pageable where that is refused, as the model's own experts will be.
    """
    count = min(max(2, ROTATED // 4 // layer.layout.expert_bytes), len(layer.blobs))
    source = allocate_blobs(count, layer.layout)
    source[:] = layer.blobs[:count]
    pinned = True
    try:
        accelerator.pin(source)
    except InsufficientMemoryError:
        pinned = False
    try:
        yield source
    finally:
        if pinned:
            accelerator.unpin(source)
