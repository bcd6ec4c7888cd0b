"""Compiled helpers of the runtime's hot path, against the same in numpy."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from policy_cases import examples

from hybrimoe.policy.plan import left_to_cpu
from hybrimoe.policy.slots import lacks_any, place_in_slots

SEEDS = st.integers(0, 2**32 - 1)


@examples(50)
@given(SEEDS)
def test_ids_and_shards_of_a_launch_name_the_slots_of_its_experts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    experts, slots = int(rng.integers(2, 20)), int(rng.integers(1, 9))
    count = int(rng.integers(1, min(experts, slots) + 1))
    wave = np.stack([rng.permutation(experts)[:count], rng.permutation(slots)[:count]], axis=1)
    on_gpu = rng.integers(1, 5, experts).astype(np.int32)
    ids = rng.integers(0, experts, (int(rng.integers(1, 5)), 3))

    placed, shards = place_in_slots(wave, on_gpu, ids, slots)

    where = dict(wave.tolist())
    assert placed.tolist() == [[where.get(int(e), slots) for e in row] for row in ids]
    assert shards.dtype == np.int32
    assert shards[:, 0].tolist() == [0] * (slots + 1)
    computed = {slot: int(on_gpu[expert]) for expert, slot in where.items()}
    assert shards[:, 1].tolist() == [computed.get(slot, 0) for slot in range(slots + 1)]


@examples(50)
@given(SEEDS)
def test_the_layers_that_lack_an_expert_are_found(seed: int) -> None:
    rng = np.random.default_rng(seed)
    slot = rng.integers(-1, 30, (6, 5)).astype(np.int32)
    first, end = sorted(rng.integers(0, 7, 2).tolist())

    sizes = rng.integers(1, 6, 6)
    for layer, size in enumerate(sizes):
        slot[layer, size:] = -1  # what a layer does not have, it does not lack
    lacking = [(row[:size] < 0).any() for row, size in zip(slot[first:end], sizes[first:end])]

    assert lacks_any(slot, sizes, first, end) == any(lacking)


@examples(50)
@given(SEEDS)
def test_what_is_left_to_the_cpu_counts_parts(seed: int) -> None:
    rng = np.random.default_rng(seed)
    share, tokens = (rng.integers(0, 5, 7).astype(np.int32) for _ in range(2))

    assert left_to_cpu(share, tokens, 4) == ((4 - share).sum() / 4, ((4 - share) @ tokens) / 4)
