"""Traces: what they hold, their file, and what is refused."""

import numpy as np
import pytest

from hybrimoe.errors import TraceError
from hybrimoe.policy.routing import Forecast
from hybrimoe.policy.timeline import Array
from hybrimoe.simulation.foreign import from_decode, read_trace
from hybrimoe.simulation.recorder import TraceRecorder, merge
from hybrimoe.simulation.statistics import statistics
from hybrimoe.simulation.trace import RoutingTrace
from shares import from_fractions


def record(seed: int = 0, experts: int = 8, steps: int = 4, depth: int = 0) -> RoutingTrace:
    """A prefill of five tokens and some decode steps on three layers, top-2."""
    rng = np.random.default_rng(seed)
    recorder = TraceRecorder(3, experts, 2, ranks=4, depth=depth, model="toy")
    for step in range(steps):
        tokens = 5 if step == 0 else 1
        recorder.step(prefill=step == 0, sequence=0, tokens=tokens)
        for layer in range(3):
            scores = rng.random((tokens, experts))
            ids = np.argsort(-scores, axis=1)[:, :4]
            ahead = [
                Forecast(layer + 1 + d, np.array([d, 5]), np.array([2, 1]), np.array([0.75, 0.25]))
                for d in range(min(depth, 2 - layer))
            ]
            recorder.record(layer, ids, np.take_along_axis(scores, ids, 1), ahead)
    return recorder.trace()


def same(first: RoutingTrace, second: RoutingTrace) -> bool:
    pairs = ((getattr(first, n), getattr(second, n)) for n in vars(first))
    return all(np.array_equal(a, b) for a, b in pairs)


def test_a_decode_step_loads_its_activated_experts_and_all_recorded_scores() -> None:
    trace = record()
    load = trace.loads(1)[2]
    row = trace.ids[5, 2]
    assert load.layer == 2
    assert load.experts.tolist() == row[:2].tolist()
    assert load.tokens.tolist() == [1, 1]
    assert np.flatnonzero(load.scores).tolist() == sorted(row.tolist())
    assert (load.experts.dtype, load.tokens.dtype, load.scores.dtype) == ("i4", "i4", "f4")


def test_a_prefill_step_counts_tokens_and_sums_scores() -> None:
    trace = record()
    load = trace.loads(0)[0]
    counts = np.bincount(trace.ids[:5, 0, :2].ravel(), minlength=8)
    assert load.tokens.sum() == 10
    assert load.tokens.tolist() == counts[counts > 0].tolist()
    assert load.scores.sum() == pytest.approx(trace.scores[:5, 0].astype(np.float32).sum())
    assert (trace.tokens(0), trace.tokens(1)) == (5, 1)


def test_a_file_gives_back_the_same_trace_in_two_bytes_per_id(tmp_path) -> None:
    trace = record(depth=2)
    trace.save(tmp_path / "t.npz")
    assert same(RoutingTrace.load(tmp_path / "t.npz"), trace)
    assert trace.ids.itemsize == 1
    assert record(experts=300).ids.itemsize == 2
    assert [p.name for p in tmp_path.iterdir()] == ["t.npz"]


def test_forecasts_come_back_as_they_were_seen() -> None:
    trace = record(depth=2)
    near, far = trace.forecasts(1, 0)
    assert (near.layer, far.layer) == (1, 2)
    assert near.experts.tolist() == [0, 5]
    assert near.probability.tolist() == [1.0, 0.25]
    assert near.tokens.tolist() == [2, 1]
    assert [f.layer for f in trace.forecasts(1, 1)] == [2]
    assert trace.forecasts(1, 2) == []
    assert record().forecasts(0, 0) == []


def test_merging_keeps_sequences_apart_and_counts_steps() -> None:
    first, second = record(0), record(1)
    both = merge([first, second, first])
    assert both.steps == 12
    assert np.unique(both.sequence).tolist() == [0, 1, 2]
    assert both.loads(5)[1].experts.tolist() == second.loads(1)[1].experts.tolist()
    assert same(both.select(range(4)), first)
    with pytest.raises(TraceError, match="differ in experts: 8 and 16"):
        merge([first, record(experts=16)])
    with pytest.raises(TraceError, match="at least one"):
        merge([])


def test_halves_hold_whole_sequences() -> None:
    trace = merge([record(i) for i in range(4)])
    first, second = trace.split(0.5)
    assert np.unique(first.sequence).tolist() == [0, 1]
    assert np.unique(second.sequence).tolist() == [2, 3]


def test_prompt_fractions_become_loads_that_sum_to_all_tokens() -> None:
    rng = np.random.default_rng(0)
    shares = rng.dirichlet(np.ones(8), (3, 32)).astype(np.float16)
    trace = from_fractions(shares, [100, 7, 1], top_k=2)
    for step, tokens in enumerate((100, 7, 1)):
        loads = trace.loads(step)
        assert trace.tokens(step) == tokens
        assert {int(load.tokens.sum()) for load in loads} == {2 * tokens}
    exact = shares[0, 3].astype(float) / shares[0, 3].astype(float).sum() * 200
    assert np.abs(trace.counts[0, 3] - exact).max() < 1
    assert merge([trace, trace]).loads(4)[0].tokens.sum() == 14


def test_frequencies_sum_to_one_per_layer() -> None:
    assert record().frequencies().sum(axis=1) == pytest.approx(np.ones(3))


def damage(arrays: dict[str, Array], name: str) -> dict[str, Array]:
    changed = dict(arrays)
    if name == "version":
        changed["head"] = np.array([99, *arrays["head"][1:]])
    elif name == "missing":
        del changed["offsets"]
    elif name == "ids":
        changed["ids"] = np.full_like(arrays["ids"], 200)
    elif name == "scores":
        changed["scores"] = arrays["scores"][:-1]
    elif name == "nan":
        changed["scores"] = np.full_like(arrays["scores"], np.nan)
    elif name == "offsets":
        changed["offsets"] = arrays["offsets"][::-1].copy()
    elif name == "sequence":
        changed["sequence"] = arrays["sequence"][:-1]
    elif name == "counted":
        changed["counted"] = np.full_like(arrays["counted"], 3)
    elif name == "forecasts":
        changed["forecast_ids"] = np.full_like(arrays["forecast_ids"], 77)
    return changed


@pytest.mark.parametrize(
    "name",
    ["version", "missing", "ids", "scores", "nan", "offsets", "sequence", "counted", "forecasts"],
)
def test_an_inconsistent_file_is_refused(tmp_path, name: str) -> None:
    path = tmp_path / "t.npz"
    record(depth=1).save(path)
    with np.load(path) as stored:
        arrays = {key: stored[key] for key in stored.files}
    np.savez(path, **damage(arrays, name))
    with pytest.raises(TraceError):
        RoutingTrace.load(path)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path, share: float) -> None:
    path = tmp_path / "t.npz"
    record().save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(TraceError, match=r"t\.npz"):
        RoutingTrace.load(path)


def test_a_foreign_decode_file_is_read_as_it_is(tmp_path) -> None:
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(32), (6, 24, 1)), axis=2)[..., :4]
    probs = np.full(ids.shape, 0.25, np.float16)
    path = tmp_path / "decode.npz"
    np.savez(path, ids=ids.astype(np.uint8), probs=probs, offsets=np.array([0, 2, 6]))
    trace = read_trace(path)
    assert (trace.steps, trace.layers, trace.experts, trace.top_k) == (6, 24, 32, 4)
    assert trace.sequence.tolist() == [0, 0, 1, 1, 1, 1]
    with pytest.raises(TraceError, match="offsets must end"):
        from_decode(ids.astype(np.uint8), probs, np.array([0, 2]))


def test_statistics_of_a_trace_that_repeats_itself() -> None:
    ids = np.tile(np.array([[[0, 1], [2, 3]]], np.uint8), (50, 1, 1))
    trace = RoutingTrace(
        8,
        2,
        ids,
        np.ones(ids.shape, np.float16),
        np.arange(51),
        np.zeros(50, bool),
        np.zeros(50, np.int32),
    )
    facts = statistics(trace)
    assert facts.overlap == 2.0
    assert facts.reuse.tolist() == [1.0, 1.0]
    assert facts.skew == 1.0
    assert facts.recall[0] > 0.9
