"""Two models timed in turns, so that what slows the machine meanwhile slows both."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psutil

from hybrimoe.simd.stopwatch import stopwatch

CROWDED = 0.1
"""Share of the cores that others may take before a comparison is called disturbed."""


@dataclass(frozen=True)
class Timing:
    """One model. prefill_s: seconds until the first token; decode_s: seconds per token after it.

    Both are medians of all rounds. answer: the tokens of the last round.
    """

    prefill_s: float
    decode_s: float
    answer: list[int]


class Clock:
    """A streamer that notes when the prompt and each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Called by `generate` with the prompt, then with every token."""
        self.times.append(stopwatch.clock())

    def end(self) -> None:
        """Nothing is held back."""


class Crowd:
    """How many cores other programs kept from this one, in a `with` block.

    missing: cores that were neither idle nor used by this process, of `threads` that it could have
    used; a hypervisor's other guests count as well.
    """

    def __init__(self, threads: int) -> None:
        self.threads, self.missing = threads, 0.0

    def __enter__(self) -> Crowd:
        self.start = time.perf_counter(), _own_s() + _idle_s()
        return self

    def __exit__(self, *_: object) -> None:
        seconds = max(time.perf_counter() - self.start[0], 1e-9)
        could_use = (_own_s() + _idle_s() - self.start[1]) / seconds
        self.missing = max(self.threads - could_use, 0.0)

    @property
    def warning(self) -> str:
        """What to tell about it; empty where nobody stood in the way."""
        if self.missing < CROWDED * self.threads:
            return ""
        return (
            f"other programs took {self.missing:.1f} of {self.threads} cores meanwhile, so these speeds "
            "are too low: run it again when they are done"
        )


def timed(model: Any, prompt: Any, tokens: int) -> tuple[float, float, list[int]]:
    """Seconds until the first token, seconds of `tokens` more, and all of them."""
    import torch

    clock, start = Clock(), stopwatch.clock()
    with torch.no_grad():
        ids = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=tokens + 1,
            max_new_tokens=tokens + 1,
            do_sample=False,
            streamer=clock,
        )
    _, first, *_, last = clock.times
    return first - start, last - first, ids[0, prompt.shape[1] :].tolist()


def alternate(
    models: Mapping[str, Any], prompt: Any, tokens: int, rounds: int
) -> dict[str, Timing]:
    """Time every model in each round, each first as often as the others; all are warm already."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    answers: dict[str, list[int]] = {}
    for turn in range(rounds):
        for name in sorted(models, reverse=bool(turn % 2)):
            prefill, decode, answers[name] = timed(models[name], prompt, tokens)
            times[name].append((prefill, decode / tokens))
    found = {}
    for name, pairs in times.items():
        prefill_s, decode_s = (statistics.median(column) for column in zip(*pairs))
        found[name] = Timing(prefill_s, decode_s, answers[name])
    return found


def _own_s() -> float:
    """Seconds that all threads of this process have computed."""
    return time.process_time()


def _idle_s() -> float:
    """Seconds that the cores this process may use have been idle, together."""
    found = psutil.cpu_times(percpu=True)
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(len(found))
    return float(
        sum(cpu.idle + getattr(cpu, "iowait", 0.0) for i, cpu in enumerate(found) if i in allowed)
    )
