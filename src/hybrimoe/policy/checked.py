"""Policies from outside: what they are given is a copy, what they return is checked, and a fault has
a name.

The library's own policies are trusted and run as they are. Any other is put behind one of the three
`Checked` classes, which pass a call on, and raise PolicyError or PlanError with `kind` set where it
raises or breaks its contract: before the slot table or the executor has seen its answer.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NoReturn, TypeVar

import numpy as np

from hybrimoe.errors import ConfigError, PlanError, PolicyError
from hybrimoe.policy.cache import Cache
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.plan import Plan, validate
from hybrimoe.policy.prefetchers import Prefetcher
from hybrimoe.policy.rankings import Ranking, UsageStats
from hybrimoe.policy.routing import Forecast, Load
from hybrimoe.policy.schedulers import Scheduler
from hybrimoe.policy.timeline import Array, Timeline

OURS = f"{__name__.rpartition('.')[0]}."  # the package whose policies are trusted
ROUNDING = -1e-9  # seconds: a gain that is negative by less is a difference of equals
T = TypeVar("T")
Owner = TypeVar("Owner", UsageStats, Cache)


def checked_scheduler(policy: Scheduler) -> Scheduler:
    """The scheduler itself if it is one of the library's, else behind its checks."""
    return policy if _is_ours(policy) else CheckedScheduler(policy)


def checked_ranking(policy: Ranking) -> Ranking:
    """The ranking itself if it is one of the library's, else behind its checks."""
    if _is_ours(policy):
        return policy
    settings = {item.name: getattr(policy, item.name) for item in fields(Ranking)}
    for name in ("admission", "backfill", "frozen"):
        if not isinstance(settings[name], bool):
            who = type(policy).__name__
            raise ConfigError(f"{who}.{name} must be a bool, got {settings[name]!r}")
    return CheckedRanking(policy, **settings)


def checked_prefetcher(policy: Prefetcher) -> Prefetcher:
    """The prefetcher itself if it is one of the library's, else behind its checks."""
    if _is_ours(policy):
        return policy
    if not isinstance(policy.depth, int):
        who = type(policy).__name__
        raise ConfigError(f"{who}.depth must be an integer, got {policy.depth!r}")
    if not isinstance(policy.timely, bool):
        who = type(policy).__name__
        raise ConfigError(f"{who}.timely must be a bool, got {policy.timely!r}")
    settings = {item.name: getattr(policy, item.name) for item in fields(Prefetcher)}
    return CheckedPrefetcher(policy, **settings)


@dataclass(frozen=True)
class CheckedScheduler(Scheduler):
    """A scheduler that is not trusted."""

    policy: Scheduler

    def plan(self, load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> Plan:
        mine = (_copy_load(load), ready.copy(), timeline.fork(), cost)
        return _ask(self, lambda: self._sound(self.policy.plan(*mine), load, ready, cost))

    def gains(
        self, load: Load, ready: Array, timeline: Timeline, cost: CostModel, arrival: float = 0.0
    ) -> Array:
        if type(self.policy).gains is Scheduler.gains:
            return super().gains(load, ready, timeline, cost, arrival)
        mine = (_copy_load(load), ready.copy(), timeline.fork(), cost, arrival)
        return _ask(self, lambda: self._sound_gains(self.policy.gains(*mine), ready))

    def _sound(self, plan: Plan, load: Load, ready: Array, cost: CostModel) -> Plan:
        """A copy of a plan that runs every activated expert exactly once."""
        if not isinstance(plan, Plan):
            _blame(self, f"plan must return a Plan, got {_show(plan)}", PlanError)
        gpu, cpu, copies, shards = (
            self._integers(name, getattr(plan, name)) for name in ("gpu", "cpu", "copies", "shards")
        )
        seconds = plan.makespan
        real = isinstance(seconds, int | float | np.floating | np.integer)
        if not real or not 0 <= seconds < math.inf:
            rule = f"makespan of layer {load.layer} must be finite seconds, not negative"
            _blame(self, f"{rule}, got {_show(seconds)}", PlanError)
        sound = Plan(gpu, cpu, copies, shards, float(seconds))
        try:
            validate(sound, load, ready, cost.shards, name_of(self))
        except PlanError as error:
            error.kind = "scheduler"
            raise
        return sound

    def _integers(self, name: str, numbers: Array) -> Array:
        """A copy of one of a plan's arrays as [n] int32."""
        whole = isinstance(numbers, np.ndarray) and numbers.dtype.kind in "iu"
        if not whole or numbers.ndim != 1:
            rule = f"{name} must be a one-dimensional array of integers"
            _blame(self, f"{rule}, got {_show(numbers)}", PlanError)
        copied = np.array(numbers, np.int32)
        if not (copied == numbers).all():
            _blame(self, f"{name} must fit int32, got {_show(numbers)}", PlanError)
        return copied

    def _sound_gains(self, gains: Array, ready: Array) -> Array:
        if not isinstance(gains, np.ndarray) or gains.shape != ready.shape:
            _blame(self, f"gains must be an array of shape {ready.shape}, got {_show(gains)}")
        if gains.dtype != np.float64:
            _blame(self, f"gains must be float64, got {_show(gains)}")
        if not (np.isfinite(gains) & (gains >= ROUNDING)).all():
            _blame(self, f"gains must be finite and not negative, got {_show(gains)}")
        return gains.copy()


@dataclass(frozen=True)
class CheckedRanking(Ranking):
    """A ranking that is not trusted: it sees a copy of the books and owns nothing but the score."""

    policy: Ranking

    def observe(self, books: UsageStats, load: Load) -> None:
        _ask(self, lambda: self._observe(books, _copy_load(load)))

    def worth(self, books: UsageStats) -> Array:
        return _ask(self, lambda: self._sound(self.policy.worth(_copy_arrays(books)), books))

    def _observe(self, books: UsageStats, load: Load) -> None:
        mine = _copy_arrays(books)
        self.policy.observe(mine, load)
        self._check("books.score", mine.score, books)
        books.score[:] = mine.score

    def _sound(self, worth: Array, books: UsageStats) -> Array:
        self._check("worth", worth, books)
        if np.isnan(worth).any():
            layer, expert = np.argwhere(np.isnan(worth))[0].tolist()
            _blame(self, f"worth must not be NaN, it is for expert {expert} of layer {layer}")
        return np.ascontiguousarray(worth)

    def _check(self, name: str, numbers: Array, books: UsageStats) -> None:
        shape = books.score.shape
        if not isinstance(numbers, np.ndarray) or numbers.shape != shape:
            _blame(self, f"{name} must be an array of shape {shape}, got {_show(numbers)}")
        if numbers.dtype != np.float64:
            _blame(self, f"{name} must be float64, got {_show(numbers)}")


@dataclass(frozen=True)
class CheckedPrefetcher(Prefetcher):
    """A prefetcher that is not trusted: it sees a copy of the cache."""

    policy: Prefetcher

    def wanted(
        self,
        forecasts: Sequence[Forecast],
        cache: Cache,
        scheduler: Scheduler,
        timeline: Timeline,
        cost: CostModel,
    ) -> list[tuple[int, int]]:
        seen = [_copy_forecast(forecast) for forecast in forecasts]
        mine = (_copy_cache(cache), scheduler, timeline.fork(), cost)
        layers = [forecast.layer for forecast in forecasts]
        return _ask(self, lambda: self._sound(self.policy.wanted(seen, *mine), layers, cache.sizes))

    def _sound(
        self, wanted: list[tuple[int, int]], layers: list[int], sizes: Array
    ) -> list[tuple[int, int]]:
        """A copy of a list of different experts of the forecast layers."""
        if not isinstance(wanted, list | tuple):
            _blame(self, f"wanted must return a list of (layer, expert), got {_show(wanted)}")
        pairs = [self._pair(item) for item in wanted]
        for layer, expert in pairs:
            if layer not in layers or not 0 <= expert < sizes[layer]:
                most = sizes[layer if layer in layers else layers].max()
                rule = f"wanted must name layers of {layers} and experts in [0, {most})"
                _blame(self, f"{rule}, got layer {layer}, expert {expert}")
        if len(set(pairs)) < len(pairs):
            _blame(self, f"wanted must name an expert once, got {_show(pairs)}")
        return pairs

    def _pair(self, item: Any) -> tuple[int, int]:
        pair = isinstance(item, list | tuple) and len(item) == 2
        if not pair or not all(isinstance(n, int | np.integer) for n in item):
            _blame(self, f"wanted must return pairs of integers, got {_show(item)}")
        return int(item[0]), int(item[1])


def name_of(policy: object) -> str:
    """The name of a policy's class, of the user's where it stands behind checks."""
    checked = isinstance(policy, CheckedScheduler | CheckedRanking | CheckedPrefetcher)
    return type(policy.policy if checked else policy).__name__  # type: ignore[attr-defined]


def kind_of(policy: Scheduler | Ranking | Prefetcher) -> str:
    """Which of a run's three decisions a policy takes, by the name `Policies` has for it."""
    kinds = {Scheduler: "scheduler", Ranking: "ranking", Prefetcher: "prefetcher"}
    return next(name for base, name in kinds.items() if isinstance(policy, base))


def _is_ours(policy: object) -> bool:
    return type(policy).__module__.startswith(OURS)


def _ask(policy: Scheduler | Ranking | Prefetcher, question: Callable[[], T]) -> T:
    """The answer of a policy from outside; what it raises becomes a PolicyError that names it."""
    try:
        return question()
    except PolicyError as error:
        if error.kind:  # another policy failed, which this one asked
            raise
        _blame(policy, f"raised {_show_error(error)}", cause=error)
    except Exception as error:  # whatever it is, the policy is at fault
        _blame(policy, f"raised {_show_error(error)}", cause=error)


def _blame(
    policy: Scheduler | Ranking | Prefetcher,
    what: str,
    fault: type[PolicyError] = PolicyError,
    cause: Exception | None = None,
) -> NoReturn:
    kind = kind_of(policy)
    shown = "cache" if kind == "ranking" else kind
    error = fault(f"{name_of(policy)}, given as {shown}, broke its contract: {what}")
    error.kind = kind
    raise error from cause


def _show(value: Any) -> str:
    """Type and start of the text of whatever a policy returned."""
    try:
        text = repr(value)
    except Exception:  # a policy's own objects may even fail to show themselves
        text = "a value without text"
    shape = f" {value.dtype} {value.shape}" if isinstance(value, np.ndarray) else ""
    return f"{type(value).__name__}{shape} {text[:80]}"


def _show_error(error: Exception) -> str:
    try:
        text = str(error)
    except Exception:
        text = ""
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__


def _copy_load(load: Load) -> Load:
    return Load(load.layer, load.experts.copy(), load.tokens.copy(), load.scores.copy())


def _copy_forecast(forecast: Forecast) -> Forecast:
    experts, tokens = forecast.experts.copy(), forecast.tokens.copy()
    return forecast._replace(
        experts=experts, tokens=tokens, probability=forecast.probability.copy()
    )


def _copy_arrays(books: Owner) -> Owner:
    """The same object with arrays of its own."""
    mine = copy.copy(books)
    for name, value in vars(books).items():
        if isinstance(value, np.ndarray):
            setattr(mine, name, value.copy())
    return mine


def _copy_cache(cache: Cache) -> Cache:
    mine = _copy_arrays(cache)
    mine.books = _copy_arrays(cache.books)
    return mine
