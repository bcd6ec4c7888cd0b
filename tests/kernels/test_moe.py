"""`run_layer` against the reference: every format, instruction set, dtype and shape of a batch."""

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from kernel_cases import (
    CLAMPED,
    MADE,
    QUANTIZED,
    SILU,
    TRIPLES,
    expected,
    make_batch,
    make_layer,
    make_weights,
    nmse,
    pack_weights,
    run,
    share_all_work,
    tolerance,
)

from hybrimoe.errors import RoutingError
from hybrimoe.formats.gate import NAMES, SOFTCAP, Gate
from hybrimoe.kernels.cpu import run_layer as moe
from hybrimoe.kernels.cpu.run_layer import run_layer
from hybrimoe.kernels.cpu.workspace import Workspace

TOKENS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 32)
SHAPES = {  # D, F, gated, bias; the third has three shards, the fourth one, the fifth five
    "plain": (64, 128, True, False),
    "padded-bias": (70, 250, True, True),
    "odd-shards": (33, 90, True, False),
    "one-shard-bias": (100, 31, False, True),
    "no-gate": (32, 160, False, False),
}
GATES = {
    **{name: Gate(kind) for kind, name in enumerate(NAMES) if kind != SOFTCAP},
    "silu-clamped": CLAMPED,
    "gelu-limit": Gate(NAMES.index("gelu"), 1.0, 0.5),
    "relu2-offset": Gate(NAMES.index("relu2"), 1.0, float("inf"), -0.5),
    "softcap": Gate(SOFTCAP, 2.0, 3.0),
}


@pytest.fixture(autouse=True)
def shared(monkeypatch):
    share_all_work(monkeypatch)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("triple", TRIPLES, ids="-".join)
def test_layer_equals_the_reference(triple, shape):
    isa, fmt, dtype = triple
    hidden, inner, gated, bias = SHAPES[shape]
    layer, weights = make_layer(fmt, hidden, inner, 5, gated, bias, CLAMPED if gated else SILU)
    for tokens in TOKENS:
        batch = make_batch(tokens, hidden, 5, 1 + tokens % 4, seed=tokens)
        got = run(layer, *batch, dtype, isa=isa)
        wanted = expected(layer, weights, *batch, dtype)
        assert nmse(got, wanted) <= tolerance(fmt, dtype), tokens


@pytest.mark.parametrize("fmt", QUANTIZED)
def test_rounding_activations_costs_at_most_what_the_design_allows(fmt):
    layer, weights = make_layer(fmt, 256, 384)
    batch = make_batch(32, 256, 5, 4)
    assert nmse(run(layer, *batch), expected(layer, weights, *batch, rounded=False)) <= 2e-4


@pytest.mark.parametrize("fmt", ["float32", "int4"])
@pytest.mark.parametrize("name", GATES)
def test_every_gate_equals_its_formula(name, fmt):
    layer, weights = make_layer(fmt, 64, 96, gate=GATES[name])
    x, ids, routing = make_batch(13, 64, 5, 2)
    for scale in (0.1, 1, 30):
        got = run(layer, x * scale, ids, routing)
        wanted = expected(layer, weights, x * scale, ids, routing)
        assert nmse(got, wanted) <= max(1e-10, tolerance(fmt, "float32"))


@pytest.mark.parametrize("name", [name for name in GATES if name in NAMES[:SOFTCAP]])
def test_every_activation_works_without_a_gate(name):
    layer, weights = make_layer("float32", 64, 96, gated=False, gate=GATES[name])
    batch = make_batch(9, 64, 5, 2)
    assert nmse(run(layer, *batch), expected(layer, weights, *batch)) <= 1e-10


@pytest.mark.parametrize("fmt", MADE)
def test_partial_sums_over_shards_add_up_to_the_whole(fmt):
    layer, weights = make_layer(fmt, 70, 250, bias=True)
    x, ids, routing = make_batch(6, 70, 5, 3)
    cuts = np.random.default_rng(0).integers(0, layer.layout.shards + 1, 5).astype(np.int32)
    low = np.stack([np.zeros_like(cuts), cuts], 1)
    high = np.stack([cuts, np.full_like(cuts, layer.layout.shards)], 1)
    parts = [run(layer, x, ids, routing, shards=part) for part in (low, high)]
    for part, shards in zip(parts, (low, high)):
        wanted = expected(layer, weights, x, ids, routing, shards=shards)
        assert nmse(part, wanted) <= tolerance(fmt, "float32")
    assert nmse(sum(parts), run(layer, x, ids, routing)) <= 1e-12


def test_experts_without_shards_add_nothing():
    layer, _ = make_layer("int4", 70, 250, bias=True)
    none = np.zeros((5, 2), np.int32)
    assert not run(layer, *make_batch(6, 70, 5, 3), shards=none).any()


@pytest.mark.parametrize("fmt", MADE)
def test_one_expert_may_take_all_tokens(fmt):
    layer, weights = make_layer(fmt, 64, 128)
    x, _, routing = make_batch(29, 64, 5, 1)
    ids = np.full((29, 1), 3)
    got, wanted = run(layer, x, ids, routing), expected(layer, weights, x, ids, routing)
    assert nmse(got, wanted) <= tolerance(fmt, "float32")


@pytest.mark.parametrize("fmt", MADE)
def test_an_expert_named_twice_by_a_token_counts_twice(fmt):
    layer, weights = make_layer(fmt, 64, 128)
    x, ids, routing = make_batch(11, 64, 5, 4)
    ids[:, 1] = ids[:, 0]
    ids[::2, 3] = ids[::2, 0]
    got, wanted = run(layer, x, ids, routing), expected(layer, weights, x, ids, routing)
    assert nmse(got, wanted) <= tolerance(fmt, "float32")


def test_an_empty_batch_is_no_work():
    layer, _ = make_layer("int4", 64, 128)
    assert run(layer, *make_batch(0, 64, 5, 2)).shape == (0, 64)


def test_tokens_without_experts_are_zero():
    layer, _ = make_layer("int4", 64, 128)
    assert not run(layer, *make_batch(3, 64, 5, 0)).any()


def test_a_batch_longer_than_one_launch_is_split(monkeypatch):
    layer, _ = make_layer("int8", 64, 128)
    batch = make_batch(23, 64, 5, 2)
    whole = run(layer, *batch)
    monkeypatch.setattr(moe, "LONGEST", 5)
    assert np.array_equal(run(layer, *batch), whole)


def test_one_workspace_serves_layers_of_all_sizes():
    workspace = Workspace()
    for fmt, hidden, tokens in (("int4", 64, 3), ("float32", 128, 20), ("int4", 64, 9)):
        layer, weights = make_layer(fmt, hidden, 128)
        x, ids, routing = make_batch(tokens, hidden, 5, 2)
        out = np.full_like(x, np.nan)
        run_layer(layer, x, ids, routing, out, workspace)
        assert nmse(out, expected(layer, weights, x, ids, routing)) <= tolerance(fmt, "float32")


def test_a_workspace_tells_a_new_layer_from_a_dead_one_at_the_same_address():
    workspace, batch = Workspace(), make_batch(2, 64, 5, 2)
    for fmt in ("int4", "float32") * 6:
        weights = make_weights(fmt, 64, 128)
        layer, out = pack_weights(fmt, weights, SILU), np.full((2, 64), np.nan, np.float32)
        run_layer(layer, *batch, out, workspace)
        assert nmse(out, expected(layer, weights, *batch)) <= tolerance(fmt, "float32")


class TestBits:
    """The same bits whatever else happens: threads, batch, repetition."""

    @pytest.mark.parametrize("triple", TRIPLES, ids="-".join)
    def test_do_not_depend_on_threads(self, triple):
        isa, fmt, dtype = triple
        layer, _ = make_layer(fmt, 70, 250, bias=True)
        for tokens in (1, 7, 32):
            batch = make_batch(tokens, 70, 5, 3)
            one = run(layer, *batch, dtype, threads=1, isa=isa)
            for threads in (2, 3):
                assert np.array_equal(run(layer, *batch, dtype, threads, isa=isa), one)

    @pytest.mark.parametrize("triple", TRIPLES, ids="-".join)
    def test_do_not_depend_on_the_other_tokens(self, triple):
        isa, fmt, dtype = triple
        layer, _ = make_layer(fmt, 70, 250, bias=True)
        x, ids, routing = make_batch(32, 70, 5, 3)
        together = run(layer, x, ids, routing, dtype, isa=isa)
        for t in range(32):
            only = slice(t, t + 1)
            alone = run(layer, x[only], ids[only], routing[only], dtype, isa=isa)
            assert np.array_equal(alone, together[only]), t

    @pytest.mark.parametrize("fmt", MADE)
    def test_do_not_change_from_run_to_run(self, fmt):
        layer, _ = make_layer(fmt, 70, 250, bias=True)
        batch = make_batch(9, 70, 5, 4)
        first = run(layer, *batch)
        assert all(np.array_equal(run(layer, *batch), first) for _ in range(20))


class TestNotFinite:
    """A broken model must look broken."""

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("fmt", MADE)
    def test_input_breaks_its_token_and_no_other(self, fmt, bad):
        layer, weights = make_layer(fmt, 64, 128)
        x, ids, routing = make_batch(13, 64, 5, 2)
        clean = run(layer, x, ids, routing)
        x[4, 7] = x[11, 63] = bad
        got = run(layer, x, ids, routing)
        broken = np.isnan(expected(layer, weights, x, ids, routing))
        assert broken[[4, 11]].all()
        assert np.array_equal(np.isnan(got), broken)
        assert np.array_equal(got[~broken], clean[~broken])

    @pytest.mark.parametrize("shape", SHAPES)
    @pytest.mark.parametrize("fmt", MADE)
    def test_infinite_input_stays_visible_where_shapes_are_padded(self, fmt, shape):
        # Here an infinite output may become NaN: padding multiplies infinity by zero.
        hidden, inner, gated, bias = SHAPES[shape]
        layer, _ = make_layer(fmt, hidden, inner, 5, gated, bias)
        x, ids, routing = make_batch(3, hidden, 5, 2)
        x[1, hidden - 1] = np.inf
        visible = ~np.isfinite(run(layer, x, ids, routing))
        assert np.array_equal(visible.all(1), [False, True, False])
        assert np.array_equal(visible.any(1), [False, True, False])

    @pytest.mark.parametrize("fmt", ["float32", "int4"])
    @pytest.mark.parametrize("name", GATES)
    def test_nan_passes_every_gate(self, name, fmt):
        layer, _ = make_layer(fmt, 64, 96, gate=GATES[name])
        x, ids, routing = make_batch(3, 64, 5, 2)
        x[1, 5] = np.nan
        assert np.isnan(run(layer, x, ids, routing)).all(1).tolist() == [False, True, False]

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    @pytest.mark.parametrize("fmt", ["float32", "float16", "bfloat16"])
    def test_weight_breaks_what_it_touches(self, fmt, bad):
        weights = make_weights(fmt, 70, 128, bias=True)
        weights = weights._replace(up=weights.up.copy(), down=weights.down.copy())
        weights.up[1, 0, 3, 5] = weights.up[2, 1, 60, 69] = bad
        weights.down[0, 17, 4] = weights.down[0, 69, 127] = bad
        layer = pack_weights(fmt, weights, SILU)
        batch = make_batch(24, 70, 5, 2)
        got, wanted = run(layer, *batch), expected(layer, weights, *batch)
        assert np.array_equal(np.isnan(got), np.isnan(wanted))
        assert np.array_equal(np.isinf(got), np.isinf(wanted))
        assert 0 < np.isfinite(got).sum() < got.size

    def test_routing_weight_breaks_its_token(self):
        layer, _ = make_layer("int4", 64, 128)
        x, ids, routing = make_batch(3, 64, 5, 2)
        routing[1, 0] = np.nan
        broken = np.isnan(run(layer, x, ids, routing))
        assert np.array_equal(broken.all(1), [False, True, False])
        assert np.array_equal(broken.any(1), [False, True, False])

    @pytest.mark.parametrize("gate", [SILU, CLAMPED, GATES["gelu_tanh"], GATES["relu2"]], ids=str)
    @pytest.mark.parametrize("triple", TRIPLES, ids="-".join)
    def test_large_input_overflows_only_where_the_output_does(self, triple, gate):
        isa, fmt, dtype = triple
        layer, weights = make_layer(fmt, 70, 250, bias=True, gate=gate)
        x, ids, routing = make_batch(9, 70, 5, 2)
        x = np.sign(x) * np.float32(6e4)
        got = run(layer, x, ids, routing, dtype, isa=isa)
        wanted = expected(layer, weights, x, ids, routing, dtype)
        assert not np.isnan(got).any()
        near = np.abs(np.abs(wanted) / 65504 - 1) < 0.01  # rounding decides
        wanted = reference.from_bits(dtype, reference.to_bits(dtype, wanted))
        assert np.array_equal(np.isinf(got)[~near], np.isinf(wanted)[~near])
        finite = np.isfinite(got) & np.isfinite(wanted)
        assert nmse(got[finite].astype(float), wanted[finite].astype(float)) <= 1e-4


def call(layer, out=None, **changed):
    """`run_layer` on a good batch of 4 tokens with some arguments replaced."""
    x, ids, routing = make_batch(4, 64, 5, 2)
    good = {"x": x, "ids": ids, "weights": routing, "out": out, **changed}
    run_layer(layer, workspace=Workspace(), **good)


WRONG = {
    "x of another width": {"x": np.zeros((4, 63), np.float32)},
    "x in float64": {"x": np.zeros((4, 64))},
    "x of halves called float32": {"x": np.zeros((4, 64), np.uint16)},
    "x of floats called bfloat16": {"dtype": "bfloat16"},
    "x not contiguous": {"x": np.zeros((64, 4), np.float32).T},
    "x with one axis": {"x": np.zeros(64, np.float32)},
    "more tokens in x than in out": {"x": np.zeros((5, 64), np.float32)},
    "ids of fewer tokens": {"ids": np.zeros((3, 2), np.int64)},
    "ids with one axis": {"ids": np.zeros(4, np.int64)},
    "ids in int32": {"ids": np.zeros((4, 2), np.int32)},
    "ids not contiguous": {"ids": np.zeros((4, 4), np.int64)[:, ::2]},
    "weights of another top-k": {"weights": np.zeros((4, 3), np.float32)},
    "weights in float64": {"weights": np.zeros((4, 2))},
}


class TestBadArguments:
    @pytest.mark.parametrize("name", WRONG)
    def test_raise_and_write_nothing(self, name):
        layer, _ = make_layer("float32", 64, 128)
        out = np.full((4, 64), np.nan, np.float32)
        with pytest.raises(RoutingError):
            call(layer, out, **WRONG[name])
        assert np.isnan(out).all()

    @pytest.mark.parametrize(
        "out",
        [np.zeros((4, 64)), np.zeros((3, 64), np.float32), np.zeros((64, 4), np.float32).T],
        ids=["float64", "too short", "not contiguous"],
    )
    def test_include_an_output_that_does_not_fit(self, out):
        with pytest.raises(RoutingError, match="out must be"):
            call(make_layer("float32", 64, 128)[0], out)
        assert not out.any()

    @pytest.mark.parametrize(
        "shards",
        [
            np.zeros((1, 2), np.int32),
            np.zeros((5, 2)),
            np.tile(np.int32([0, 99]), (5, 1)),
            np.tile(np.int32([-1, 1]), (5, 1)),
        ],
        ids=["too few", "float64", "past the end", "negative"],
    )
    def test_include_shards_that_do_not_exist(self, shards):
        out = np.full((4, 64), np.nan, np.float32)
        with pytest.raises(RoutingError, match="shards"):
            call(make_layer("float32", 64, 128)[0], out, shards=shards)
        assert np.isnan(out).all()

    @settings(max_examples=200, deadline=None)
    @given(
        ids=arrays(np.int64, (4, 2), elements=st.integers(0, 4)),
        at=st.tuples(st.integers(0, 3), st.integers(0, 1)),
        bad=st.integers(-(2**63), -1) | st.integers(5, 2**63 - 1),
    )
    def test_include_every_expert_id_out_of_range(self, ids, at, bad):
        ids[at] = bad
        out = np.full((4, 64), np.nan, np.float32)
        with pytest.raises(RoutingError, match=rf"\[0, 5\), got {bad}"):
            call(make_layer("float32", 64, 128)[0], out, ids=ids)
        assert np.isnan(out).all()
