"""All formats that blobs may have, and the compiled loops that choose by format.

A format becomes known by one `register` here. A kernel is compiled for the formats it is called with:
`rows`, `quantize`, `pack_group` and `unpack_group` become the loops of that format inside it.
"""

import inspect
import re
import zlib
from pathlib import Path

from numba.extending import overload

from hybrimoe.errors import FormatError
from hybrimoe.formats.activations import ACTIVATION_GROUP
from hybrimoe.formats.base import BlobFormat
from hybrimoe.formats.integer import INT4, INT8
from hybrimoe.formats.k_types import Q4_K, Q5_K, Q6_K
from hybrimoe.formats.native import BFLOAT16, FLOAT16, FLOAT32
from hybrimoe.simd.compile import PACKAGE, stamp_of
from hybrimoe.simd.jit import INLINED
from hybrimoe.simd.vectors import Tag

FORMATS: dict[str, BlobFormat] = {}
"""By name, in the order they were registered."""
TAGS: dict[str, Tag] = {}
"""What kernels take for a format."""
NAME = re.compile(r"[a-z][a-z0-9_]*")


def register(fmt: BlobFormat) -> BlobFormat:
    """Make a format known to everything: settings, packing, kernels, files, reports. Returns it.

    Raises FormatError for a name that is taken, or is none: small letters, digits and underscores.
    """
    if not NAME.fullmatch(fmt.name) or fmt.name == "native":
        raise FormatError(f"the name of a format must be of a-z, 0-9 and _, got {fmt.name!r}")
    if FORMATS.get(fmt.name, fmt) is not fmt:
        raise FormatError(f"the name of a format must be its own, {fmt.name!r} is taken")
    FORMATS[fmt.name], TAGS[fmt.name] = fmt, Tag("format", fmt.name, _version(fmt))
    return fmt


def named(name: str) -> BlobFormat:
    """The format of a name; raises FormatError, with all names, where there is none."""
    if name not in FORMATS:
        raise FormatError(f"unknown format {name!r}; formats are {', '.join(FORMATS)}")
    return FORMATS[name]


def rounded() -> tuple[str, ...]:
    """Names of the formats that any weights can be rounded to, the most precise first."""
    found = [fmt for fmt in FORMATS.values() if fmt.is_rounded]
    return tuple(fmt.name for fmt in sorted(found, key=lambda fmt: -fmt.unit_bytes / fmt.columns))


def choices() -> tuple[str, ...]:
    """What `Config.weights` may be: "native", and what weights can be rounded to."""
    return ("native", *rounded())


def activation_bytes(name: str, columns: int) -> int:
    """Bytes of one row of `columns` activations as `rows` wants them."""
    return columns * 4 if named(name).is_native else columns // 32 * ACTIVATION_GROUP


def rows(fmt, isa, total, blob, at, groups, x, x_at):
    """total plus the block at byte `at` times `groups` groups of 32 activations; inside kernels only.

    total: float tile [tokens] of 16 rows. blob: uint8. x: a pointer per token to activations as
    `quantize` left them, of which the group at byte `x_at` is the first.
    """
    raise TypeError("rows runs only inside a kernel")


def quantize(fmt, source, at, rows, row_at, group):
    """Write source[at : at + 32] as activation group `group` of the row at byte `row_at` of `rows`.

    source: float32. rows: uint8. Native formats take float32, all others 40 bytes: 32 int8, their
    float32 scale, and 4 bytes by which the format takes back the offset of its codes.
    """
    raise TypeError("quantize runs only inside a kernel")


def pack_group(fmt, row, blob, at, lane, g, work):
    """Write row [32] float32 as group g of one lane of the block at byte `at` of `blob` uint8.

    work: [8] int64; work[1] counts groups that are not finite, or whose scale is not.
    """
    raise TypeError("pack_group runs only inside a kernel")


def unpack_group(fmt, row, blob, at, lane, g):
    """The inverse of `pack_group`: fills row [32] float32."""
    raise TypeError("unpack_group runs only inside a kernel")


@overload(rows, jit_options=INLINED)
def _choose_rows(fmt, isa, total, blob, at, groups, x, x_at):
    return FORMATS[fmt.value].rows


@overload(quantize, jit_options=INLINED)
def _choose_quantize(fmt, source, at, rows, row_at, group):
    return FORMATS[fmt.value].quantize


@overload(pack_group, jit_options=INLINED)
def _choose_pack(fmt, row, blob, at, lane, g, work):
    return FORMATS[fmt.value].pack or _leave


@overload(unpack_group, jit_options=INLINED)
def _choose_unpack(fmt, row, blob, at, lane, g):
    return FORMATS[fmt.value].unpack


def _leave(fmt, row, blob, at, lane, g, work):
    """What only files bring stays as it is."""


def _version(fmt: BlobFormat) -> str:
    """Empty for formats of this package, whose sources every kernel's cache is keyed on."""
    file = Path(inspect.getfile(fmt.rows))
    return "" if PACKAGE in file.parents else f"{zlib.crc32(repr(stamp_of(file)).encode()):08x}"


for _format in (FLOAT32, BFLOAT16, FLOAT16, INT8, INT4, Q4_K, Q5_K, Q6_K):
    register(_format)
