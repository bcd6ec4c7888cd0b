"""What later layers will ask for, learnt from expert ids where no router can be run early."""

from collections.abc import Sequence

import numpy as np

from hybrimoe.errors import ConfigError
from hybrimoe.policy.jit import compiled, inner
from hybrimoe.policy.routing import Forecast, Load
from hybrimoe.policy.timeline import Array
from hybrimoe.sizes import expert_counts

CAP = 0.95  # no forecast is surer than this
TRUST = 0.02  # weight of the newest forecast in how far forecasts are believed
NO_EXPERTS: Array = np.zeros(0, np.int32)


class Markov:
    """Forecasts from the experts of this layer and from the target layer's previous token.

    Tables of P(expert | an expert seen d layers before) and P(expert | an expert of the previous
    token) are learnt as moving averages. A forecast averages their square roots, which recalls more
    than averaging them or their log-odds: the activated experts are far from independent.

    experts: how many a layer has, or [L] where layers differ.
    depth: layers to look ahead. rate: weight of the newest token in the tables.
    width: experts in one forecast, None for those activated by one token.
    across: weight of the earlier layers' experts, the rest is the previous token's.
    """

    def __init__(
        self,
        layers: int,
        experts: int | Array,
        top_k: int,
        *,
        depth: int = 1,
        rate: float = 0.04,
        width: int | None = None,
        across: float = 0.85,
    ) -> None:
        if depth < 1 or not 0 < rate <= 1:
            raise ConfigError(f"depth must be positive and rate in (0, 1], got {depth}, {rate}")
        self.sizes = expert_counts(layers, experts)
        most = int(self.sizes.max())
        self.layers, self.experts, self.top_k, self.depth = layers, most, top_k, depth
        self.rate, self.width, self.across = rate, min(width or top_k, most), across
        start = (top_k / self.sizes)[:, None, None]
        self.ahead: Array = np.full((depth, layers, most, most), start, np.float32)
        self.again: Array = np.full((layers, most, most), start, np.float32)
        self.seen: Array = np.zeros((layers, most), np.int32)  # of the latest step
        self._single: Array = np.ones(self.width, np.int32)  # tokens of every forecast
        self._score: Array = np.empty(most)

    def observe(self, load: Load) -> None:
        """Learn from one layer; layers come in order."""
        _learn(self.ahead, self.again, self.seen, load.layer, load.experts, self.rate)

    def forecast(self, layer: int) -> list[Forecast]:
        """Forecasts for up to `depth` layers after one that was just observed."""
        found = []
        for d in range(min(self.depth, self.layers - 1 - layer)):
            target = layer + 1 + d
            size = self.sizes.item(target)
            width = min(self.width, size)
            experts, probability = np.empty(width, np.int32), np.empty(width)
            _forecast(
                *(self.ahead, self.again, self.seen, d, layer, self.across, min(self.top_k, size)),
                *(self._score[:size], experts, probability),
            )
            found.append(Forecast(target, experts, self._single[:width], probability))
        return found


class Trust:
    """How often forecast experts are activated, against how often they were said to be.

    `factor(d)` scales the probabilities of forecasts d layers ahead so that they come true.
    """

    def __init__(self, depth: int) -> None:
        self.expected: Array = np.full(depth, 1e-3)
        self.found: Array = np.full(depth, 1e-3)
        self._pending: dict[int, dict[int, Forecast]] = {}  # by target, by layers ahead

    def expect(self, layer: int, forecasts: Sequence[Forecast]) -> None:
        """Remember what was forecast at `layer` until its target runs.

        A target that has not run since the last time, as a layer of vision experts does not while
        text is written, has asked for nothing.
        """
        for forecast in forecasts:
            ahead, pending = forecast.layer - layer - 1, self._pending
            missed = pending.setdefault(forecast.layer, {}).pop(ahead, None)
            if missed is not None:
                self._compare(ahead, missed, NO_EXPERTS)
            pending[forecast.layer][ahead] = forecast

    def settle(self, load: Load) -> None:
        """Compare with what a layer really asked for."""
        for ahead, forecast in self._pending.pop(load.layer, {}).items():
            self._compare(ahead, forecast, load.experts)

    def factor(self, ahead: int) -> float:
        """What to multiply a probability by, `ahead` + 1 layers before its target."""
        return float(self.found.item(ahead) / self.expected.item(ahead))

    def _compare(self, ahead: int, forecast: Forecast, experts: Array) -> None:
        if ahead < self.found.size:
            _settle(
                *(self.expected, self.found, ahead),
                *(forecast.experts, forecast.probability, experts),
            )


@compiled
def _learn(
    ahead: Array, again: Array, seen: Array, layer: int, experts: Array, rate: float
) -> None:
    for d in range(min(ahead.shape[0], layer)):
        _move(ahead[d, layer], seen[layer - 1 - d], experts, rate)
    _move(again[layer], seen[layer], experts, rate)
    seen[layer] = 0
    for e in experts:
        seen[layer, e] = 1


@inner
def _move(table: Array, given: Array, experts: Array, rate: float) -> None:
    """Move the rows of the given experts towards what was activated."""
    for e in range(given.size):
        if given[e] > 0:
            for f in range(given.size):
                table[e, f] *= 1.0 - rate
            for f in experts:
                table[e, f] += rate


@compiled
def _forecast(
    ahead: Array,
    again: Array,
    seen: Array,
    d: int,
    layer: int,
    across: float,
    top_k: int,
    score: Array,
    experts: Array,
    probability: Array,
) -> None:
    """Fill experts [W] and probability [W]: what layer + 1 + d will use, the most probable first.

    score: as long as that layer has experts.
    """
    target, count = layer + 1 + d, score.size
    here, before = seen[layer], seen[target]
    score[:] = 0.0
    near, late = max(here.sum(), 1), max(before.sum(), 1)
    for e in range(here.size):
        if here[e] > 0:
            for f in range(count):
                score[f] += across / near * np.sqrt(ahead[d, target, e, f])
        if before[e] > 0:
            for f in range(count):
                score[f] += (1.0 - across) / late * np.sqrt(again[target, e, f])
    score *= score * score  # averaging flattens the scores; cubes come true as probabilities
    scale = top_k / max(score.sum(), 1e-9)  # top_k experts will be activated, whatever the scores
    for k in range(experts.size):
        best = np.argmax(score)
        experts[k] = best
        probability[k] = min(score[best] * scale, CAP)
        score[best] = -1.0


@compiled
def _settle(
    expected: Array, found: Array, ahead: int, experts: Array, probability: Array, real: Array
) -> None:
    hits, said = 0, 0.0
    for i in range(experts.size):
        said += probability[i]
        for e in real:
            hits += e == experts[i]
    expected[ahead] += TRUST * (said - expected[ahead])
    found[ahead] += TRUST * (hits - found[ahead])
