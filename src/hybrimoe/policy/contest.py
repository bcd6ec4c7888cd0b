"""Never slower than the best pure mode: a short comparison in place, on the user's own tokens.

After a warm-up, passes take turns between the chosen policies and the pure modes. The clock decides,
not the cost model; every `period` passes the question is asked again.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import defaultdict
from dataclasses import dataclass
from statistics import median
from typing import Any

from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.engine import Engine, Policies
from hybrimoe.policy.prefetchers import Never
from hybrimoe.policy.routing import Load
from hybrimoe.policy.schedulers import CpuOnly, OnDemand, Static
from hybrimoe.simd.stopwatch import stopwatch

CHOSEN = "hybrid"
SIZES = (16, 64, 256, 1024)
"""Passes are judged among their like, for a token of a long prompt takes a fraction of a short one's:
decode or prefill, with at most so many tokens, and all larger ones together."""


@dataclass(frozen=True)
class ModeTrial:
    """How long to compare. Passes are whole forward passes of the model.

    warm_up: passes before the first comparison, in which caches and costs settle. rounds: passes
    per mode. margin: by how much a pure mode must win. drop_above: a mode that took more than this times
    the fastest one's time in the first round drops out. skip_above: one predicted to take more than
    this times as long is not tried at all. period: passes until the next comparison.
    """

    warm_up: int = 12
    rounds: int = 6
    margin: float = 0.03
    drop_above: float = 1.3
    skip_above: float = 8.0
    period: int = 1000


PREFILL = ModeTrial(
    warm_up=1, rounds=2, skip_above=1.5, period=100
)  # one long prompt is a long wait


class Guard:
    """Chooses the mode of each forward pass: `begin` before its first layer, `end` after the model.

    A pass whose end is not seen, because only a part of the model was called, does not count.
    """

    def __init__(
        self, engine: Engine, decode: ModeTrial | None = None, prefill: ModeTrial = PREFILL
    ) -> None:
        self.engine = engine
        ranking = engine.cache.ranking
        still = dataclasses.replace(ranking, backfill=False)
        self.modes = {
            CHOSEN: engine.policies,
            "resident": Policies(Static(), still, Never()),
            "accelerator": Policies(OnDemand(), still, Never()),
            "cpu": Policies(CpuOnly(), still, Never()),
        }
        self._decode, self._prefill = decode or ModeTrial(), prefill
        self.contests = {kind_of(1, True): Contest(self._decode, self.modes)}
        self._running: Contest | None = None
        self._began, self._tokens = 0.0, 1
        self._compiled = 0.0  # seconds of the process when the pass began

    def begin(self, now: float, tokens: int, is_decode: bool) -> None:
        """A pass of so many tokens starts."""
        self._began, self._tokens, self._compiled = now, tokens, stopwatch.seconds
        self._running = self._contest(tokens, is_decode)
        policies = self.modes[self._running.next()]
        self.engine.policies, self.engine.cache.ranking = policies, policies.ranking

    def end(self, now: float) -> None:
        """The pass is over."""
        if self._running is not None:
            compiled = stopwatch.seconds - self._compiled
            self._running.took((now - self._began - compiled) / self._tokens)
        self._running = None

    def plan(self, load: Load, cost: CostModel) -> None:
        """In the warm-up, predict what each mode would make of a layer."""
        if self._running is None or not self._running.predicting:
            return
        cache, timeline = self.engine.cache, self.engine.timeline
        ready = cache.ready(load.layer, load.experts, timeline.now)
        own = cost.of(load.layer)
        for name, policies in self.modes.items():
            seconds = policies.scheduler.plan(load, ready, timeline, own).makespan
            self._running.predicted[name] += seconds / self._tokens

    def _contest(self, tokens: int, is_decode: bool) -> Contest:
        name = kind_of(tokens, is_decode)
        if name not in self.contests:
            trial = self._decode if is_decode else self._prefill
            self.contests[name] = Contest(trial, self.modes)
        return self.contests[name]

    def to_dict(self) -> dict[str, Any]:
        """What was compared, in milliseconds per token, and what was chosen, by the kind of pass."""
        return {name: contest.to_dict() for name, contest in self.contests.items()}


def kind_of(tokens: int, is_decode: bool) -> str:
    """The name of the passes that one with so many tokens is compared with."""
    name = "decode" if is_decode else "prefill"
    if tokens <= SIZES[0]:
        return name if is_decode else f"{name} of at most {SIZES[0]} tokens"
    for least, most in itertools.pairwise(SIZES):
        if tokens <= most:
            return f"{name} of {least + 1} to {most} tokens"
    return f"{name} of more than {SIZES[-1]} tokens"


class Contest:
    """The comparison of the modes for one kind of pass."""

    def __init__(self, trial: ModeTrial, modes: dict[str, Policies]) -> None:
        self.trial, self.names = trial, list(modes)
        self.chosen = CHOSEN
        self.predicted: dict[str, float] = dict.fromkeys(modes, 0.0)
        self.measured: dict[str, float] = {}
        self._passes = 0  # since the last decision
        self._mode = CHOSEN
        self._queue: list[str] = []
        self._rounds = 0
        self._seconds: dict[str, list[float]] = defaultdict(list)

    @property
    def predicting(self) -> bool:
        """Whether the warm-up still runs."""
        return self._passes < self.trial.warm_up and not self.measured

    def next(self) -> str:
        """The mode of the pass that starts."""
        wait = self.trial.period if self.measured else self.trial.warm_up
        if not self._queue and self._passes >= wait:
            self._queue = self._competitors()
            self._rounds = self.trial.rounds
        self._mode = self._queue[0] if self._queue else self.chosen
        return self._mode

    def took(self, seconds: float) -> None:
        """The pass that `next` named is over; seconds per token."""
        self._passes += 1
        if not self._queue:
            return
        self._seconds[self._queue.pop(0)].append(seconds)
        if self._queue:
            return
        self._rounds -= 1
        if self._rounds:
            self._queue = self._near()
        else:
            self._decide()

    def to_dict(self) -> dict[str, Any]:
        return {
            "chosen": self.chosen,
            "compared_ms": {name: seconds * 1e3 for name, seconds in self.measured.items()},
        }

    def _competitors(self) -> list[str]:
        limit = self.trial.skip_above * self.predicted[CHOSEN]
        return [name for name in self.names if name == CHOSEN or self.predicted[name] <= limit]

    def _near(self) -> list[str]:
        """Those that may still win, and always the chosen policies."""
        times = {name: median(seconds) for name, seconds in self._seconds.items()}
        limit = self.trial.drop_above * min(times.values())
        return [name for name in times if name == CHOSEN or times[name] <= limit]

    def _decide(self) -> None:
        """The fastest pure mode wins only by more than the margin; ties go to the hybrid."""
        self.measured = {name: median(times) for name, times in self._seconds.items()}
        best = min(self.measured, key=self.measured.__getitem__)
        wins = self.measured[best] < (1 - self.trial.margin) * self.measured[CHOSEN]
        self.chosen = best if wins else CHOSEN
        self._seconds.clear()
        self._passes = 0
