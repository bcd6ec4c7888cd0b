"""What every ranking must do behind the cache, and what makes each one itself."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import examples

from hybrimoe.errors import ConfigError, PolicyError
from hybrimoe.policy.cache import Cache, quotas
from hybrimoe.policy.rankings import LFU, LRU, LRU2, MRS, Ranking, Static, UsageStats
from hybrimoe.policy.routing import Load
from hybrimoe.policy.timeline import Array
from hybrimoe.simulation.belady import Belady
from hybrimoe.simulation.trace import RoutingTrace

TRAFFIC = st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 5))


def load(experts: list[int], layer: int = 0, total: int = 4, scores: Array | None = None) -> Load:
    """One token that activates these experts."""
    given_scores = np.zeros(total, np.float32)
    given_scores[experts] = 1 / len(experts)
    ids = np.array(experts, np.int32)
    return Load(layer, ids, np.ones(ids.size, np.int32), given_scores if scores is None else scores)


def asked(steps: list[list[int]], experts: int = 4) -> RoutingTrace:
    """A one-layer trace of top-1 steps."""
    ids = np.array(steps, np.uint8)[:, None, :]
    rows = len(ids)
    return RoutingTrace(
        experts,
        ids.shape[2],
        ids,
        np.ones(ids.shape, np.float16),
        np.arange(rows + 1),
        np.zeros(rows, bool),
        np.zeros(rows, np.int32),
    )


def check(cache: Cache) -> None:
    """The table says the same forwards and backwards."""
    for layer in range(cache.layers):
        held = np.flatnonzero(cache.slot[layer] >= 0)
        assert cache.occupied[layer] == held.size
        for expert in held:
            assert cache.owner[cache.slot[layer, expert]].tolist() == [layer, expert]
    assert (cache.owner[:, 0] >= 0).sum() == cache.occupied.sum() <= cache.slots
    assert (cache.references >= 0).all()


class CacheContract:
    """What every ranking must do. Subclass it and set `ranking`."""

    ranking: Ranking

    def make(self, slots: int, layers: int, experts: int, top_k: int = 1) -> Cache:
        return Cache(self.ranking, slots, layers, experts, top_k)

    def test_never_evicts_what_the_layer_is_using(self) -> None:
        cache = self.make(slots=2, layers=1, experts=4)
        cache.admit(0, expert=0, force=True)
        cache.admit(0, expert=1, force=True)
        assert cache.admit(0, expert=2, keep=[0, 1], force=True) is None
        assert cache.resident(0).tolist() == [True, True, False, False]

    def test_never_evicts_a_slot_in_use_or_on_the_wire(self) -> None:
        cache = self.make(slots=2, layers=1, experts=4)
        first = cache.admit(0, 0, force=True)
        second = cache.admit(0, 1, force=True)
        held = cache.hold(0, np.array([0], np.int32))
        cache.arrival[second.slot] = 5.0
        assert cache.admit(0, 2, now=1.0, force=True) is None
        cache.release(held)
        move = cache.admit(0, 2, now=1.0, force=True)
        assert move.slot == first.slot
        assert move.victim == (0, 0)
        assert move.generation == first.generation + 1

    def test_an_empty_slot_is_taken_before_a_full_one(self) -> None:
        cache = self.make(slots=2, layers=1, experts=4)
        cache.admit(0, 0, force=True)
        assert cache.admit(0, 1, force=True).victim == (-1, -1)

    def test_an_absent_expert_is_ready_never_and_a_late_one_later(self) -> None:
        cache = self.make(slots=2, layers=1, experts=4)
        cache.admit(0, 1, force=True)
        move = cache.admit(0, 3, force=True)
        cache.arrival[move.slot] = 7.0
        ready = cache.ready(0, np.array([1, 2, 3], np.int32), now=4.0)
        assert ready.tolist() == [0.0, math.inf, 3.0]

    def test_a_resident_expert_is_not_admitted_twice(self) -> None:
        cache = self.make(slots=2, layers=1, experts=4)
        cache.admit(0, 1, force=True)
        assert cache.admit(0, 1, force=True) is None

    def test_fill_takes_the_most_frequent_of_each_layer(self) -> None:
        cache = self.make(slots=4, layers=2, experts=4, top_k=2)
        if isinstance(self.ranking, Static) and self.ranking.by == "layer":
            pytest.skip("fills whole layers")
        moves = cache.fill(np.array([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]))
        assert {(m.layer, m.expert) for m in moves} == {(0, 3), (0, 2), (1, 0), (1, 1)}
        check(cache)

    @pytest.mark.parametrize("slots", [0, 1, 3, 4, 6])
    def test_resizing_starts_again_with_what_is_worth_most(self, slots: int) -> None:
        cache = self.make(slots=4, layers=1, experts=6, top_k=2)
        if isinstance(self.ranking, Belady):
            pytest.skip("knows one trace only")
        cache.fill()
        for expert in (5, 5, 4, 5, 4, 3):
            scores = np.zeros(6, np.float32)
            scores[expert] = 1
            cache.observe(load([expert], total=6, scores=scores))
        cache.hold(0, np.array([0, 1], np.int32))
        cache.arrival[:] = np.inf
        before, worth = cache.generation.max(), cache.worth(0).copy()
        moves = cache.resize(slots)

        assert cache.slots == len(moves) == slots == cache.resident(0).sum()
        assert cache.references.size == slots + cache.staging
        assert not cache.references.any()
        assert not cache.arrival.any()
        assert all(move.generation > before for move in moves)
        assert (cache.generation > before).all()
        assert cache.worth(0).tolist() == worth.tolist()
        if not (isinstance(self.ranking, Static) and self.ranking.by == "layer"):
            least = worth[cache.resident(0)].min(initial=np.inf)
            assert least >= worth[~cache.resident(0)].max(initial=-np.inf)
        check(cache)

    @given(
        st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5), st.integers(0, 5)), max_size=60)
    )
    @examples(40)
    def test_any_traffic_leaves_the_table_sound(self, traffic) -> None:
        if isinstance(self.ranking, Belady):
            return  # knows one trace only
        cache = self.make(slots=5, layers=3, experts=6, top_k=2)
        for layer, a, b in traffic:
            pair = [a] if a == b else [a, b]
            cache.observe(load(pair, layer, total=6))
            for expert in pair:
                cache.admit(layer, expert, keep=pair)
                check(cache)
            assert cache.worth(layer).shape == (6,)


class TestLRU(CacheContract):
    ranking = LRU()

    def test_evicts_what_was_used_longest_ago(self) -> None:
        cache = self.make(slots=2, layers=1, experts=4)
        for expert in (0, 1, 0, 2):
            cache.observe(load([expert]))
            cache.admit(0, expert)
        assert np.flatnonzero(cache.resident(0)).tolist() == [0, 2]


class TestLFU(CacheContract):
    ranking = LFU()

    def test_evicts_what_was_used_least(self) -> None:
        cache = self.make(slots=2, layers=1, experts=4)
        for expert in (0, 0, 1, 2):
            cache.observe(load([expert]))
            cache.admit(0, expert)
        assert np.flatnonzero(cache.resident(0)).tolist() == [0, 2]


class TestLRU2(CacheContract):
    ranking = LRU2()

    def test_evicts_what_was_used_only_once_first(self) -> None:
        cache = self.make(slots=2, layers=1, experts=4)
        for expert in (0, 0, 1, 2):
            cache.observe(load([expert]))
            cache.admit(0, expert)
        assert np.flatnonzero(cache.resident(0)).tolist() == [0, 2]


class TestMRS(CacheContract):
    ranking = MRS(alpha=0.5)

    def test_is_the_papers_formula(self) -> None:
        cache = Cache(MRS(alpha=0.25, p=2), 2, 1, 4)
        first = np.array([0.1, 0.2, 0.3, 0.4], np.float32)
        second = np.array([0.7, 0.1, 0.05, 0.15], np.float32)
        cache.observe(load([3], scores=first))
        assert cache.worth(0) == pytest.approx([0, 0, 0.25 * 0.3, 0.25 * 0.4])
        cache.observe(load([0], scores=second))
        decayed = [0.25 * 0.7, 0, 0.75 * 0.075, 0.25 * 0.15 + 0.75 * 0.1]
        assert cache.worth(0) == pytest.approx(decayed)

    def test_p_is_twice_the_activated_experts_by_default(self) -> None:
        cache = Cache(MRS(alpha=1.0), 2, 1, 6, top_k=2)
        scores = np.array([6, 5, 4, 3, 2, 1], np.float32)
        cache.observe(load([0, 1], total=6, scores=scores))
        assert (cache.worth(0) > 0).tolist() == [True] * 4 + [False] * 2

    def test_prefill_counts_as_its_tokens_one_after_the_other(self) -> None:
        whole, steps = (Cache(MRS(alpha=0.1, p=4), 2, 1, 4) for _ in range(2))
        scores = np.array([0.4, 0.3, 0.2, 0.1], np.float32)
        tokens = Load(0, np.array([0], np.int32), np.array([5], np.int32), 5 * scores)
        whole.observe(tokens)
        for _ in range(5):
            steps.observe(load([0], scores=scores))
        assert whole.worth(0) == pytest.approx(steps.worth(0))

    def test_admission_refuses_what_is_worth_less_than_its_victim(self) -> None:
        cache = Cache(MRS(alpha=0.1, admission=True), 1, 1, 4)
        for _ in range(9):
            cache.observe(load([0]))
        cache.admit(0, 0)
        cache.observe(load([1]))
        assert cache.admit(0, 1) is None
        assert Cache(MRS(alpha=0.1), 1, 1, 4).admit(0, 1) is not None

    def test_many_admissions_take_the_worthiest_first(self) -> None:
        cache = Cache(MRS(alpha=0.5), 1, 1, 4)
        cache.observe(load([1, 3], scores=np.array([0, 0.2, 0, 0.8], np.float32)))
        moves = cache.admit_each(0, np.array([1, 3], np.int32), np.zeros(0, np.int32), 0.0, 2)
        assert moves[0].expert == 3

    @pytest.mark.parametrize("alpha", [0, -0.1, 1.1, math.nan])
    def test_alpha_out_of_range_is_refused(self, alpha: float) -> None:
        with pytest.raises(ConfigError, match="alpha must lie in"):
            MRS(alpha=alpha)


class TestMRSModelScope(CacheContract):
    ranking = MRS(alpha=0.1, admission=True, scope="model")

    def test_slots_move_between_layers_down_to_a_floor(self) -> None:
        cache = Cache(MRS(alpha=0.5, scope="model"), 6, 2, 12, top_k=1, floor=1)
        cache.fill()
        for _ in range(20):
            for layer, experts in ((0, [0]), (1, [0, 1, 2, 3, 4])):
                cache.observe(load(experts, layer, total=12))
                for expert in experts:
                    cache.admit(layer, expert, keep=experts)
        assert cache.occupied.tolist() == [1, 5]

    def test_a_pass_over_most_experts_takes_no_slot_from_another_layer(self) -> None:
        cache = Cache(MRS(alpha=0.5, scope="model"), 6, 2, 6, top_k=1, floor=1)
        cache.fill()
        for _ in range(20):
            cache.observe(load([0, 1, 2, 3, 4], 1, total=6))
            for expert in range(5):
                cache.admit(1, expert)
        assert cache.occupied.tolist() == [3, 3]

    def test_slots_that_may_move_start_evenly(self) -> None:
        skewed = np.array([[9.0, 8.0, 7.0, 6.0], [0.4, 0.3, 0.2, 0.1]])
        moving = Cache(MRS(scope="model"), 4, 2, 4)
        moving.fill(skewed)
        frozen = Cache(Static(scope="model"), 4, 2, 4)
        frozen.fill(skewed)
        assert moving.occupied.tolist() == [2, 2]
        assert frozen.occupied.tolist() == [3, 1]


class TestStatic(CacheContract):
    ranking = Static()

    def test_residents_stay(self) -> None:
        cache = Cache(Static(), 2, 1, 4)
        cache.fill(np.array([[0.4, 0.3, 0.2, 0.1]]))
        cache.observe(load([3]))
        assert cache.admit(0, 3) is None
        assert cache.resident(0).tolist() == [True, True, False, False]

    def test_by_layer_fills_whole_layers(self) -> None:
        cache = Cache(Static(by="layer"), 5, 2, 4)
        cache.fill(np.ones((2, 4)))
        assert cache.occupied.tolist() == [4, 1]


class TestBelady(CacheContract):
    ranking = Belady()

    def test_hits_at_least_as_often_as_any_other(self) -> None:
        rng = np.random.default_rng(0)
        steps = [[int(e)] for e in rng.zipf(1.5, 300) % 8]
        trace = asked(steps, experts=8)
        hits = {}
        for ranking in (LRU(), LFU(), LRU2(), MRS(), MRS(admission=True), Belady.of(trace)):
            cache, count = Cache(ranking, 3, 1, 8), 0
            for [e] in steps:
                count += bool(cache.resident(0)[e])
                cache.observe(load([e], total=8))
                cache.admit(0, e)
            hits[type(ranking).__name__, ranking.admission] = count
        assert max(hits.values()) == hits["Belady", True]

    def test_another_trace_is_refused(self) -> None:
        cache = Cache(Belady.of(asked([[0]])), 1, 1, 4)
        cache.observe(load([0]))
        with pytest.raises(PolicyError, match="knows 1 steps"):
            cache.observe(load([0]))


def test_a_ranking_of_three_lines_is_enough() -> None:
    class Newest(Ranking):
        def worth(self, books: UsageStats) -> Array:
            return books.last

    cache = Cache(Newest(), 1, 1, 4)
    cache.observe(load([2]))
    assert cache.admit(0, 2).expert == 2


def test_layer_scope_divides_slots_equally_and_by_use() -> None:
    frequency = np.array([[0.25, 0.25, 0.25, 0.25], [0.97, 0.01, 0.01, 0.01]])
    assert Cache(LRU(), 5, 2, 4).quota.tolist() == [3, 2]
    assert quotas(frequency, 5).tolist() == [4, 1]
    assert Cache(LRU(shares="frequency"), 5, 2, 4, frequency=frequency).quota.tolist() == [4, 1]


def test_quotas_by_frequency_follow_what_was_used_when_slots_change() -> None:
    cache = Cache(LRU(shares="frequency"), 6, 2, 4, frequency=np.ones((2, 4)))
    for expert in range(4):
        cache.observe(load([expert], layer=0))
        cache.observe(load([2], layer=1))
    cache.resize(5)
    assert cache.quota.tolist() == [4, 1]
    assert cache.occupied.tolist() == [4, 1]


def test_staging_slots_lie_behind_the_others_and_are_taken_in_turn() -> None:
    cache = Cache(LRU(), 3, 1, 4, staging=2)
    moves = [cache.stage(0, e) for e in (0, 1, 2)]
    assert [m.slot for m in moves] == [3, 4, 3]
    assert moves[2].generation == moves[0].generation + 1
    with pytest.raises(PolicyError, match="needs a staging slot"):
        Cache(LRU(), 3, 1, 4, staging=0).stage(0, 1)


def test_dropping_an_expert_frees_its_slot_but_not_one_in_use() -> None:
    cache = Cache(LRU(), 1, 1, 4)
    move = cache.admit(0, 1)
    held = cache.hold(0, np.array([1], np.int32))
    with pytest.raises(PolicyError, match="is in use"):
        cache.drop(0, 1)
    cache.release(held)
    cache.drop(0, 1)
    assert not cache.resident(0).any()
    assert cache.generation[move.slot] == move.generation + 1
    with pytest.raises(PolicyError, match="released more often"):
        cache.release(held)


@pytest.mark.parametrize(
    ("numbers", "rule"),
    [
        ((-1, 1, 4, 1), "slots and staging"),
        ((1, 0, 4, 1), "layers and experts"),
        ((1, 1, 4, 5), "top_k must lie in"),
    ],
)
def test_impossible_sizes_are_refused(numbers: tuple[int, ...], rule: str) -> None:
    with pytest.raises(ConfigError, match=rule):
        Cache(LRU(), *numbers)


def test_an_unknown_scope_is_refused() -> None:
    with pytest.raises(ConfigError, match="scope must be one of"):
        LRU(scope="galaxy")
    with pytest.raises(ConfigError, match="shares must be one of"):
        LRU(shares="unequal")
    with pytest.raises(ConfigError, match="by must be"):
        Static(by="name")
