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
    without_pairs,
)

from hybrimoe.kernels.gpu import torch_experts
from hybrimoe.kernels.gpu.pairs import Run
from hybrimoe.kernels.gpu.torch_experts import cut_batches, run

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


@pytest.mark.parametrize("limit", [1, 1 << 40])
def test_batches_of_any_size_agree(limit, monkeypatch):
    monkeypatch.setattr(torch_experts, "UNPACKED_BYTES", limit)

    assert error(run, Case(tokens=9, k=3)) < BOUNDS["float32"]


def test_no_pairs_leave_the_output_alone():
    assert not compute(run, Case(), layer_of(Case()), without_pairs(Case())).any()


def test_nan_stays_with_its_token():
    case = Case(tokens=4, slots=2)
    layer = layer_of(case)
    batch = make_batch(case, 1)
    batch.x[2, 5] = torch.nan
    got = compute(run, case, layer, batch)

    assert got[2].isnan().all()
    assert torch.isfinite(got[[0, 1, 3]]).all()


def test_batches_cut_where_padding_or_shards_differ():
    layout, whole = layer_of(Case()).layout, (0, layer_of(Case()).layout.shards)
    runs = [
        Run(0, 0, 1, *whole),
        Run(2, 1, 1, *whole),
        Run(3, 2, 90, *whole),
        Run(4, 92, 80, *whole),
        Run(5, 172, 90, 0, 1),
        Run(6, 262, 90, 1, 1),
    ]
    batches = list(cut_batches(layout, runs, 4))

    assert batches == [runs[:2], runs[2:4], runs[4:5]]


def test_slots_wider_than_the_expert_are_read_the_same():
    case = Case(bias=True)
    layer = layer_of(case)
    batch = make_batch(case, layer.layout.shards)
    wide = torch.nn.functional.pad(layer.blobs, (0, 128), value=255)
    layout = layer.layout._replace(expert_bytes=wide.shape[1])
    slab = layer._replace(blobs=wide, layout=layout)

    assert torch.equal(compute(run, case, slab, batch), compute(run, case, layer, batch))


def test_repeats_give_the_same_bits():
    case = Case(tokens=33, k=5)
    layer = layer_of(case)
    batch = make_batch(case, 1)
    first = compute(run, case, layer, batch)

    assert all(torch.equal(first, compute(run, case, layer, batch)) for _ in range(5))
    assert (first - expected(case, layer, batch)).abs().max() < 1e-3
