"""What a slot on the GPU is worth: rankings of experts, and the books they are read from."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np

from hybrimoe.errors import ConfigError
from hybrimoe.policy.routing import Load
from hybrimoe.policy.slots import top_p_update
from hybrimoe.policy.timeline import Array
from hybrimoe.policy.transitions import blend, follow
from hybrimoe.sizes import expert_counts

SCOPES = ("model", "layer")
SHARES = ("equal", "frequency")


class UsageStats:
    """What has been observed, per layer and expert: plain arrays that rankings read.

    experts: how many a layer has, or [L] where layers differ. E is then the most of any layer, and
    what a layer lacks of that keeps its place in all arrays, but is never used.
    count [L, E] tokens seen. last, previous [L, E] the ticks of the two latest uses, -1 for never.
    rate [L, E] share of recent steps that used the expert. score [L, E] belongs to the ranking.
    steps [L] loads observed; tick counts them over all layers.
    recent [L, E], follows [L, E, E] and seen [L, E] are there for rankings that ask for them.
    """

    def __init__(self, layers: int, experts: int | Array, top_k: int) -> None:
        self.sizes = expert_counts(layers, experts)  # [L] experts of each layer
        shape = (layers, int(self.sizes.max()))
        self.top_k = top_k
        self.tick = 0
        self.steps: Array = np.zeros(layers, np.int64)
        self.count: Array = np.zeros(shape)
        self.last: Array = np.full(shape, -1.0)
        self.previous: Array = np.full(shape, -1.0)
        self.rate: Array = np.zeros(shape)
        for layer, count in enumerate(self.sizes.tolist()):
            self.rate[layer, :count] = min(top_k / count, 1.0)
        self.score: Array = np.zeros(shape)
        self.recent: Array = np.zeros((0, 0))
        self.follows: Array = np.zeros((0, 0, 0), np.float32)
        self.seen: Array = np.zeros((0, 0), np.int8)

    def learn_successors(self) -> None:
        """Make room for what follows what, once: no expert is likelier than another to begin with."""
        layers, experts = self.score.shape
        self.recent = np.zeros_like(self.score)
        self.follows = np.zeros((layers, experts, experts), np.float32)
        for layer, count in enumerate(self.sizes.tolist()):
            self.follows[layer, :, :count] = min(self.top_k / count, 1.0)
        self.seen = np.zeros((layers, experts), np.int8)


@dataclass(frozen=True, kw_only=True)
class Ranking(ABC):
    """Says what each expert is worth keeping; the cache evicts the one that is worth least.

    scope: "model" lets slots move between layers, "layer" keeps every layer's quota.
    admission: insert only what is worth more than its victim. Without it every copy stays.
    backfill: experts that missed and ran on the CPU are copied afterwards, while the link is idle.
    shares: in layer scope, "equal" quotas, or those that hit most by the "frequency" given.
    frozen: residents stay what they were at the start.
    """

    scope: str = "layer"
    admission: bool = False
    backfill: bool = False
    shares: str = "equal"
    frozen: bool = False

    def __post_init__(self) -> None:
        if self.scope not in SCOPES:
            raise ConfigError(f"scope must be one of {SCOPES}, got {self.scope!r}")
        if self.shares not in SHARES:
            raise ConfigError(f"shares must be one of {SHARES}, got {self.shares!r}")

    def observe(self, books: UsageStats, load: Load) -> None:  # noqa: B027 (books suffice for most)
        """Update `books.score` after the counts have been updated."""

    @abstractmethod
    def worth(self, books: UsageStats) -> Array:
        """[L, E] float64; may be one of the books' own arrays."""


@dataclass(frozen=True)
class MRS(Ranking):
    """Keeps the experts whose router scores are high on average (minus recent score, section IV-D).

    S = alpha * TopP(s) + (1 - alpha) * S, where s are a step's scores and TopP keeps the p largest.
    alpha: weight of the newest step. p: scores kept, None for twice the activated experts.
    A step of T tokens counts as T steps with their mean scores.
    """

    alpha: float = 0.1
    p: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.alpha <= 1:
            raise ConfigError(f"alpha must lie in (0, 1], got {self.alpha}")
        if self.p is not None and self.p < 1:
            raise ConfigError(f"p must be at least 1 or None, got {self.p}")

    def observe(self, books: UsageStats, load: Load) -> None:
        kept = 2 * books.top_k if self.p is None else self.p
        tokens = load.tokens
        top_p_update(books.score, load.layer, load.scores, tokens, books.top_k, kept, self.alpha)

    def worth(self, books: UsageStats) -> Array:
        return books.score


@dataclass(frozen=True)
class NextToken(Ranking):
    """Keeps the experts that the next tokens will probably use.

    Worth is MRS plus `weight` times P(expert | the experts of this token), from a table learnt as a
    moving average: which experts follow which tells more than how often each was used.
    alpha, p: as in MRS. rate: weight of the newest token in the table.
    """

    alpha: float = 0.15
    p: int | None = None
    rate: float = 0.05
    weight: float = 0.7

    def __post_init__(self) -> None:
        super().__post_init__()
        MRS(alpha=self.alpha, p=self.p)  # the same rules
        if not 0 < self.rate <= 1:
            raise ConfigError(f"rate must lie in (0, 1], got {self.rate}")
        if not 0 <= self.weight < np.inf:
            raise ConfigError(f"weight must be at least 0 and finite, got {self.weight}")

    def observe(self, books: UsageStats, load: Load) -> None:
        if not books.recent.size:
            books.learn_successors()
        kept = 2 * books.top_k if self.p is None else self.p
        layer, experts, tokens, top_k = load.layer, load.experts, load.tokens, books.top_k
        top_p_update(books.recent, layer, load.scores, tokens, top_k, kept, self.alpha)
        size = books.sizes.item(layer)
        follow(books.follows, books.seen, layer, size, experts, tokens, top_k, self.rate)
        blend(books.score, books.recent, books.follows, layer, experts, tokens, float(self.weight))

    def worth(self, books: UsageStats) -> Array:
        return books.score


@dataclass(frozen=True)
class LRU(Ranking):
    """Keeps what was used last."""

    def worth(self, books: UsageStats) -> Array:
        return books.last


@dataclass(frozen=True)
class LFU(Ranking):
    """Keeps what was used most."""

    def worth(self, books: UsageStats) -> Array:
        return books.count


@dataclass(frozen=True)
class LRU2(Ranking):
    """Keeps what was used twice in the shortest time (LRU-K, SIGMOD 1993)."""

    def observe(self, books: UsageStats, load: Load) -> None:
        e = load.experts
        older, newer = books.previous[load.layer, e], books.last[load.layer, e]
        books.score[load.layer, e] = older + 1e-9 * newer  # the last use breaks ties

    def worth(self, books: UsageStats) -> Array:
        return books.score


@dataclass(frozen=True)
class Static(Ranking):
    """Keeps what was resident at the start.

    by: "frequency" starts with the most frequent experts, "layer" with whole layers.
    """

    by: str = "frequency"
    frozen: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.by not in ("frequency", "layer"):
            raise ConfigError(f'by must be "frequency" or "layer", got {self.by!r}')

    def worth(self, books: UsageStats) -> Array:
        return books.count
