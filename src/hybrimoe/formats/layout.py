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

GROUP = 32
SUPER = 256
ROWS = 16
LINE = 64

QUANTIZED = ("int4", "int8")
"""Made from floats: 32 integers share a scale."""
BLOCK_BYTES = {"int4": 16, "int8": 32, "bfloat16": 64, "float16": 64, "float32": 128}
"""Weight bytes of one row's group of 32 elements."""
K_GROUP = {"q4_k": 288, "q5_k": 352, "q6_k": 416}
"""Bytes of 16 rows' groups of 32 elements, in the K types of ggml files: see `k_rows.py`."""
K_HEAD = {"q4_k": 64, "q5_k": 64, "q6_k": 32}
"""Bytes of what 256 elements of each of the 16 rows share, in front of their 8 groups."""


class Layout(NamedTuple):
    """Sizes are padded: D and the shard width to multiples of 32, or of 256 as columns of a K type.
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
    return split(fmt)[0] not in ("bfloat16", "float16", "float32")


def has_k_types(fmt: str) -> bool:
    """Whether some matrix has a K type, which only files bring: none is made from floats."""
    return not K_HEAD.keys().isdisjoint(split(fmt))


def expert_layout(fmt: str, hidden: int, inner: int, gated: bool, bias: bool) -> Layout:
    """The layout of an expert with D = `hidden` and F = `inner` in a weight format."""
    up_fmt, down_fmt = split(fmt)
    hidden = _round_up(hidden, step(up_fmt))
    groups = -(-inner // step(down_fmt))
    shards = shard_count(groups)
    width = -(-groups // shards) * step(down_fmt)
    matrices = 2 if gated else 1
    up_block, down_block = block_bytes(up_fmt, hidden), block_bytes(down_fmt, width)
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


def step(fmt: str) -> int:
    """Columns that no block of a format parts."""
    return SUPER if fmt in K_HEAD else GROUP


def block_bytes(fmt: str, columns: int) -> int:
    """Bytes of 16 interleaved rows of `columns` weights, with their scales."""
    if fmt in K_HEAD:
        return _round_up(columns // SUPER * (K_HEAD[fmt] + 8 * K_GROUP[fmt]), LINE)
    scales = 2 * ROWS if fmt in QUANTIZED else 0
    return _round_up(columns // GROUP * (ROWS * BLOCK_BYTES[fmt] + scales), LINE)


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step
