"""Which experts of later layers to copy while the link is idle: the prefetching policies."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hybrimoe.errors import ConfigError
from hybrimoe.policy.cache import Cache
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.routing import Forecast, Load
from hybrimoe.policy.scheduler import Scheduler
from hybrimoe.policy.timeline import Array, Lane, Timeline

NO_SCORES = np.zeros(0, np.float32)


@dataclass(frozen=True, kw_only=True)
class Prefetcher(ABC):
    """Says which experts of later layers are worth a copy in the link's idle time.

    depth: layers to look ahead; forecasts beyond it are not asked for.
    """

    depth: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.depth <= 4:
            raise ConfigError(f"depth must lie in [0, 4], got {self.depth}")

    @abstractmethod
    def wanted(
        self,
        forecasts: Sequence[Forecast],
        cache: Cache,
        scheduler: Scheduler,
        timeline: Timeline,
        cost: CostModel,
    ) -> list[tuple[int, int]]:
        """(layer, expert) of absent experts, best first; `timeline.now` starts the next layer."""


@dataclass(frozen=True)
class Never(Prefetcher):
    """Prefetches nothing."""

    depth: int = 0

    def wanted(
        self,
        forecasts: Sequence[Forecast],
        cache: Cache,
        scheduler: Scheduler,
        timeline: Timeline,
        cost: CostModel,
    ) -> list[tuple[int, int]]:
        return []


@dataclass(frozen=True)
class NextLayer(Prefetcher):
    """The absent experts that later layers will most probably use (AdapMoE, ICCAD 2024).

    least: an expert less probable than this is not wanted.
    """

    least: float = 0.0

    def wanted(
        self,
        forecasts: Sequence[Forecast],
        cache: Cache,
        scheduler: Scheduler,
        timeline: Timeline,
        cost: CostModel,
    ) -> list[tuple[int, int]]:
        found = []
        for forecast in forecasts:
            absent = cache.slot[forecast.layer, forecast.experts] < 0
            wanted = absent & (forecast.probability >= self.least)
            found += [(forecast.layer, int(e)) for e in forecast.experts[wanted]]
        return found


@dataclass(frozen=True)
class Impact(Prefetcher):
    """The experts whose presence would shorten later layers most (impact-driven, section IV-C).

    gain = seconds the scheduler saves with the expert there * its forecast probability, less what
    losing the victim costs: the same seconds * how often either was used recently * `horizon`.
    gated: count the victim, and the slowdown of CPU experts while the link reads their memory;
        without it any predicted gain is enough, as in the paper.
    horizon: steps for which a slot's contents are expected to stay.
    """

    gated: bool = True
    horizon: float = 2.0

    def wanted(
        self,
        forecasts: Sequence[Forecast],
        cache: Cache,
        scheduler: Scheduler,
        timeline: Timeline,
        cost: CostModel,
    ) -> list[tuple[int, int]]:
        found: list[tuple[float, int, int]] = []
        load_s = cost.link(cost.expert_bytes)
        landed = max(float(timeline.free[Lane.LINK]), timeline.now) + load_s
        for forecast in forecasts:
            layer, experts = forecast.layer, forecast.experts
            start = max(forecast.start, timeline.now)
            ready = cache.ready(layer, experts, start)
            if np.inf not in ready:
                continue
            load = Load(layer, experts, forecast.tokens, NO_SCORES)
            then = Timeline(start)
            gains = scheduler.gains(load, ready, then, cost, max(landed - start, 0.0))
            value = self._value(forecast, gains, cache, timeline, cost)
            kept = np.flatnonzero((value > 0) & (ready == np.inf))
            found += [(float(value[i]), layer, int(experts[i])) for i in kept]
        found.sort(key=lambda item: -item[0])
        return [(layer, expert) for _, layer, expert in found]

    def _value(
        self, forecast: Forecast, gains: Array, cache: Cache, timeline: Timeline, cost: CostModel
    ) -> Array:
        if not self.gated:
            return gains * forecast.probability
        slot, _ = cache.victim(forecast.layer, forecast.experts, timeline.now)
        if slot < 0:
            return np.zeros_like(gains)
        layer, victim = cache.owner[slot]
        lost = cache.books.rate[layer, victim] if layer >= 0 else 0.0
        rate = cache.books.rate[forecast.layer, forecast.experts]
        kept = forecast.probability + (self.horizon - 1.0) * rate - self.horizon * lost
        value: Array = gains * kept - contention(cost)
        return value


def contention(cost: CostModel) -> float:
    """Seconds by which CPU work beside it is slower for one expert's copy."""
    return cost.link(cost.expert_bytes) * (1 - cost.cpu_expert / cost.cpu_expert_contended)
