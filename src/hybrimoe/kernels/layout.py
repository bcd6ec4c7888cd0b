"""Where every number of a packed expert lies.

An expert is a sum of shards: y = sum over slices of F of down_s(act(gate_s x) * up_s x). So its blob
is shard-major, and each shard is a small expert that can be copied, computed and summed alone:

    shard:  for each 16 rows of F: a gate block and an up block [16 rows x D]
            for each 16 rows of D: a down block [16 rows x width]
            biases as float32: gate [width], up [width], down [D] (zero but in the first shard)

A block keeps its 16 rows interleaved, one row per SIMD lane, and starts on a cache line.
"""

from typing import NamedTuple

GROUP = 32
ROWS = 16
LINE = 64

QUANTIZED = ("int4", "int8")
BLOCK_BYTES = {"int4": 16, "int8": 32, "bfloat16": 64, "float16": 64, "float32": 128}
"""Weight bytes of one row's group of 32 elements."""


class Layout(NamedTuple):
    """Sizes are padded: D and the shard width to multiples of 32. All offsets are in bytes."""

    hidden: int  # D, padded
    width: int  # F of one shard, padded
    shards: int
    matrices: int  # 2 with a gate, else 1
    up_block: int  # 16 rows x hidden
    down_block: int  # 16 rows x width
    down_at: int  # first down block of a shard
    bias_at: int  # biases of a shard, 0 where there are none
    shard_bytes: int
    expert_bytes: int

    @property
    def inner(self) -> int:
        """F of the whole expert, padded."""
        return self.width * self.shards


def expert_layout(fmt: str, hidden: int, inner: int, gated: bool, bias: bool) -> Layout:
    """The layout of an expert with D = `hidden` and F = `inner` in a weight format."""
    hidden, groups = _round_up(hidden, GROUP), -(-inner // GROUP)
    shards = shard_count(groups)
    width = -(-groups // shards) * GROUP
    matrices = 2 if gated else 1
    up_block, down_block = block_bytes(fmt, hidden), block_bytes(fmt, width)
    down_at = matrices * width // ROWS * up_block
    bias_at = down_at + hidden // ROWS * down_block
    biases = 4 * (matrices * width + hidden) if bias else 0
    shard = _round_up(bias_at + biases, LINE)
    return Layout(
        hidden,
        width,
        shards,
        matrices,
        up_block,
        down_block,
        down_at,
        bias_at if bias else 0,
        shard,
        shard * shards,
    )


def shard_count(groups: int) -> int:
    """How many shards share `groups` groups of F: four, unless another count pads less."""

    def badness(shards: int) -> float:
        return -(-groups // shards) * shards / groups + 0.02 * abs(shards - 4)

    return min((4, 5, 3, 6, 2, 7, 8, 1), key=badness)


def block_bytes(fmt: str, columns: int) -> int:
    """Bytes of 16 interleaved rows of `columns` weights, with their scales."""
    scales = 2 * ROWS if fmt in QUANTIZED else 0
    return _round_up(columns // GROUP * (ROWS * BLOCK_BYTES[fmt] + scales), LINE)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
