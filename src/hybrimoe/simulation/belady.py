"""The ranking that knows the future: what no cache can beat on a recorded trace."""

from dataclasses import dataclass, field

import numpy as np

from hybrimoe.errors import PolicyError
from hybrimoe.policy.rankings import Ranking, UsageStats
from hybrimoe.policy.routing import Load
from hybrimoe.policy.timeline import Array
from hybrimoe.simulation.trace import RoutingTrace


@dataclass(frozen=True)
class Belady(Ranking):
    """Keeps what is used soonest (offline): no cache of the same size hits more often.

    used: [S, L, A] the experts of each step and layer, -1 pads; future: [S, L, A] the step in which
    each of them is used next. `Belady.of(trace)` finds both.
    """

    admission: bool = True
    used: Array = field(default_factory=lambda: np.zeros((0, 0, 0), np.int32), compare=False)
    future: Array = field(default_factory=lambda: np.zeros((0, 0, 0), np.int32), compare=False)

    @classmethod
    def of(cls, trace: RoutingTrace, scope: str = "layer") -> "Belady":
        """The ranking that knows this trace."""
        steps = [trace.loads(step) for step in range(trace.steps)]
        widest = max((load.experts.size for loads in steps for load in loads), default=0)
        used = np.full((trace.steps, trace.layers, widest), -1, np.int32)
        for step, loads in enumerate(steps):
            for load in loads:
                used[step, load.layer, : load.experts.size] = load.experts
        return cls(scope=scope, used=used, future=_next_uses(used, trace.experts))

    def observe(self, books: UsageStats, load: Load) -> None:
        step = int(books.steps[load.layer]) - 1
        if step >= len(self.used):
            raise PolicyError(f"Belady knows {len(self.used)} steps and met step {step}")
        if step == 0:
            books.score[load.layer] = -np.inf  # not used yet: worth nothing
        used = self.used[step, load.layer]
        kept = used >= 0
        books.score[load.layer, used[kept]] = -self.future[step, load.layer, kept]

    def worth(self, books: UsageStats) -> Array:
        return books.score


def _next_uses(used: Array, experts: int) -> Array:
    """The step in which each used expert is used again, past the end if never."""
    future = np.full(used.shape, 2 * len(used), np.int32)
    following = np.full((used.shape[1], experts), 2 * len(used), np.int32)
    for step in range(len(used) - 1, -1, -1):
        for layer in range(used.shape[1]):
            now = used[step, layer]
            now = now[now >= 0]
            future[step, layer, : now.size] = following[layer, now]
            following[layer, now] = step
    return future
