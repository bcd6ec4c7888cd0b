"""Deltas: the sum is right, and taking them out gives back every bit."""

import pytest
import torch

from hybrimoe.models.deltas import Delta, add, keep, subtract


def weights(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype)


def delta(shape, scale, rank=3, seed=1):
    experts, rows, columns = shape
    left, right = (
        weights((experts, *sizes), torch.float32, seed + at)
        for at, sizes in enumerate(((rows, rank), (rank, columns)))
    )
    return Delta(left, right, scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, -30.0])
def test_what_was_added_is_taken_out_to_the_last_bit(dtype, scale):
    shape = (3, 16, 24)
    plain = weights(shape, dtype)
    plain[0, 0, :4] = torch.tensor([0.0, -0.0, 1e-7, -3e-5])
    deltas = [delta(shape, scale), delta(shape, scale / 3, rank=2, seed=7)]
    folded = add(plain, deltas)
    kept = keep(plain, folded, deltas)

    wanted = plain.double()
    for left, right, factor in deltas:
        wanted = wanted + factor * (left.double() @ right.double())
    torch.testing.assert_close(folded, wanted.to(dtype))
    restored = subtract(folded, deltas, kept)
    kind = torch.int16 if dtype.itemsize == 2 else torch.int32
    assert torch.equal(restored.view(kind), plain.view(kind))


def test_a_bias_of_two_dimensions_is_one_matrix():
    plain = weights((4, 8), torch.bfloat16)
    found = delta((1, 4, 8), 0.5)
    folded = add(plain, [found])

    torch.testing.assert_close(folded, (plain + 0.5 * found.left[0] @ found.right[0]).bfloat16())
    assert torch.equal(subtract(folded, [found], keep(plain, folded, [found])), plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_small_deltas_keep_few_weights_and_large_ones_no_more_than_all(dtype):
    shape = (2, 64, 96)
    plain = weights(shape, dtype)
    for scale, most in ((0.005, 0.08), (100.0, 1.0)):
        found = [delta(shape, scale)]
        kept = keep(plain, add(plain, found), found)
        assert sum(part.nbytes for part in kept) <= most * plain.nbytes
