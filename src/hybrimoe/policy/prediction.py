"""What a plan will take: the executor that only predicts, for simulation and as the runtime's books."""

import numpy as np

from hybrimoe.policy.cache import Move
from hybrimoe.policy.cost import SHARDS, CostModel
from hybrimoe.policy.jit import compiled
from hybrimoe.policy.plan import Plan, by_tokens, cpu_end, ends, gpu_s
from hybrimoe.policy.routing import Load
from hybrimoe.policy.spans import draw, draw_copy, draw_cpu
from hybrimoe.policy.timeline import Array, Lane, Timeline

CPU, GPU, LINK, POLICY = (int(lane) for lane in Lane)  # indexing by the enum is slower


class SimExecutor:
    """Predicts instead of running: every call only moves lanes of the timeline."""

    def __init__(self, cost: CostModel) -> None:
        self.cost = cost
        self.busy = np.zeros(len(Lane))
        self.uploads = 0
        self.link_bytes = 0
        self._end = 0.0
        self._cpu = (0.0, 0.0, 0.0)
        self._load: Load
        self._plan: Plan

    def dense(self, layer: int, tokens: int, timeline: Timeline) -> None:
        """The rest of the layer, before its experts."""
        seconds = self.cost.dense(tokens)
        self.busy[GPU] += seconds
        timeline.now = timeline.push(Lane.GPU, seconds, what=f"dense {layer}")

    def policy(self, seconds: float, wait: bool, timeline: Timeline) -> None:
        """Host work of the policies; planning holds up the layer, prefetching does not."""
        self.busy[POLICY] += seconds
        end = timeline.push(Lane.POLICY, seconds, what="plan" if wait else "prefetch")
        if wait:
            timeline.now = end

    def run(
        self, load: Load, plan: Plan, ready: Array, moves: list[Move], timeline: Timeline
    ) -> None:
        cost, now = self.cost.of(load.layer), timeline.now
        vector = cost.vector
        link, before = timeline.free[LINK], timeline.free[GPU]
        gpu, link_end, start, alone, contended = _execute(
            load.tokens, ready, plan.shards, timeline.free, now, vector
        )
        self._load, self._plan = load, plan
        self._end, self._cpu = gpu, (start, alone, contended)
        self.busy[GPU] += _gpu_work(load.tokens, plan.shards, vector)
        if moves:
            shards = sum(move.last - move.first for move in moves)
            self.uploads += len(moves)
            self.link_bytes += cost.expert_bytes * shards // cost.shards
            self.busy[LINK] += link_end - max(link, now)
            timeline.free[LINK] = link_end
        timeline.free[GPU] = gpu
        if timeline.spans is not None:
            lanes = max(before, now), max(link, now)
            timeline.spans += draw(load, plan, ready, now, lanes, cost, alone > 0.0)

    def copy(self, move: Move, timeline: Timeline) -> float:
        cost = self.cost.of(move.layer)
        part = (cost.shards if move.last < 0 else move.last) - move.first
        size = cost.expert_bytes * part // cost.shards
        seconds = cost.link(size, contended=self._cpu[1] > 0.0)
        self.uploads += move.first == 0
        self.link_bytes += size
        self.busy[LINK] += seconds
        arrival = timeline.push(Lane.LINK, seconds)
        if timeline.spans is not None:
            timeline.spans[-1] = draw_copy(move, timeline.spans[-1], size)
        return arrival

    def join(self, timeline: Timeline) -> None:
        start, alone, contended = self._cpu
        end = self._end
        if alone > 0.0:
            cost = self.cost.of(self._load.layer)
            done = cpu_end(start, alone, contended, float(timeline.free[LINK]))
            self.busy[CPU] += done - start + cost.cpu_first
            if timeline.spans is not None:
                first = start - cost.cpu_first
                timeline.spans += draw_cpu(self._load, self._plan, first, done, cost)
            end = max(end, done)
        timeline.join(max(end, timeline.now))


@compiled
def _gpu_work(tokens: Array, share: Array, cost: Array) -> float:
    seconds = 0.0
    for i in range(tokens.size):
        if share[i] > 0:
            seconds += gpu_s(tokens[i], share[i] / cost[SHARDS], cost)
    return seconds


@compiled
def _execute(
    tokens: Array, ready: Array, share: Array, free: Array, now: float, cost: Array
) -> tuple[float, float, float, float, float]:
    """What `planning.ends` predicts, on the timeline's clock."""
    lanes = np.maximum(free - now, 0.0)
    gpu, link, start, alone, work = ends(tokens, ready, lanes, cost, share, by_tokens(tokens))
    return now + gpu, now + link, now + start, alone, work
