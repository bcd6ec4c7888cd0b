"""Which token meets which slot: what kernels are told of a launch."""

import numpy as np

from hybrimoe.kernels.gpu.pairs import Run, begins, by_slot, pairs_of

SLOTS = np.array([[2, 9], [9, 9], [0, 2]], np.int64)  # 9 is the row that stands for no slot
WEIGHTS = np.arange(6, dtype=np.float32).reshape(3, 2)
SHARDS = np.zeros((10, 2), np.int32)
SHARDS[[0, 2]] = [[0, 4], [1, 3]]


def test_pairs_leave_out_what_does_not_run_here():
    pairs = pairs_of(SLOTS, WEIGHTS, SHARDS)

    assert [column.tolist() for column in pairs] == [
        [0, 2, 2], [2, 0, 2], [0.0, 4.0, 5.0], [1, 0, 1], [3, 4, 3],
    ]  # fmt: skip
    assert {column.dtype for column in pairs} == {np.dtype(np.int32), np.dtype(np.float32)}


def test_runs_hold_the_pairs_of_a_slot_with_tokens_ascending():
    order, runs = by_slot(pairs_of(SLOTS, WEIGHTS, SHARDS))

    assert order.tolist() == [1, 0, 2]
    assert runs == [Run(0, 0, 1, 0, 4), Run(2, 1, 2, 1, 3)]


def test_begins_tells_tokens_without_pairs_apart():
    assert begins(pairs_of(SLOTS, WEIGHTS, SHARDS), 3).tolist() == [0, 1, 1, 3]


def test_no_pairs_are_no_runs():
    pairs = pairs_of(np.full((2, 2), 9), WEIGHTS[:2], SHARDS)
    order, runs = by_slot(pairs)

    assert (order.size, runs) == (0, [])
    assert begins(pairs, 2).tolist() == [0, 0, 0]
