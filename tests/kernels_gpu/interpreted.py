"""Triton's kernels in its interpreter; `test_triton_experts.py` runs this file by itself.

Triton chooses between compiling and interpreting when its kernels are defined, so these tests need
a process of their own with TRITON_INTERPRET=1.
"""

import pytest
import torch
from gpu_cases import BOUNDS, Case, compute, error, grid, layer_of, make_batch, partial_sum
from triton.runtime import interpreter

from hybrimoe.kernels.triton_experts import plan_tiles, run

PATHS = {"pairs": False, "tiles": True}
_patch_tensor = interpreter._patch_lang_tensor


def _patch_index(tensor, scope):
    """Loop bounds are arrays of one number, of which NumPy 2.4 makes no int; Triton 3.6 asks it."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_index


SMALL = [case for case in grid() if case.tokens * case.k <= 33]  # a program takes 10 ms here


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_pairs_equal_float64(case):
    assert error(run, case, tiled=False) < BOUNDS["float32"]  # whatever the dtype of x


@pytest.mark.parametrize("case", grid(), ids=str)
def test_tiles_equal_float64(case):
    assert error(run, case, tiled=True) < BOUNDS[case.dtype]


@pytest.mark.parametrize("tiled", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("fmt", ["int4", "float16"])
def test_partial_experts_sum_to_the_whole(fmt, tiled):
    assert partial_sum(run, Case(fmt, bias=True), tiled=tiled) < BOUNDS["float32"]


def test_more_pairs_than_the_first_path_takes_go_to_tiles():
    assert error(run, Case(tokens=33, k=5)) < BOUNDS["float32"]


@pytest.mark.parametrize("tiled", PATHS.values(), ids=PATHS)
def test_counts_and_repeats_change_no_bit(tiled):
    case = Case(tokens=3, inner=32)
    layer = layer_of(case)
    batch = make_batch(case, 1)
    counts = torch.bincount(batch.slot, minlength=case.slots).tolist()
    first = compute(run, case, layer, batch, tiled=tiled)

    assert torch.equal(first, compute(run, case, layer, batch, tiled=tiled, counts=counts))


@pytest.mark.parametrize("tiled", PATHS.values(), ids=PATHS)
def test_nan_stays_with_its_token(tiled):
    case = Case(tokens=4, slots=2, inner=32)
    layer = layer_of(case)
    batch = make_batch(case, 1)
    batch.x[2, 5] = torch.nan
    got = compute(run, case, layer, batch, tiled=tiled)

    assert got[2].isnan().all()
    assert torch.isfinite(got[[0, 1, 3]]).all()


@pytest.mark.parametrize("tokens", [1, 7, 90])
@pytest.mark.parametrize("known", [True, False])
def test_tiles_cover_every_pair_once(tokens, known):
    batch = make_batch(Case(tokens=tokens, k=3), 1)
    counts = torch.bincount(batch.slot, minlength=5).tolist()
    plan = plan_tiles(batch.token, batch.slot, tokens, 5, counts if known else None)
    covered = [
        first + i
        for first in plan.first.tolist()
        for i in range(plan.size)
        if first + i < len(batch.slot) and batch.slot[first] == batch.slot[first + i]
    ]

    assert covered == list(range(len(batch.slot)))
    assert not known or all(first < len(batch.slot) for first in plan.first.tolist())


def test_misaligned_blobs_are_refused():
    case = Case()
    layer = layer_of(case)
    shifted = torch.zeros(layer.blobs.numel() + 4, dtype=torch.uint8)[4:].view_as(layer.blobs)

    with pytest.raises(ValueError, match="16 bytes"):
        compute(run, case, layer._replace(blobs=shifted), make_batch(case, 1))
