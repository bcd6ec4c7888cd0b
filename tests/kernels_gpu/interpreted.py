"""Triton's kernels in its interpreter; `test_triton_experts.py` runs this file by itself.

Triton chooses between compiling and interpreting when its kernels are defined, so these tests need
a process of their own with TRITON_INTERPRET=1.
"""

import pytest
import torch
from gpu_cases import (
    BOUNDS,
    Case,
    compute,
    error,
    grid,
    layer_of,
    make_batch,
    partial_sum,
    without_pairs,
)
from triton.runtime import interpreter

from hybrimoe.kernels.gpu import triton_experts
from hybrimoe.kernels.gpu.pairs import by_slot
from hybrimoe.kernels.gpu.triton_experts import run, tile_size, tile_starts

PATHS = {"pairs": False, "tiles": True}
_patch_tensor = interpreter._patch_lang_tensor


def _patch_index(tensor, scope):
    """Loop bounds are arrays of one number, of which NumPy 2.4 makes no int; Triton 3.6 asks it."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


interpreter._patch_lang_tensor = _patch_index


SMALL = [  # a program takes 10 ms here
    case
    for case in grid()
    if case.tokens * case.k <= 10 and (case.dtype == "float32" or case.fmt == "float16")
]


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
def test_nan_stays_with_its_token(tiled):
    case = Case(tokens=4, slots=2, inner=32)
    layer = layer_of(case)
    batch = make_batch(case, 1)
    batch.x[2, 5] = torch.nan
    got = compute(run, case, layer, batch, tiled=tiled)

    assert got[2].isnan().all()
    assert torch.isfinite(got[[0, 1, 3]]).all()


@pytest.mark.parametrize("tiled", PATHS.values(), ids=PATHS)
def test_no_pairs_leave_the_output_alone(tiled):
    assert not compute(run, Case(), layer_of(Case()), without_pairs(Case()), tiled=tiled).any()


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        self.launches.append(grid)
        return self.kernel[grid]


@pytest.mark.parametrize("tiled", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("k", [1, 5])
def test_launches_do_not_depend_on_the_number_of_experts(tiled, k, monkeypatch):
    launches = []
    for name in ("up_pairs", "down_tokens", "up_tiles", "down_tiles", "sum_pairs"):
        kernel = getattr(triton_experts, name)
        monkeypatch.setattr(triton_experts, name, Counted(kernel, launches))
    case = Case("float32", k=k, hidden=32, inner=32)
    compute(run, case, layer_of(case), make_batch(case, 1), tiled=tiled)

    assert len(launches) == (3 if tiled else 2)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
@pytest.mark.parametrize("tokens", [1, 7, 90, 400])
def test_tiles_cover_every_pair_once(tokens, precision):
    _, runs = by_slot(make_batch(Case(tokens=tokens, k=3), 1).pairs)
    size, _ = tile_size(runs, precision)
    ends = [run.start + run.count for run in runs]
    covered = [
        first + i
        for first in tile_starts(runs, size).tolist()
        for i in range(min(size, next(end for end in ends if end > first) - first))
    ]

    assert covered == list(range(ends[-1]))


def test_misaligned_blobs_are_refused():
    case = Case()
    layer = layer_of(case)
    shifted = torch.zeros(layer.blobs.numel() + 4, dtype=torch.uint8)[4:].view_as(layer.blobs)

    with pytest.raises(ValueError, match="16 bytes"):
        compute(run, case, layer._replace(blobs=shifted), make_batch(case, 1))
