"""Where every number of a packed expert lies.

An expert is a sum of shards: y = sum over slices of F of down_s(act(gate_s x) * up_s x). So its blob
is shard-major, and each shard is a small expert that can be copied, computed and summed alone:

    shard:  for each 16 rows of F: a gate block and an up block [16 rows x D]
            for each 16 rows of D: a down block [16 rows x width]
            biases as float32: gate [width], up [width], down [D] (zero but in the first shard)

A block keeps its 16 rows interleaved, one row per SIMD lane, and starts on a cache line. Gate and up
share a format; down may have another, which the format of the expert then names too: "q4_k+q6_k".
"""

from typing import NamedTuple

from hybrimoe.formats.base import LINE, ROWS, round_up
from hybrimoe.formats.registry import named


class Layout(NamedTuple):
    """Sizes are padded: D and the shard width to multiples of 32, or of 256 where a format shares
    numbers among so many columns.
    All offsets are in bytes.
    """

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


def split(fmt: str) -> tuple[str, str]:
    """The formats of the gate and up matrices, and of the down matrix."""
    up, _, down = fmt.partition("+")
    return up, down or up


def join(up: str, down: str) -> str:
    """The inverse of `split`."""
    return up if up == down else f"{up}+{down}"


def is_integer(fmt: str) -> bool:
    """Whether the weights are integers with scales: a native format is never mixed with others."""
    return not named(split(fmt)[0]).is_native


def only_files_bring(fmt: str) -> bool:
    """Whether some matrix has a format that is made from no floats, such as a K type."""
    return any(named(part).pack is None for part in split(fmt))


def expert_layout(fmt: str, hidden: int, inner: int, gated: bool, bias: bool) -> Layout:
    """The layout of an expert with D = `hidden` and F = `inner` in a weight format."""
    up_fmt, down_fmt = (named(part) for part in split(fmt))
    hidden = round_up(hidden, up_fmt.columns)
    groups = -(-inner // down_fmt.columns)
    shards = shard_count(groups)
    width = -(-groups // shards) * down_fmt.columns
    matrices = 2 if gated else 1
    up_block, down_block = up_fmt.block_bytes(hidden), down_fmt.block_bytes(width)
    down_at = matrices * width // ROWS * up_block
    bias_at = down_at + hidden // ROWS * down_block
    biases = 4 * (matrices * width + hidden) if bias else 0
    shard = round_up(bias_at + biases, LINE)
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
