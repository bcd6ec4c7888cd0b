"""What every prefetcher must do, and what makes each one itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import examples, make_cost, make_load

from hybrimoe.errors import ConfigError
from hybrimoe.policy.cache import Cache
from hybrimoe.policy.prefetchers import Impact, Never, NextLayer, Prefetcher
from hybrimoe.policy.rankings import LRU
from hybrimoe.policy.routing import Forecast
from hybrimoe.policy.schedulers import Hybrid, OnDemand
from hybrimoe.policy.timeline import Lane, Timeline


def forecast(layer: int, experts: list[int], probability: list[float]) -> Forecast:
    ids = np.array(experts, np.int32)
    return Forecast(layer, ids, np.ones(ids.size, np.int32), np.array(probability), 10.0)


class PrefetcherContract:
    """What every prefetcher must do. Subclass it and set `make`."""

    make: type[Prefetcher]

    @given(
        st.lists(st.integers(0, 7), max_size=6, unique=True),
        st.lists(st.integers(0, 7), min_size=1, max_size=6, unique=True),
        st.lists(st.floats(0.01, 1.0), min_size=6, max_size=6),
    )
    @examples(40)
    def test_wants_only_absent_experts_of_the_forecast_layers(self, held, ahead, chances) -> None:
        cache = Cache(LRU(), 8, 2, 8, 2, floor=0)
        for expert in held[:4]:
            cache.admit(1, expert)
        seen = [forecast(1, ahead, sorted(chances[: len(ahead)], reverse=True))]
        before = cache.slot.copy(), cache.books.last.copy()
        wanted = self.make().wanted(seen, cache, Hybrid(), Timeline(now=10.0), make_cost())
        assert len(set(wanted)) == len(wanted)
        for layer, expert in wanted:
            assert layer == 1
            assert expert in ahead
            assert cache.slot[layer, expert] < 0
        assert np.array_equal(cache.slot, before[0])
        assert np.array_equal(cache.books.last, before[1])

    def test_wants_nothing_without_forecasts(self) -> None:
        wanted = self.make().wanted([], Cache(LRU(), 4, 2, 8), Hybrid(), Timeline(), make_cost())
        assert wanted == []

    def test_depth_out_of_range_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="depth must lie in"):
            self.make(depth=9)

    def test_an_unknown_window_is_refused(self) -> None:
        with pytest.raises(ConfigError, match=r"window must be one of .*, got 'ever'"):
            self.make(window="ever")


class TestNever(PrefetcherContract):
    make = Never


class TestNextLayer(PrefetcherContract):
    make = NextLayer

    def test_wants_the_most_probable_first_and_none_below_the_least(self) -> None:
        seen = [forecast(1, [4, 2, 6], [0.9, 0.5, 0.1])]
        cache = Cache(LRU(), 4, 2, 8)
        wanted = NextLayer(least=0.3).wanted(seen, cache, OnDemand(), Timeline(), make_cost())
        assert wanted == [(1, 4), (1, 2)]


class TestImpact(PrefetcherContract):
    make = Impact

    def test_wants_what_saves_most_whatever_its_layer(self) -> None:
        # On layer 2 both experts miss, so the CPU is busier there and one more hit saves more.
        cost = make_cost()
        cache = Cache(LRU(), 8, 3, 8)
        cache.admit(1, 1)
        seen = [forecast(1, [0, 1], [0.6, 0.6]), forecast(2, [0, 1], [0.9, 0.6])]
        wanted = Impact(depth=2, gated=False).wanted(seen, cache, Hybrid(), Timeline(), cost)
        assert wanted[0] == (2, 0)
        assert (1, 1) not in wanted

    def test_wants_nothing_that_arrives_after_its_layer(self) -> None:
        seen, timeline = [forecast(1, [0], [1.0])], Timeline(now=10.0)
        timeline.free[Lane.LINK] = 99.0
        wanted = Impact().wanted(seen, Cache(LRU(), 4, 2, 8), Hybrid(), timeline, make_cost())
        assert wanted == []

    def test_the_gate_closes_where_the_victim_is_used_more(self) -> None:
        cache = Cache(LRU(scope="model"), 1, 2, 8, floor=0)
        cache.admit(0, 3)
        for _ in range(60):
            cache.observe(make_load([0, 0, 0, 1], experts=8))
        seen = [forecast(1, [0], [0.3])]
        arguments = (seen, cache, Hybrid(), Timeline(), make_cost())
        assert Impact(gated=False).wanted(*arguments) == [(1, 0)]
        assert Impact(gated=True).wanted(*arguments) == []

    def test_the_gate_closes_where_copies_slow_the_cpu_more_than_they_save(self) -> None:
        seen, cache = [forecast(1, [0], [0.5])], Cache(LRU(), 4, 2, 8)
        for contended, count in ((1.0, 1), (9.0, 0)):
            cost = make_cost(cpu_expert_contended=contended)
            wanted = Impact().wanted(seen, cache, Hybrid(), Timeline(), cost)
            assert len(wanted) == count
