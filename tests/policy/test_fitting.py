"""From timed runs to a cost model's numbers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import examples

from hybrimoe.calibration.fit import (
    Sample,
    fit,
    fit_contended,
    fit_cpu,
    fit_gpu,
    fit_link,
    misfit,
    weighted_median,
)

POINTS = [(e, n) for e in (1, 2, 4, 8) for n in (1, 2, 3, 6, 14, 32, 128)]
US = 1e-6
seconds = st.floats(1 * US, 1000 * US)


def cpu_runs(first: float, expert: float, token: float) -> list[Sample]:
    return [Sample(e, n, first + e * (expert + n * token)) for e, n in POINTS]


@examples(50)
@given(seconds, seconds, seconds)
def test_the_cpu_law_is_found_again(first: float, expert: float, token: float) -> None:
    runs = cpu_runs(first, expert, token)
    found = fit_cpu(runs)
    for run in runs:
        each = found["cpu_expert"] + run.tokens * found["cpu_token"]
        assert found["cpu_first"] + run.experts * each == pytest.approx(run.seconds, rel=1e-3)
    assert misfit(runs, found) < 1e-3


def test_interrupted_runs_do_not_bend_the_law() -> None:
    runs = cpu_runs(50 * US, 80 * US, 20 * US)
    rng = np.random.default_rng(0)
    for i in rng.permutation(len(runs))[:6]:
        runs[i] = runs[i]._replace(seconds=runs[i].seconds + 4e-3)  # a lost time slice
    found = fit_cpu(runs)
    assert found["cpu_expert"] == pytest.approx(80 * US, rel=0.1)
    assert found["cpu_token"] == pytest.approx(20 * US, rel=0.1)


def test_runs_without_any_law_are_told_from_runs_with_one() -> None:
    rng = np.random.default_rng(0)
    runs = [Sample(e, n, float(rng.lognormal(-7, 1))) for e, n in POINTS]
    assert misfit(runs, fit_cpu(runs)) > 0.2


def test_numbers_are_never_negative_and_reading_is_never_free() -> None:
    found = fit_cpu([Sample(e, n, e * n * US) for e, n in POINTS])
    assert found["cpu_first"] >= 0
    assert found["cpu_expert"] > 0
    assert (fit(np.array([[1.0, -1.0], [1.0, -2.0]]), np.array([3.0, 5.0])) >= 0).all()


def test_one_run_is_enough_for_some_law() -> None:
    found = fit_cpu([Sample(1, 1, 3 * US)])
    assert sum(found.values()) == pytest.approx(3 * US, rel=0.01)


def test_a_copy_in_flight_only_makes_reading_slower() -> None:
    alone = fit_cpu(cpu_runs(50 * US, 80 * US, 20 * US))
    assert fit_contended(cpu_runs(50 * US, 120 * US, 20 * US), alone) == pytest.approx(120 * US)
    assert fit_contended(cpu_runs(50 * US, 60 * US, 20 * US), alone) == alone["cpu_expert"]


@pytest.mark.parametrize("first", [0.0, 100.0])
@pytest.mark.parametrize("launch", [0.0, 4.0])
@pytest.mark.parametrize("turn", [1, 6, 40])
def test_the_gpu_law_is_found_again(first: float, launch: float, turn: int) -> None:
    token = 4 / turn
    runs = [Sample(e, n, (first + e * (max(4.0, token * n) + launch)) * US) for e, n in POINTS]
    found = fit_gpu(runs)
    for run in runs:
        each = max(found["gpu_read"], found["gpu_token"] * run.tokens) + found["gpu_launch"]
        assert found["gpu_first"] + run.experts * each == pytest.approx(run.seconds, rel=0.01)


def test_the_link_law_is_found_again() -> None:
    sizes = (1 << 19, 1 << 20, 1 << 21)
    runs = [Sample(1, 0, 8 * US + size / 25e9, size) for size in sizes for _ in range(3)]
    found = fit_link([*runs, Sample(1, 0, 5e-3, sizes[0])])
    assert found["link_latency"] == pytest.approx(8 * US, rel=0.05)
    assert found["link_bandwidth"] == pytest.approx(25e9, rel=0.05)


def test_the_weighted_median_has_half_of_the_weight_on_either_side() -> None:
    assert weighted_median(np.array([3.0, 1.0, 2.0]), np.ones(3)) == 2.0
    assert weighted_median(np.array([3.0, 1.0, 2.0]), np.array([5.0, 1.0, 1.0])) == 3.0
