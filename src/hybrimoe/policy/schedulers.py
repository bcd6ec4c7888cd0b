"""Where the experts of one layer run, and which of them move: the scheduling policies."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.greedy import gains_hybrid, plan_hybrid
from hybrimoe.policy.plan import Plan as Plan
from hybrimoe.policy.plan import place as place
from hybrimoe.policy.plan import plan_by
from hybrimoe.policy.routing import Load
from hybrimoe.policy.split import gains_split, plan_split
from hybrimoe.policy.timeline import Array, Timeline

MANY_TOKENS = 32  # llama.cpp copies a layer's experts to the GPU from this batch size on


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
        """[A] the seconds saved if this one expert were on the GPU `arrival` after the start.

        Computed from `plan`. A scheduler that computes its own returns no negative ones.
        """
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
        return plan_by(plan_hybrid, load, ready, timeline, cost)

    def gains(
        self, load: Load, ready: Array, timeline: Timeline, cost: CostModel, arrival: float = 0.0
    ) -> Array:
        saved, (free, now) = np.empty(ready.size), (timeline.free, timeline.now)
        gains_hybrid(load.tokens, ready, free, now, cost.vector, arrival, saved)
        return saved


@dataclass(frozen=True)
class Split(Scheduler):
    """Like `Hybrid`, but one absent expert is divided so that link and CPU finish together.

    Searches all plans that copy the absent experts with most tokens and let the CPU steal the
    residents with fewest, at the granularity of shards.
    """

    def plan(self, load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> Plan:
        return plan_by(plan_split, load, ready, timeline, cost)

    def gains(
        self, load: Load, ready: Array, timeline: Timeline, cost: CostModel, arrival: float = 0.0
    ) -> Array:
        saved, (free, now) = np.empty(ready.size), (timeline.free, timeline.now)
        gains_split(load.tokens, ready, free, now, cost.vector, arrival, saved)
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


def _gpu_seconds(load: Load, cost: CostModel) -> Array:
    return np.maximum(cost.gpu_read, cost.gpu_token * load.tokens) + cost.gpu_launch
