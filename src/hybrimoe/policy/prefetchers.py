"""Which experts of later layers to copy while the link is idle: the prefetching policies."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np

from hybrimoe.errors import ConfigError
from hybrimoe.policy.cache import Cache
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.jit import compiled
from hybrimoe.policy.routing import Forecast, Load
from hybrimoe.policy.schedulers import Scheduler
from hybrimoe.policy.timeline import Array, Lane, Timeline

LINK = int(Lane.LINK)
WINDOWS = ("layer", "gap")
NO_SCORES = np.zeros(0, np.float32)
FIRST = itemgetter(0)


@dataclass(frozen=True, kw_only=True)
class Prefetcher(ABC):
    """Says which experts of later layers are worth a copy in the link's idle time.

    depth: layers to look ahead; forecasts beyond it are not asked for.
    window: what counts as the link's idle time, for backfill too. "layer": while this layer's
        experts run, as in the paper. "gap": until the next layer's start, beside attention too.
    timely: copy only what is expected to arrive before its layer starts; half a copy is no use.
    """

    depth: int = 1
    window: str = "gap"
    timely: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.depth <= 4:
            raise ConfigError(f"depth must lie in [0, 4], got {self.depth}")
        if self.window not in WINDOWS:
            raise ConfigError(f"window must be one of {WINDOWS}, got {self.window!r}")

    @abstractmethod
    def wanted(
        self,
        forecasts: Sequence[Forecast],
        cache: Cache,
        scheduler: Scheduler,
        timeline: Timeline,
        cost: CostModel,
    ) -> list[tuple[int, int]]:
        """(layer, expert) of absent experts, best first; `timeline.now` starts the next layer.

        cost: `cost.of(layer)` is a layer's own.
        """


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
        idle = max(timeline.free.item(LINK), timeline.now)
        then = Timeline()
        for forecast in forecasts:
            layer, experts = forecast.layer, forecast.experts
            own = cost.of(layer)
            landed = idle + own.load_s
            then.now = start = max(forecast.start, timeline.now)
            ready = cache.ready(layer, experts, start)
            if not has_absent(ready):
                continue
            load = Load(layer, experts, forecast.tokens, NO_SCORES)
            gains = scheduler.gains(load, ready, then, own, max(landed - start, 0.0))
            value = self._value(forecast, gains, ready, cache, timeline, own)
            found += [(-v, layer, e) for v, e in zip(value.tolist(), experts.tolist()) if v > 0]
        found.sort(key=FIRST)  # the order of equals stays: the nearer layer, the more probable
        return [(layer, expert) for _, layer, expert in found]

    def _value(
        self,
        forecast: Forecast,
        gains: Array,
        ready: Array,
        cache: Cache,
        timeline: Timeline,
        cost: CostModel,
    ) -> Array:
        layer, experts, chance = forecast.layer, forecast.experts, forecast.probability
        rate, lost, horizon, price = cache.books.rate, 0.0, 1.0, 0.0
        if self.gated:
            slot, _ = cache.victim(layer, experts, timeline.now)
            if slot < 0:
                return np.zeros(experts.size)
            lost, horizon, price = cache.rate_in(slot), self.horizon, cost.contention_s
        value = np.empty(experts.size)
        net(gains, chance, ready, rate, layer, experts, lost, horizon, price, value)
        return value


@compiled
def has_absent(ready: Array) -> bool:
    """Whether any expert has no slot."""
    for r in ready:  # noqa: SIM110 (compiled: a generator would be slower)
        if r == np.inf:
            return True
    return False


@compiled
def net(
    gains: Array,
    chance: Array,
    ready: Array,
    rate: Array,
    layer: int,
    experts: Array,
    lost: float,
    horizon: float,
    price: float,
    value: Array,
) -> None:
    """value [A] = expected seconds that a copy of each expert saves, 0 for those with a slot."""
    for i in range(experts.size):
        value[i] = 0.0
        if ready[i] == np.inf:
            used = chance[i] + (horizon - 1.0) * rate[layer, experts[i]] - horizon * lost
            value[i] = gains[i] * used - price
