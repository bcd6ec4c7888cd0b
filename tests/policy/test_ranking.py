"""The ranking by what follows what, and how the engine uses worth."""

import numpy as np
import pytest

from hybrimoe.errors import ConfigError
from hybrimoe.policy.cache import Cache
from hybrimoe.policy.rankings import MRS, NextToken
from hybrimoe.policy.routing import Load
from hybrimoe.policy.transitions import by_worth
from hybrimoe.simulation.belady import Belady
from hybrimoe.simulation.synthesis import hit_rate
from hybrimoe.simulation.trace import RoutingTrace


def load(layer: int, *experts: int, tokens: int = 1, of: int = 8) -> Load:
    scores = np.zeros(of, np.float32)
    scores[list(experts)] = tokens / len(experts)
    ids = np.array(experts, np.int32)
    return Load(layer, ids, np.full(ids.size, tokens, np.int32), scores)


def test_what_always_follows_is_worth_most() -> None:
    cache = Cache(NextToken(), 4, 1, 8, 2)
    for _ in range(60):  # 2 and 3 always follow 0 and 1, which always follow 2 and 3
        cache.observe(load(0, 0, 1))
        cache.observe(load(0, 2, 3))
    assert set(np.argsort(-cache.worth(0))[:2].tolist()) == {0, 1}
    cache.observe(load(0, 0, 1))
    assert set(np.argsort(-cache.worth(0))[:2].tolist()) == {2, 3}


def test_without_weight_it_is_mrs() -> None:
    rng = np.random.default_rng(0)
    mine, other = Cache(NextToken(weight=0.0), 4, 2, 8, 2), Cache(MRS(alpha=0.15), 4, 2, 8, 2)
    for step in range(40):
        one = load(step % 2, *rng.choice(8, 2, replace=False).tolist())
        mine.observe(one)
        other.observe(one)
    assert (mine.worth(0) == other.worth(0)).all()
    assert (mine.worth(1) == other.worth(1)).all()


def test_a_prompt_teaches_no_successors() -> None:
    cache = Cache(NextToken(), 4, 1, 8, 2)
    cache.observe(load(0, 0, 1))
    before = cache.books.follows.copy()
    cache.observe(load(0, *range(8), tokens=20))
    cache.observe(load(0, 4, 5))
    assert (cache.books.follows == before).all()
    cache.observe(load(0, 6, 7))
    assert (cache.books.follows[0, 4, 6:] > before[0, 4, 6:]).all()


def test_a_table_row_stays_a_share() -> None:
    cache, rng = Cache(NextToken(rate=0.5), 4, 1, 16, 2), np.random.default_rng(1)
    for _ in range(80):
        experts = rng.choice(16, int(rng.integers(2, 7)), replace=False)
        tokens = int(rng.integers(1, 4))
        cache.observe(load(0, *experts.tolist(), tokens=tokens, of=16))
    table = cache.books.follows
    assert (table >= 0).all()
    assert (table <= 1 + 1e-6).all()


def test_it_hits_more_than_mrs_on_real_routing(cut: RoutingTrace) -> None:
    slots = round(0.25 * cut.layers * cut.experts)
    mrs = hit_rate(cut, MRS(alpha=0.1, admission=True), slots)[0]
    mine = hit_rate(cut, NextToken(admission=True), slots)[0]
    bound = hit_rate(cut, Belady.of(cut), slots)[0]
    print(f"hits: MRS {mrs:.3f}, NextToken {mine:.3f}, Belady {bound:.3f}")
    assert mrs + 0.005 < mine < bound


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"alpha": 0.0}, r"alpha must lie in \(0, 1\], got 0.0"),
        ({"p": 0}, "p must be at least 1 or None, got 0"),
        ({"rate": 1.5}, r"rate must lie in \(0, 1\], got 1.5"),
        ({"weight": -1.0}, "weight must be at least 0 and finite, got -1.0"),
        ({"weight": float("nan")}, "weight must be at least 0 and finite"),
    ],
)
def test_settings_are_checked(settings, message) -> None:
    with pytest.raises(ConfigError, match=message):
        NextToken(**settings)


def test_the_worthiest_come_first_and_take_their_numbers_along() -> None:
    worth = np.array([[0.1, 0.9, 0.5, 0.5]])
    experts, tokens = np.array([0, 2, 3, 1], np.int32), np.array([1, 2, 3, 4], np.int32)
    ready = np.array([0.0, np.inf, 0.5, np.inf])
    ordered, counts = by_worth(worth, 0, experts, tokens, ready)
    assert ordered.tolist() == [1, 2, 3, 0]
    assert counts.tolist() == [4, 2, 3, 1]
    assert ready.tolist() == [np.inf, np.inf, 0.5, 0.0]
    assert experts.tolist() == [0, 2, 3, 1]


def test_the_best_swap_of_recent_layers_is_admitted() -> None:
    cache = Cache(NextToken(admission=True), 4, 2, 4, 2)
    cache.fill(np.array([[9.0, 9, 1, 1], [9, 9, 1, 1]]))
    for _ in range(5):
        cache.observe(load(0, 2, 3, of=4))
        cache.observe(load(1, 0, 1, of=4))
    assert cache.admit_best(1, 1, 0.0) is None  # layer 1 holds what it uses
    move = cache.admit_best(1, 2, 0.0)
    assert move is not None
    assert (move.layer, move.expert) in {(0, 2), (0, 3)}
    assert move.victim in {(0, 0), (0, 1)}
