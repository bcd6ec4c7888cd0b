"""Experts by torch operations, on the CPU and, where there is one, on a GPU."""

import pytest
import torch
from gpu_cases import (
    BOUNDS,
    Case,
    compute,
    error,
    expected,
    grid,
    layer_of,
    make_batch,
    partial_sum,
)

from hybrimoe.kernels import torch_experts
from hybrimoe.kernels.torch_experts import Batch, cut_batches, run

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
PARTIAL = [Case(fmt, bias=bias) for fmt in ("int4", "float16") for bias in (True, False)]


@pytest.mark.parametrize("case", grid(), ids=str)
def test_equals_float64(case):
    assert error(run, case) < BOUNDS["float32"]  # the CPU always computes in float32


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("case", grid(), ids=str)
def test_equals_float64_on_a_gpu(case):
    assert error(run, case, "cuda") < BOUNDS[case.dtype]


@pytest.mark.parametrize("case", PARTIAL, ids=str)
def test_partial_experts_sum_to_the_whole(case):
    assert partial_sum(run, case) < BOUNDS["float32"]


@pytest.mark.parametrize("case", [c for c in grid() if c.parts], ids=str)
def test_masked_shards_equal_skipped_ones(case, monkeypatch):
    """What a device does with a table of shards that the host cannot read."""
    monkeypatch.setattr(torch_experts, "_on_host", lambda tensor: False)

    assert error(run, case) < BOUNDS["float32"]


@pytest.mark.parametrize("limit", [1, 1 << 40])
def test_batches_of_any_size_agree(limit, monkeypatch):
    monkeypatch.setattr(torch_experts, "UNPACKED_BYTES", limit)

    assert error(run, Case(tokens=9, k=3)) < BOUNDS["float32"]


def test_counts_from_the_host_change_nothing():
    case = Case(tokens=7, k=3)
    layer = layer_of(case)
    batch = make_batch(case, layer.layout.shards)
    counts = torch.bincount(batch.slot, minlength=case.slots).tolist()

    assert torch.equal(
        compute(run, case, layer, batch, counts=counts), compute(run, case, layer, batch)
    )


def test_no_pairs_leave_the_output_alone():
    case = Case()
    layer = layer_of(case)
    batch = make_batch(case, 1)
    batch = batch._replace(**{n: getattr(batch, n)[:0] for n in ("token", "slot", "weight")})

    assert not compute(run, case, layer, batch).any()


def test_nan_stays_with_its_token():
    case = Case(tokens=4, slots=2)
    layer = layer_of(case)
    batch = make_batch(case, 1)
    batch.x[2, 5] = torch.nan
    got = compute(run, case, layer, batch)

    assert got[2].isnan().all()
    assert torch.isfinite(got[[0, 1, 3]]).all()


def test_batches_cut_where_padding_would_grow():
    layout = layer_of(Case()).layout
    batches = list(cut_batches(layout, [1, 0, 1, 90, 80, 0], None, 4))

    assert batches == [
        Batch([0, 2], [0, 1], [1, 1], (0, layout.shards)),
        Batch([3, 4], [2, 92], [90, 80], (0, layout.shards)),
    ]


def test_repeats_give_the_same_bits():
    case = Case(tokens=33, k=5)
    layer = layer_of(case)
    batch = make_batch(case, 1)
    first = compute(run, case, layer, batch)

    assert all(torch.equal(first, compute(run, case, layer, batch)) for _ in range(5))
    assert (first - expected(case, layer, batch)).abs().max() < 1e-3
