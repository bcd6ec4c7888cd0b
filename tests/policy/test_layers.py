"""Layers of their own sizes and costs: policies neither name what is not there nor mix up units."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import examples, make_cost
from test_engine import Memory

from hybrimoe.errors import ConfigError, PolicyError
from hybrimoe.policy.cache import Cache, quotas
from hybrimoe.policy.checked import checked_prefetcher
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.engine import Engine
from hybrimoe.policy.forecasts import Markov, Trust
from hybrimoe.policy.prefetchers import NextLayer
from hybrimoe.policy.presets import PRESETS, preset
from hybrimoe.policy.rankings import LRU, NextToken, UsageStats
from hybrimoe.policy.routing import Forecast, Load
from hybrimoe.policy.timeline import Lane, Span, Timeline

SIZES = np.array([8, 3, 1, 16, 5])
SHARDS = (4, 3, 6, 1, 5)
BYTES = (100, 60, 36, 8, 25)


def mixed_cost() -> CostModel:
    """The cost of experts of 100 bytes, and of each layer's own."""
    cost = make_cost(cpu_expert_contended=2.0)
    own = [cost.scaled(size, n, size / 100) for size, n in zip(BYTES, SHARDS)]
    return dataclasses.replace(cost, layers=tuple(own))


def token(rng: np.random.Generator, layer: int, most: int = 1) -> Load:
    size = int(SIZES[layer])
    ids = rng.choice(size, rng.integers(1, min(size, 4) + 1), replace=False).astype(np.int32)
    scores = np.zeros(SIZES.max(), np.float32)
    scores[ids] = 1 / ids.size
    return Load(layer, ids, rng.integers(1, most + 1, ids.size).astype(np.int32), scores)


def assert_only_what_is_there(cache: Cache) -> None:
    for row, size in zip(cache.slot, SIZES):
        assert (row[size:] < 0).all()
    owned = cache.owner[cache.owner[:, 0] >= 0]
    assert (owned[:, 1] < SIZES[owned[:, 0]]).all()


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("slots", [5, 12, 33])
def test_every_preset_runs_layers_of_their_own_sizes_and_costs(name: str, slots: int) -> None:
    """The executor checks that what runs on the GPU is there, counted in the layer's own shards."""
    policies, cost, rng = preset(name), mixed_cost(), np.random.default_rng(slots)
    cache = Cache(policies.ranking, slots, SIZES.size, SIZES, 2)
    executor = Memory(cost, cache)
    for move in cache.fill(rng.random((SIZES.size, SIZES.max()))):
        executor.write(move)
    markov = Markov(SIZES.size, SIZES, 2, depth=max(policies.prefetcher.depth, 1))
    engine = Engine(
        policies, cache, cost, executor, forecaster=markov, timeline=Timeline(trace=True)
    )
    for step in range(60):
        for layer in range(SIZES.size):
            plan = engine.step(token(rng, layer, 1 + 30 * (step % 7 == 0)))
            assert plan.shards.max() <= SHARDS[layer]
        assert_only_what_is_there(cache)
    executor.holds.clear()
    for move in engine.resize(slots // 2):
        executor.write(move)
    assert_only_what_is_there(cache)
    assert engine.hits + engine.misses + engine.late > 0


@examples(60)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(0, 60), st.integers(0, 99))
def test_slots_are_shared_out_as_far_as_there_are_experts(sizes, slots, seed) -> None:
    counts = np.array(sizes)
    frequency = np.random.default_rng(seed).random((counts.size, counts.max()))
    frequency *= np.arange(counts.max()) < counts[:, None]
    cache = Cache(LRU(), slots, counts.size, counts)
    for quota in (cache.quota, quotas(frequency, cache.slots, counts)):
        assert quota.sum() == cache.slots == min(slots, counts.sum())
        assert (quota <= counts).all()
    cut = cache.quota[cache.quota < counts]
    assert cut.size == 0 or cut.max() - cut.min() <= 1  # who lacks some has as many as the others
    assert len(cache.fill(frequency)) == cache.slots


@pytest.mark.parametrize("worth", [-np.inf, -1.0, 0.0])
def test_the_first_residents_exist_whatever_they_are_worth(worth: float) -> None:
    for name in PRESETS:
        cache = Cache(preset(name).ranking, 30, SIZES.size, SIZES, 2)
        assert len(cache.fill(np.full((SIZES.size, SIZES.max()), worth))) == 30
        assert_only_what_is_there(cache)


def test_a_layer_lacks_only_what_it_has() -> None:
    cache = Cache(LRU(), int(SIZES.sum()), SIZES.size, SIZES)
    assert cache.lacks(0, 5)
    cache.fill()
    assert not cache.lacks(0, 5)


def test_a_layer_is_crowded_by_most_of_its_own_experts() -> None:
    cache, rng = Cache(NextToken(), 9, SIZES.size, SIZES, 2), np.random.default_rng(0)
    for layer, crowded in ((1, True), (3, False)):
        load = token(rng, layer)
        ids = np.arange(2, dtype=np.int32)
        cache.observe(load._replace(experts=ids, tokens=np.ones(2, np.int32)))
        assert cache.crowded == crowded


def test_books_hold_nothing_for_experts_that_do_not_exist() -> None:
    books = UsageStats(SIZES.size, SIZES, 2)
    books.learn_successors()
    for layer, size in enumerate(SIZES.tolist()):
        assert (books.rate[layer, :size] == min(2 / size, 1.0)).all()
        assert (books.rate[layer, size:] == 0).all()
        assert (books.follows[layer, :, size:] == 0).all()


def test_forecasts_name_experts_of_their_layer() -> None:
    markov, rng = Markov(SIZES.size, SIZES, 2, depth=3, width=6), np.random.default_rng(0)
    for _ in range(20):
        for layer in range(SIZES.size):
            markov.observe(token(rng, layer))
            for forecast in markov.forecast(layer):
                size = SIZES[forecast.layer]
                assert len(set(forecast.experts.tolist())) == min(6, size)
                assert forecast.experts.max() < size
                assert (forecast.probability > 0).all()


def test_a_layer_that_does_not_run_lowers_trust() -> None:
    trust, ids = Trust(1), np.array([0, 1], np.int32)
    forecast = Forecast(1, ids, np.ones(2, np.int32), np.ones(2))
    for _ in range(300):
        trust.expect(0, [forecast])
    assert trust.factor(0) < 0.05
    assert sum(map(len, trust._pending.values())) == 1


class Wants(NextLayer):
    """A prefetcher of somebody else."""

    def wanted(self, *_: object) -> list[tuple[int, int]]:
        return [(1, 3)]


def test_a_prefetcher_may_not_ask_for_what_a_layer_does_not_have() -> None:
    cache = Cache(LRU(), 9, SIZES.size, SIZES)
    seen = Forecast(1, np.zeros(1, np.int32), np.ones(1, np.int32), np.ones(1))
    policy = checked_prefetcher(Wants())
    with pytest.raises(PolicyError, match=r"experts in \[0, 3\), got layer 1, expert 3"):
        policy.wanted([seen], cache, preset("hybrimoe").scheduler, Timeline(), mixed_cost())


@pytest.mark.parametrize("experts", [0, [4, 0], [4, 4, 4], [[4, 4]]])
def test_impossible_numbers_of_experts_are_refused(experts: int | list[int]) -> None:
    for make in (
        lambda: Cache(LRU(), 2, 2, np.array(experts)),
        lambda: Markov(2, np.array(experts), 1),
        lambda: UsageStats(2, np.array(experts), 1),
    ):
        with pytest.raises(ConfigError, match="layers and experts must be positive"):
            make()


def test_costs_grow_with_what_they_are_paid_for() -> None:
    cost = make_cost(cpu_expert_contended=2.0).scaled(50, 3, 0.25)
    assert (cost.expert_bytes, cost.shards, cost.load_s) == (50, 3, 2.0)
    assert (cost.cpu_expert, cost.cpu_expert_contended, cost.gpu_read) == (0.5, 1.0, 0.5)
    assert (cost.cpu_token, cost.gpu_token, cost.cpu_first) == (0.25, 0.03125, 0.5)
    assert make_cost().scaled(100, 4, 1.0) == make_cost()
    assert make_cost().of(3) == make_cost()


def test_measured_spans_are_compared_with_their_layers_cost_and_move_all() -> None:
    cost = mixed_cost()
    spans = [
        Span(Lane.LINK, 0.0, 2 * cost.of(layer).load_s, "", layer, 1, 1, BYTES[layer])
        for layer in range(SIZES.size)
    ]
    moved = cost.refined(spans, weight=1.0)
    for layer in range(SIZES.size):
        assert moved.of(layer).load_s == pytest.approx(2 * cost.of(layer).load_s)
        assert moved.of(layer).shards == SHARDS[layer]
    assert moved.load_s == pytest.approx(2 * cost.load_s)
    gpu = [Span(Lane.GPU, 0.0, cost.of(4).gpu(1) * 3, "", 4, 1, 1)]
    assert cost.refined(gpu, 1.0).of(1).gpu_read == pytest.approx(cost.of(1).gpu_read * 3)


def test_the_model_of_layers_is_not_kept_in_files(tmp_path) -> None:
    cost = mixed_cost()
    cost.save(tmp_path / "cost.json")
    assert CostModel.load(tmp_path / "cost.json").layers == ()
    assert "layers" not in cost.to_dict()
