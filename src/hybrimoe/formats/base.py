"""A weight format as one value: what a block of 16 rows holds, and the loops that read and write it.

A block keeps 16 rows of a matrix interleaved, one row per SIMD lane, in units: 32 columns of every
row, or 256 where groups of 32 share numbers in front of them. A unit is

    head     float16 numbers that its 8 groups share, `shared` for each row; d, then dmin
    groups   for each `parts`-th of a group: its codes, 16 rows interleaved by `run` neighbours, then
             their bits above the nibbles; behind all parts the scales, and the minimums

Nibbles come in loads of 64 bytes, 4 of each row: first what the low halves hold, then the high ones.
The bits above them lie such that a shift by a constant brings them there: bit 4 + b j of a byte begins
the bits of the low nibble of load j, bit b j those of the high one, for b bits each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

GROUP = 32
"""Columns that share a scale, or the parts of them that do."""
SUPER = 256
"""Columns of a unit whose groups share a head."""
ROWS = 16
LINE = 64
"""Bytes of a cache line: where a block starts."""
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
NIBBLES, BYTES = "nibbles", "bytes"


@dataclass(frozen=True, eq=False)
class BlobFormat:
    """One way to keep weights.

    name: what `Config.weights`, packed folders and reports call it.
    codes: NIBBLES, BYTES (signed), or the dtype that keeps every bit of the weights.
    rows: the loop of `registry.rows`. quantize: that of `registry.quantize`. unpack, pack: those of
        `registry.unpack_group` and `pack_group`; without `pack` only files bring such weights.
    bound: NMSE of a layer against float32 arithmetic on the stored weights that `verify` accepts.
    read_share: what decoding reaches of the memory's read speed (benchmarks/README.md).
    largest: weights beyond this need a scale that its dtype cannot hold.
    ggml_type: the type of GGUF files whose numbers it takes as they are.
    run: neighbours of a row that stay together. zero: what a code is above its value.
    extra_bits: bits above the nibbles. shared, parts: see above. scale: dtype of a part's scale.
    minimum: a uint8 times dmin is subtracted.
    """

    name: str
    codes: str
    rows: Callable[..., Any]
    quantize: Callable[..., Any]
    unpack: Callable[..., Any]
    pack: Callable[..., Any] | None = None
    bound: float = 2e-4
    read_share: float = 1.0
    largest: float = float("inf")
    ggml_type: int | None = None
    run: int = 4
    zero: int = 0
    extra_bits: int = 0
    shared: int = 0
    parts: int = 1
    scale: str | None = None
    minimum: bool = False

    @property
    def is_native(self) -> bool:
        """Whether it keeps every bit of a dtype."""
        return self.scale is None

    @property
    def is_rounded(self) -> bool:
        """Whether it is made from floats, of which it keeps the nearest it has."""
        return self.pack is not None and not self.is_native

    @property
    def columns(self) -> int:
        """Columns of a unit, which no block parts."""
        return SUPER if self.shared else GROUP

    @property
    def neighbours(self) -> int:
        """Columns of one row that a load of every row holds side by side."""
        return 2 * self.run if self.codes == NIBBLES else self.run

    @property
    def nibble_bytes(self) -> int:
        """Bytes of the codes of one part of a group, without the bits above nibbles."""
        codes = GROUP // self.parts * ROWS
        return codes // 2 if self.codes == NIBBLES else codes * ITEM_BYTES.get(self.codes, 1)

    @property
    def part_bytes(self) -> int:
        """Bytes of one part of a group, without its scales."""
        return self.nibble_bytes + GROUP // self.parts * ROWS * self.extra_bits // 8

    @property
    def scale_bytes(self) -> int:
        """Bytes of a group's scales, without minimums."""
        return 0 if self.scale is None else self.parts * ROWS * np.dtype(self.scale).itemsize

    @property
    def group_bytes(self) -> int:
        """Bytes of 32 columns of 16 rows, with scales and minimums."""
        return self.parts * self.part_bytes + self.scale_bytes + ROWS * self.minimum

    @property
    def head_bytes(self) -> int:
        """Bytes of what the groups of a unit share."""
        return 2 * ROWS * self.shared

    @property
    def unit_bytes(self) -> int:
        """Bytes of `columns` columns of 16 rows."""
        return self.head_bytes + self.columns // GROUP * self.group_bytes

    def block_bytes(self, columns: int) -> int:
        """Bytes of 16 rows of so many columns, whole units and whole cache lines."""
        return round_up(columns // self.columns * self.unit_bytes, LINE)


def round_up(value: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-value // step) * step
