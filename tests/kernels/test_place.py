"""Experts that lie in any order, and launches that go on from each other's sums."""

import numpy as np
import pytest
from kernel_cases import make_batch, make_layer, run

from hybrimoe.errors import RoutingError
from hybrimoe.kernels.cpu.run_layer import run_layer
from hybrimoe.kernels.cpu.workspace import Workspace


def shuffled(layer, rows=9, seed=0):
    """The same experts in a larger slab, in rows drawn at random; other rows are NaN."""
    place = np.random.default_rng(seed).permutation(rows)[: len(layer.blobs)].astype(np.int32)
    slab = np.full((rows, layer.blobs.shape[1] + 4096), 0xFF, np.uint8)
    slab[place, : layer.blobs.shape[1]] = layer.blobs
    layout = layer.layout._replace(expert_bytes=slab.shape[1])
    return layer._replace(layout=layout, blobs=slab, place=place)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("fmt", ["float32", "int4"])
def test_where_experts_lie_changes_no_bit(fmt, bias):
    layer, _ = make_layer(fmt, 96, 160, bias=bias)
    for tokens in (1, 2, 19):
        batch = make_batch(tokens, 96, 5, 3)
        wanted = run(layer, *batch)
        for seed in range(3):
            assert np.array_equal(run(shuffled(layer, seed=seed), *batch), wanted)


@pytest.mark.parametrize("fmt", ["float32", "int4"])
def test_launches_over_rising_experts_give_the_bits_of_one_launch(fmt):
    layer, _ = make_layer(fmt, 96, 160)
    x, ids, routing = make_batch(19, 96, 5, 3)
    wanted = run(layer, x, ids, routing)

    for parts in ([[0], [1, 2], [3, 4]], [[0, 1, 2, 3], [4]], [[e] for e in range(5)]):
        out = np.full_like(x, np.nan)
        for at, part in enumerate(parts):
            shards = np.zeros((5, 2), np.int32)
            shards[part] = 0, layer.layout.shards
            run_layer(layer, x, ids, routing, out, Workspace(), shards=shards, add=at > 0)
        assert np.array_equal(out, wanted)


@pytest.mark.parametrize("place", [[0, 1, 2, 3, 5], [0, 1, 2, 3, -1], [0, 1, 2, 3]])
def test_a_place_outside_of_memory_is_refused(place):
    layer, _ = make_layer("float32", 96, 160)
    wrong = layer._replace(place=np.array(place, np.int32))
    batch = make_batch(2, 96, 5, 3)

    with pytest.raises(RoutingError):
        run(wrong, *batch)
