"""Replay a routing trace on a hardware profile: the same engine, with a predicting executor."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from hybrimoe.errors import ConfigError, ProfileError
from hybrimoe.policy.cache import Cache
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.engine import Engine, Policies
from hybrimoe.policy.forecasts import Markov
from hybrimoe.policy.prediction import SimExecutor
from hybrimoe.policy.prefetchers import Prefetcher
from hybrimoe.policy.presets import preset as named
from hybrimoe.policy.profiles import Profile, Shape
from hybrimoe.policy.profiles import profile as profile_by_name
from hybrimoe.policy.profiles import shape as shape_by_model
from hybrimoe.policy.rankings import Ranking
from hybrimoe.policy.schedulers import Scheduler
from hybrimoe.policy.timeline import Array, Lane, Span, Timeline
from hybrimoe.simulation.trace import RoutingTrace
from hybrimoe.sizes import expert_budget


@dataclass(frozen=True)
class Result:
    """What a replay took; seconds and bytes. Decode numbers leave prefill steps out.

    decode_s_per_token: mean seconds of a decode step. prefill_s: mean time to first token, None
    without prefill steps. hit_rate: share of activated experts that were resident when asked for;
    late_rate: share that was on the wire. uploads_per_token: copies of experts.
    prefetches_per_token: those for layers still to come; prefetch_precision: the share of them that
    was asked for while it was there or on the wire, None without prefetches.
    lanes: busy seconds per decode step by lane name; idle: the share of the time each lane was not.
    """

    preset: str
    profile: str
    slots: int
    steps: int
    tokens: int
    decode_s_per_token: float | None
    prefill_s: float | None
    hit_rate: float
    late_rate: float
    uploads_per_token: float
    link_bytes_per_token: float
    lanes: dict[str, float]
    idle: dict[str, float]
    spans: tuple[Span, ...] = ()
    prefetches_per_token: float = 0.0
    prefetch_precision: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """Everything but the spans, for JSON."""
        return {name: value for name, value in vars(self).items() if name != "spans"}


def simulate(
    trace: RoutingTrace,
    profile: str | Profile | CostModel = "desktop",
    preset: str | Policies = "hybrimoe",
    *,
    vram: int | float | str = 0.25,
    scheduler: Scheduler | None = None,
    cache: Ranking | None = None,
    prefetcher: Prefetcher | None = None,
    shape: str | Shape | None = None,
    prior: Array | None = None,
    look_ahead: bool = True,
    spans: bool = False,
) -> Result:
    """Replay a trace under a preset's policies, or others in their place.

    profile: a shipped machine's name, a profile, or a measured cost model.
    vram: for experts; bytes, a string such as "6GiB", or a fraction of all experts.
    shape: of the experts, or a model's name, where neither the trace nor its model's name tells it.
    prior: [L, E] how often experts were used before; decides who is resident at the start. By
        default the trace's own frequencies, which favours presets that never change residents.
    look_ahead: use the forecasts recorded in the trace where it has some, else a Markov table.
    """
    policies = _policies(preset, scheduler, cache, prefetcher)
    cost = _cost(profile, trace, shape)
    slots = _slots(vram, trace, cost)
    prior = trace.frequencies() if prior is None else np.asarray(prior, np.float64)
    if prior.shape != (trace.layers, trace.experts):
        want = (trace.layers, trace.experts)
        raise ConfigError(f"prior must have shape {want}, got {prior.shape}")
    table = Cache(
        policies.ranking, slots, trace.layers, trace.experts, trace.top_k, frequency=prior
    )
    table.fill(prior)
    executor = SimExecutor(cost)
    recorded = look_ahead and trace.depth > 0
    depth = policies.prefetcher.depth
    markov = None
    if depth and not recorded:
        markov = Markov(trace.layers, trace.experts, trace.top_k, depth=depth)
    timeline = Timeline(trace=spans)
    engine = Engine(policies, table, cost, executor, timeline=timeline, forecaster=markov)
    totals = _replay(trace, engine, executor, recorded)
    name = preset if isinstance(preset, str) else "custom"
    machine = profile if isinstance(profile, str) else getattr(profile, "name", "measured")
    return _result(name, machine, slots, trace, totals, timeline)


def _replay(
    trace: RoutingTrace, engine: Engine, executor: SimExecutor, recorded: bool
) -> dict[str, Any]:
    """All steps through the engine; decode and prefill are counted apart."""
    timeline, cost = engine.timeline, engine.cost
    decode = prefill = 0.0
    lanes, used, counted, ahead = np.zeros(len(Lane)), np.zeros(2), np.zeros(3), np.zeros(2)
    for step in range(trace.steps):
        start, tokens = timeline.now, trace.tokens(step)
        busy, link = executor.busy.copy(), (executor.uploads, executor.link_bytes)
        hits = engine.hits, engine.misses, engine.late
        fetched = engine.prefetched, engine.prefetches_used
        for load in trace.loads(step):
            executor.dense(load.layer, tokens, timeline)
            executor.policy(cost.plan_s, True, timeline)
            if engine.depth:
                executor.policy(cost.forecast_s * engine.depth, False, timeline)
            engine.step(load, trace.forecasts(step, load.layer) if recorded else ())
        if trace.prefill[step]:
            prefill += timeline.now - start
            continue
        decode += timeline.now - start
        lanes += executor.busy - busy
        used += executor.uploads - link[0], executor.link_bytes - link[1]
        counted += engine.hits - hits[0], engine.misses - hits[1], engine.late - hits[2]
        ahead += engine.prefetched - fetched[0], engine.prefetches_used - fetched[1]
    return {
        **{"decode": decode, "prefill": prefill, "lanes": lanes},
        **{"used": used, "hits": counted, "ahead": ahead},
    }


def _result(
    name: str,
    machine: str,
    slots: int,
    trace: RoutingTrace,
    totals: dict[str, Any],
    timeline: Timeline,
) -> Result:
    prefills = int(trace.prefill.sum())
    steps = trace.steps - prefills
    tokens = sum(trace.tokens(int(s)) for s in np.flatnonzero(~trace.prefill))
    asked, decode = max(totals["hits"].sum(), 1), totals["decode"]
    lanes, (ahead, useful) = totals["lanes"], totals["ahead"]
    return Result(
        preset=name,
        profile=machine,
        slots=slots,
        steps=trace.steps,
        tokens=tokens,
        decode_s_per_token=decode / steps if steps else None,
        prefill_s=totals["prefill"] / prefills if prefills else None,
        hit_rate=float(totals["hits"][0] / asked),
        late_rate=float(totals["hits"][2] / asked),
        uploads_per_token=float(totals["used"][0] / max(tokens, 1)),
        link_bytes_per_token=float(totals["used"][1] / max(tokens, 1)),
        lanes={lane.name: float(lanes[lane] / max(steps, 1)) for lane in Lane},
        idle={lane.name: 1 - float(lanes[lane]) / decode if decode else 1.0 for lane in Lane},
        spans=tuple(timeline.spans or ()),
        prefetches_per_token=float(ahead / max(tokens, 1)),
        prefetch_precision=float(useful / ahead) if ahead else None,
    )


def _policies(
    preset: str | Policies,
    scheduler: Scheduler | None,
    ranking: Ranking | None,
    prefetcher: Prefetcher | None,
) -> Policies:
    base = named(preset) if isinstance(preset, str) else preset
    return Policies(
        scheduler or base.scheduler, ranking or base.ranking, prefetcher or base.prefetcher
    )


def _cost(
    profile: str | Profile | CostModel, trace: RoutingTrace, shape: str | Shape | None
) -> CostModel:
    if isinstance(profile, CostModel):
        return profile
    machine = profile_by_name(profile) if isinstance(profile, str) else profile
    shape = shape_by_model(shape) if isinstance(shape, str) else shape
    if shape is None and trace.shape:
        shape = Shape(*trace.shape)
    if shape is None and not trace.model:
        raise ProfileError(
            "the trace names no model: pass shape=Shape(hidden, intermediate, dense)"
        )
    return machine.cost(shape_by_model(trace.model) if shape is None else shape)


def _slots(vram: int | float | str, trace: RoutingTrace, cost: CostModel) -> int:
    everything = trace.layers * trace.experts
    slots = int(expert_budget(vram, everything * cost.expert_bytes) // cost.expert_bytes)
    if 0 < slots < trace.top_k:
        raise ConfigError(
            f"vram={vram!r} holds {slots} experts of {cost.expert_bytes} bytes, one layer's top-k "
            f"needs {trace.top_k}"
        )
    return min(slots, everything)
