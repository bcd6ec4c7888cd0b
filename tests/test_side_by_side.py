"""Models timed in turns, and who else used the cores meanwhile."""

from types import SimpleNamespace

import pytest
import torch

from hybrimoe.cli import side_by_side


def machine(monkeypatch, *, own: float, idle: float) -> None:
    """One second passes, in which this process and nobody used so many core seconds."""
    moments = iter((0.0, 1.0))
    clock = SimpleNamespace(now=0.0)

    def perf_counter() -> float:
        clock.now = next(moments)
        return clock.now

    monkeypatch.setattr(side_by_side.time, "perf_counter", perf_counter)
    monkeypatch.setattr(side_by_side, "_own_s", lambda: clock.now * own)
    monkeypatch.setattr(side_by_side, "_idle_s", lambda: clock.now * idle)


@pytest.mark.parametrize(
    ("own", "idle", "missing"),
    [(2.0, 0.0, 0.0), (0.5, 1.5, 0.0), (1.9, 0.0, 0.1), (1.0, 0.0, 1.0), (1.0, 3.0, 0.0)],
)
def test_what_others_take_is_what_is_neither_idle_nor_ours(monkeypatch, own, idle, missing):
    machine(monkeypatch, own=own, idle=idle)
    with side_by_side.Crowd(2) as crowd:
        pass

    assert crowd.missing == pytest.approx(missing)
    assert ("took 1.0 of 2 cores" in crowd.warning) == (missing == 1)


def test_models_take_turns_and_the_medians_count(monkeypatch):
    order = []
    times = {"a": iter((1, 9, 2)), "b": iter((4, 5, 6))}

    def timed(model, prompt, tokens):
        order.append(model)
        seconds = next(times[model])
        return seconds, seconds * tokens, [0]

    monkeypatch.setattr(side_by_side, "timed", timed)
    found = side_by_side.alternate({"a": "a", "b": "b"}, torch.zeros(1, 3), 8, 3)

    assert order == ["a", "b", "b", "a", "a", "b"]
    assert (found["a"].prefill_s, found["a"].decode_s) == (2, 2)
    assert (found["b"].prefill_s, found["b"].decode_s) == (5, 5)
