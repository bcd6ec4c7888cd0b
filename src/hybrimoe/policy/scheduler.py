"""Where the experts of one layer run, and which of them move: the scheduling policies."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit

from hybrimoe.errors import PlanError
from hybrimoe.policy.cost import SHARDS, CostModel
from hybrimoe.policy.planning import by_tokens, hybrid, makespan, split
from hybrimoe.policy.routing import Load
from hybrimoe.policy.timeline import Array, Timeline

MANY_TOKENS = 32  # llama.cpp copies a layer's experts to the GPU from this batch size on
FAULTS = (
    "",
    "a result has the wrong length",
    "shards lie outside [0, shards]",
    "an expert with shards on the GPU is not exactly once in gpu",
    "an expert with shards on the CPU is not exactly once in cpu",
    "copies are not exactly the absent experts in gpu",
)


class Plan(NamedTuple):
    """Where the experts of one layer run."""

    gpu: Array  # experts on the GPU, in order; those in `copies` wait for their copy
    cpu: Array  # experts on the CPU, in order
    copies: Array  # absent experts copied now, in order
    shards: Array  # [A] how many of an activated expert's shards run on the GPU, the CPU the rest
    makespan: float  # predicted seconds from the layer's start to the join


class Scheduler(ABC):
    """Decides where the experts of one layer run.

    `ready` [A] belongs to `load.experts`: seconds from the layer's start until the expert's weights
    are on the GPU, 0 where it is resident, inf where it is absent, else it is on the wire.
    """

    @abstractmethod
    def plan(self, load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> Plan:
        """The plan of one layer that starts at `timeline.now`."""

    def gains(
        self,
        load: Load,
        ready: Array,
        timeline: Timeline,
        cost: CostModel,
        arrival: float = 0.0,
    ) -> Array:
        """[A] the seconds saved if this one expert were on the GPU `arrival` after the start."""
        before = self.plan(load, ready, timeline, cost).makespan
        gains = np.zeros(load.experts.size)
        for i in np.flatnonzero(ready > arrival):
            moved = ready.copy()
            moved[i] = arrival
            gains[i] = before - self.plan(load, moved, timeline, cost).makespan
        return gains


@dataclass(frozen=True)
class Hybrid(Scheduler):
    """The paper's greedy on three timelines (section IV-B), refusing what does not save time.

    Never slower than the best of: residents on the GPU and the rest on the CPU, all on either.
    """

    def plan(self, load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> Plan:
        return _compiled(_plan_hybrid, load, ready, timeline, cost)

    def gains(
        self, load: Load, ready: Array, timeline: Timeline, cost: CostModel, arrival: float = 0.0
    ) -> Array:
        now = timeline.now
        saved: Array = _gains_hybrid(load.tokens, ready, timeline.free, now, cost.vector, arrival)
        return saved


@dataclass(frozen=True)
class Split(Scheduler):
    """Like `Hybrid`, but one absent expert is divided so that link and CPU finish together.

    Searches all plans that copy the absent experts with most tokens and let the CPU steal the
    residents with fewest, at the granularity of shards.
    """

    def plan(self, load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> Plan:
        return _compiled(_plan_split, load, ready, timeline, cost)

    def gains(
        self, load: Load, ready: Array, timeline: Timeline, cost: CostModel, arrival: float = 0.0
    ) -> Array:
        now = timeline.now
        saved: Array = _gains_split(load.tokens, ready, timeline.free, now, cost.vector, arrival)
        return saved


@dataclass(frozen=True)
class Static(Scheduler):
    """Resident experts run on the GPU and the rest on the CPU (KTransformers, SOSP 2025).

    spill: an absent expert with more tokens than this is copied to the GPU after all.
    """

    spill: float = math.inf

    def plan(self, load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> Plan:
        on_gpu = np.isfinite(ready) | (load.tokens > self.spill)
        return place(load, ready, on_gpu, timeline, cost)


@dataclass(frozen=True)
class LayerWise(Scheduler):
    """A whole layer runs on one side: on the GPU if all its experts are there (llama.cpp).

    many: a layer whose busiest expert has this many tokens is copied to the GPU as a whole.
    """

    many: float = MANY_TOKENS

    def plan(self, load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> Plan:
        whole = bool(np.isfinite(ready).all()) or int(load.tokens.max(initial=0)) >= self.many
        return place(load, ready, np.full(ready.size, whole), timeline, cost)


@dataclass(frozen=True)
class OnDemand(Scheduler):
    """All experts run on the GPU and absent ones are fetched (AdapMoE, ICCAD 2024)."""

    def plan(self, load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> Plan:
        return place(load, ready, np.ones(ready.size, bool), timeline, cost)


@dataclass(frozen=True)
class CpuOnly(Scheduler):
    """All experts run on the CPU."""

    def plan(self, load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> Plan:
        return place(load, ready, np.zeros(ready.size, bool), timeline, cost)


@dataclass(frozen=True)
class Fiddler(Scheduler):
    """Each absent expert by itself takes the cheaper of copy and CPU (Fiddler, ICLR 2025)."""

    def plan(self, load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> Plan:
        copied = cost.link(cost.expert_bytes) + _gpu_seconds(load, cost)
        cheaper = copied < cost.cpu_expert + cost.cpu_token * load.tokens
        return place(load, ready, np.isfinite(ready) | cheaper, timeline, cost)


@dataclass(frozen=True)
class DALI(Scheduler):
    """Greedy 0-1 assignment: the costliest expert first, each to the side that then ends earlier
    (DALI, arXiv 2602.03495)."""

    def plan(self, load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> Plan:
        copy = np.where(np.isfinite(ready), 0.0, cost.link(cost.expert_bytes))
        gpu_each = np.maximum(_gpu_seconds(load, cost), copy)  # copies overlap with computing
        cpu_each = cost.cpu_expert + cost.cpu_token * load.tokens
        on_gpu = np.zeros(ready.size, bool)
        gpu, cpu = 0.0, cost.cpu_first
        for i in np.argsort(-np.maximum(gpu_each, cpu_each), kind="stable"):
            on_gpu[i] = gpu + gpu_each[i] <= cpu + cpu_each[i]
            gpu += gpu_each[i] * on_gpu[i]
            cpu += cpu_each[i] * (not on_gpu[i])
        return place(load, ready, on_gpu, timeline, cost)


def place(load: Load, ready: Array, on_gpu: Array, timeline: Timeline, cost: CostModel) -> Plan:
    """The plan that runs the experts where `on_gpu` [A] is true on the GPU, the rest on the CPU."""
    share = np.where(on_gpu, cost.shards, 0).astype(np.int32)
    return place_shards(load, ready, share, timeline, cost)


def place_shards(
    load: Load, ready: Array, share: Array, timeline: Timeline, cost: CostModel
) -> Plan:
    """The plan that runs `share` [A] shards of each expert on the GPU, the rest on the CPU."""
    out = np.empty((4, share.size), np.int32)
    out[3] = share
    free, now = timeline.free, timeline.now
    found = _place(load.experts, load.tokens, ready, free, now, cost.vector, out)
    return _plan(out, *found)


def validate(plan: Plan, load: Load, ready: Array, shards: int, name: str = "a plan") -> None:
    """Raise PlanError unless every shard of every activated expert runs exactly once.

    name: the policy that made the plan, for the message.
    """
    try:
        fault = _fault(load.experts, ready, shards, plan.gpu, plan.cpu, plan.copies, plan.shards)
    except (TypeError, ValueError, AttributeError) as error:
        raise PlanError(f"{name} returned no plan: {error}") from error
    if fault:
        raise PlanError(
            f"{name} broke its contract in layer {load.layer}: {FAULTS[fault]} (activated "
            f"{load.experts.tolist()}, gpu {plan.gpu.tolist()}, cpu {plan.cpu.tolist()}, "
            f"copies {plan.copies.tolist()}, shards {plan.shards.tolist()} of {shards})"
        )
    if not math.isfinite(plan.makespan):
        raise PlanError(f"{name} predicts {plan.makespan} seconds for layer {load.layer}")


def _compiled(
    core: Callable[..., tuple[int, int, int, float]],
    load: Load,
    ready: Array,
    timeline: Timeline,
    cost: CostModel,
) -> Plan:
    out = np.empty((4, ready.size), np.int32)
    found = core(load.experts, load.tokens, ready, timeline.free, timeline.now, cost.vector, out)
    return _plan(out, *found)


def _plan(out: Array, gpu: int, cpu: int, copies: int, seconds: float) -> Plan:
    return Plan(out[0, :gpu], out[1, :cpu], out[2, :copies], out[3], seconds)


def _gpu_seconds(load: Load, cost: CostModel) -> Array:
    return np.maximum(cost.gpu_read, cost.gpu_token * load.tokens) + cost.gpu_launch


@njit(cache=True)
def _relative(free: Array, now: float) -> Array:
    return np.maximum(free - now, 0.0)


@njit(cache=True)
def _order(
    experts: Array, tokens: Array, ready: Array, shards: int, out: Array
) -> tuple[int, int, int]:
    """Write the lists of a plan whose shards stand in out[3]: residents, arrivals, copies; CPU."""
    order = by_tokens(tokens)
    gpu = cpu = copies = 0
    for i in order[::-1]:
        if out[3, i] < shards:
            out[1, cpu] = experts[i]
            cpu += 1
    last = -1.0
    while True:
        arrival = np.inf
        for i in order:
            if out[3, i] > 0 and last < ready[i] < arrival:
                arrival = ready[i]
        for i in order:
            if out[3, i] > 0 and ready[i] == arrival:
                out[0, gpu] = experts[i]
                gpu += 1
                if arrival == np.inf:
                    out[2, copies] = experts[i]
                    copies += 1
        if arrival == np.inf:
            return gpu, cpu, copies
        last = arrival


@njit(cache=True)
def _place(
    experts: Array, tokens: Array, ready: Array, free: Array, now: float, cost: Array, out: Array
) -> tuple[int, int, int, float]:
    lanes = _relative(free, now)
    seconds = makespan(tokens, ready, lanes, cost, out[3], by_tokens(tokens))
    gpu, cpu, copies = _order(experts, tokens, ready, int(cost[SHARDS]), out)
    return gpu, cpu, copies, seconds


@njit(cache=True)
def _plan_hybrid(
    experts: Array, tokens: Array, ready: Array, free: Array, now: float, cost: Array, out: Array
) -> tuple[int, int, int, float]:
    seconds = hybrid(tokens, ready, _relative(free, now), cost, out[3])
    gpu, cpu, copies = _order(experts, tokens, ready, int(cost[SHARDS]), out)
    return gpu, cpu, copies, seconds


@njit(cache=True)
def _plan_split(
    experts: Array, tokens: Array, ready: Array, free: Array, now: float, cost: Array, out: Array
) -> tuple[int, int, int, float]:
    seconds = split(tokens, ready, _relative(free, now), cost, out[3])
    gpu, cpu, copies = _order(experts, tokens, ready, int(cost[SHARDS]), out)
    return gpu, cpu, copies, seconds


@njit(cache=True)
def _gains_hybrid(
    tokens: Array, ready: Array, free: Array, now: float, cost: Array, arrival: float
) -> Array:
    lanes, share = _relative(free, now), np.empty(tokens.size, np.int32)
    gains, moved = np.zeros(tokens.size), ready.copy()
    before = hybrid(tokens, moved, lanes, cost, share)
    for i in range(tokens.size):
        if ready[i] > arrival:
            moved[i] = arrival
            gains[i] = before - hybrid(tokens, moved, lanes, cost, share)
            moved[i] = ready[i]
    return gains


@njit(cache=True)
def _gains_split(
    tokens: Array, ready: Array, free: Array, now: float, cost: Array, arrival: float
) -> Array:
    lanes, share = _relative(free, now), np.empty(tokens.size, np.int32)
    gains, moved = np.zeros(tokens.size), ready.copy()
    before = split(tokens, moved, lanes, cost, share)
    for i in range(tokens.size):
        if ready[i] > arrival:
            moved[i] = arrival
            gains[i] = before - split(tokens, moved, lanes, cost, share)
            moved[i] = ready[i]
    return gains


@njit(cache=True)
def _fault(
    experts: Array, ready: Array, shards: int, gpu: Array, cpu: Array, copies: Array, share: Array
) -> int:
    """Index into FAULTS of the first broken rule, 0 where the plan is sound."""
    if share.size != experts.size or copies.size > gpu.size:
        return 1
    on_gpu = on_cpu = copied = 0
    for i in range(experts.size):
        if share[i] < 0 or share[i] > shards:
            return 2
        times_gpu = times_cpu = times_copied = 0
        for e in gpu:
            times_gpu += e == experts[i]
        for e in cpu:
            times_cpu += e == experts[i]
        for e in copies:
            times_copied += e == experts[i]
        if times_gpu != (share[i] > 0):
            return 3
        if times_cpu != (share[i] < shards):
            return 4
        if times_copied != (share[i] > 0 and ready[i] == np.inf):
            return 5
        on_gpu, on_cpu, copied = on_gpu + times_gpu, on_cpu + times_cpu, copied + times_copied
    if on_gpu != gpu.size or on_cpu != cpu.size or copied != copies.size:
        return 3 if on_gpu != gpu.size else 4 if on_cpu != cpu.size else 5
    return 0
