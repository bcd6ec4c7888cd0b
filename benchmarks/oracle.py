"""What no policy can beat: a trace that forecasts itself, and the best of all schedules."""

import dataclasses
from dataclasses import dataclass

import numpy as np

from hybrimoe.errors import ConfigError
from hybrimoe.policy.cost import SHARDS, CostModel
from hybrimoe.policy.jit import compiled
from hybrimoe.policy.plan import Plan, by_tokens, makespan, place_shards
from hybrimoe.policy.routing import NO_EXPERT, Load
from hybrimoe.policy.schedulers import Scheduler
from hybrimoe.policy.timeline import Array, Timeline
from hybrimoe.simulation.trace import RoutingTrace

MOST_PLANS = 2_000_000


def perfect_forecasts(trace: RoutingTrace, depth: int = 4) -> RoutingTrace:
    """The same trace of decode steps with forecasts that all come true."""
    if trace.prefill.any():
        raise ConfigError(
            f"perfect forecasts are of decode steps, the trace has {trace.prefill.sum()} of prefill"
        )
    ids = np.full((trace.steps, trace.layers, depth, trace.top_k), NO_EXPERT, np.uint16)
    tokens = np.zeros(ids.shape, np.float16)
    for d in range(min(depth, trace.layers - 1)):
        last = trace.layers - 1 - d
        ids[:, :last, d] = trace.ids[:, d + 1 :, : trace.top_k]
        tokens[:, :last, d] = 1
    return dataclasses.replace(trace, forecast_ids=ids, forecast_tokens=tokens)


@dataclass(frozen=True)
class Exact(Scheduler):
    """The best of all divisions of the experts' shards between GPU and CPU, by trying each.

    whole: experts are not divided. Refuses loads with more than two million plans.
    """

    whole: bool = False

    def plan(self, load: Load, ready: Array, timeline: Timeline, cost: CostModel) -> Plan:
        step = cost.shards if self.whole else 1
        ways = cost.shards // step + 1
        if ways**load.experts.size > MOST_PLANS:
            raise ConfigError(
                f"an exact schedule tries {ways} ways for each of {load.experts.size} experts: "
                f"more than {MOST_PLANS} plans"
            )
        lanes = np.maximum(timeline.free - timeline.now, 0.0)
        share = np.zeros(load.experts.size, np.int32)
        best_shares(load.tokens, ready, lanes, cost.vector, share, step)
        return place_shards(load, ready, share, timeline, cost)


@compiled
def best_shares(
    tokens: Array, ready: Array, lanes: Array, cost: Array, share: Array, step: int
) -> float:
    """Fill `share` with the division that ends first, counting up like an odometer."""
    shards, order = np.int32(cost[SHARDS]), by_tokens(tokens)
    trial, best = np.zeros_like(share), np.inf
    while True:
        seconds = makespan(tokens, ready, lanes, cost, trial, order)
        if seconds < best:
            best = seconds
            share[:] = trial
        i = 0
        while i < trial.size and trial[i] == shards:
            trial[i] = 0
            i += 1
        if i == trial.size:
            return float(best)
        trial[i] += step
