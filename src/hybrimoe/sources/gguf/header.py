"""What a GGUF file really holds, checked before any other parser opens it.

A file is input from strangers, and the published reader trusts it: counts that no file can hold make
it loop for hours. Everything here is read with bounds; what breaks one is a CheckpointError that
names the file, the key or tensor, the rule and the value.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from hybrimoe.errors import CheckpointError
from hybrimoe.sources.safetensors import check_file, check_tensor_name

LARGEST_HEADER = 256 << 20
LARGEST_STRING = 1 << 20
LONGEST_NAME = 64
"""Bytes of a tensor's name, by the format."""
MOST_VALUES = 1 << 22
"""Elements of all arrays together: the largest vocabularies take a tenth. Readers loop over them."""
MOST_NUMBERS = 4096
"""Numbers of an array that are kept: one per layer, but no vocabulary."""
MOST_DIMENSIONS = 4
LARGEST_ALIGNMENT = 1 << 16
STRING, ARRAY = 8, 9
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "B",
    10: "Q",
    11: "q",
    12: "d",
}
"""struct codes of the value types; 7 is bool."""
BLOCKS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Tensor types: their name, numbers per block, bytes per block."""


class GgufTensor(NamedTuple):
    """Where one tensor lies. kind: its ggml type; shape: rows first, as numpy has it."""

    kind: int
    shape: tuple[int, ...]
    offset: int  # from the start of the file
    nbytes: int
    path: Path

    @property
    def type_name(self) -> str:
        """Its type as ggml calls it."""
        return BLOCKS[self.kind][0]


class GgufHeader(NamedTuple):
    """Scalars and strings of the metadata, arrays as `ArrayLength`, and all tensors.

    path: the file that was named. paths: all files of the model, in their order.
    """

    path: Path
    values: dict[str, Any]
    tensors: dict[str, GgufTensor]
    paths: tuple[Path, ...]

    @property
    def architecture(self) -> str:
        """What kind of model it is, in the words of llama.cpp."""
        return str(self.values["general.architecture"])


def read_file(path: Path, folder: Path) -> GgufHeader:
    """The header of one file that really lies in `folder`; raises CheckpointError if unsound."""
    size = check_file(path, folder)
    with path.open("rb") as file:
        cursor = _Cursor(file, path, size)
        tensor_count, value_count = _read_counts(cursor)
        values = _read_values(cursor, value_count)
        placed = [_read_tensor(cursor) for _ in range(tensor_count)]
        tensors = _place(placed, cursor, _alignment(values, path))
    return GgufHeader(path, values, tensors, (path,))


class _Cursor:
    """Reads a header from front to back and never past the file's end."""

    def __init__(self, file: BinaryIO, path: Path, size: int) -> None:
        self.file, self.path, self.size, self.at = file, path, size, 0
        self.values_left = MOST_VALUES

    @property
    def left(self) -> int:
        """Bytes that may still be read."""
        return min(self.size, LARGEST_HEADER) - self.at

    def take(self, count: int, what: str) -> bytes:
        """The next bytes."""
        if count > self.left:
            raise CheckpointError(
                f"ends inside {what}: {count} bytes wanted at byte {self.at}, {max(self.left, 0)} "
                "are left; the file is cut off or damaged",
                self.path,
            )
        data = self.file.read(count)
        if len(data) < count:
            raise CheckpointError(f"ended early inside {what}: it has become shorter", self.path)
        self.at += count
        return data

    def number(self, code: str, what: str) -> Any:
        """One little-endian number of a struct code."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}"), what))[0]

    def string(self, what: str, largest: int = LARGEST_STRING) -> bytes:
        """A string behind its length."""
        length = self.number("Q", what)
        if length > largest:
            raise CheckpointError(
                f"gives {what} a length of {length} bytes, at most {largest} are read", self.path
            )
        return self.take(length, what)

    def text(self, what: str, largest: int = LARGEST_STRING) -> str:
        """A string that must be UTF-8."""
        try:
            return self.string(what, largest).decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"holds no valid UTF-8 in {what}", self.path) from error

    def skip(self, count: int, what: str) -> None:
        """Pass over bytes that are there."""
        while count:
            count -= len(self.take(min(count, 1 << 20), what))


def _read_counts(cursor: _Cursor) -> tuple[int, int]:
    path = cursor.path
    if cursor.size < 24:
        raise CheckpointError(f"is {cursor.size} bytes long, too short for GGUF", path)
    magic = cursor.take(4, "the magic number")
    if magic != b"GGUF":
        raise CheckpointError(f"must start with b'GGUF', got {magic!r}: it is no GGUF file", path)
    version = cursor.number("I", "the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        why = ", a big-endian file" if swapped in (2, 3) else ""
        raise CheckpointError(f"must have GGUF version 2 or 3, got {version}{why}", path)
    tensors, values = cursor.number("Q", "counts"), cursor.number("Q", "counts")
    # The least that one takes: a key of one byte and a bool; a name of one byte and one dimension.
    for count, least, what in ((values, 14, "values"), (tensors, 33, "tensors")):
        if count * least > cursor.left:
            raise CheckpointError(
                f"claims {count} {what}, more than its {cursor.size} bytes can hold", path
            )
    return tensors, values


def _read_values(cursor: _Cursor, count: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for _ in range(count):
        key = cursor.text("a key", 65535)
        if not key or not key.isprintable():
            raise CheckpointError(f"has an empty or unprintable key: {key[:80]!r}", cursor.path)
        if key in values:
            raise CheckpointError(f"has the key {key[:80]!r} twice", cursor.path)
        values[key] = _read_value(cursor, key[:80])
    return values


def _read_value(cursor: _Cursor, key: str) -> Any:
    kind, what = cursor.number("I", f"the type of {key!r}"), f"the value of {key!r}"
    if kind in SCALARS:
        value = cursor.number(SCALARS[kind], what)
        if kind == 7 and value > 1:
            raise CheckpointError(f"must have 0 or 1 as {what}, got {value}", cursor.path)
        return value
    if kind == STRING:
        return cursor.text(what)
    if kind == ARRAY:
        return _read_array(cursor, what)
    raise CheckpointError(f"gives {key!r} the unknown type {kind}", cursor.path)


class ArrayLength(int):
    """Stands for an array. numbers: what is in it; empty for strings and for long ones."""

    numbers: tuple[Any, ...] = ()

    def __str__(self) -> str:
        inside = ", ".join(map(str, self.numbers[:4])) or f"{int(self)} values"
        return f"[{inside}{', ...' if len(self.numbers) > 4 else ''}]"


def _read_array(cursor: _Cursor, what: str) -> ArrayLength:
    kind, count = cursor.number("I", what), cursor.number("Q", what)
    if kind not in SCALARS and kind != STRING:
        nested = "an array, which arrays must not hold" if kind == ARRAY else "unknown"
        raise CheckpointError(f"has in {what} elements of type {kind}, {nested}", cursor.path)
    each = 8 if kind == STRING else struct.calcsize(f"<{SCALARS[kind]}")
    if count > cursor.values_left or count * each > cursor.left:
        raise CheckpointError(
            f"claims {count} elements in {what}, more than its {cursor.size} bytes or the "
            f"{cursor.values_left} that are read can hold",
            cursor.path,
        )
    cursor.values_left -= count
    array = ArrayLength(count)
    if kind == STRING:
        for _ in range(count):
            cursor.string(what)
    elif count <= MOST_NUMBERS:
        array.numbers = struct.unpack(f"<{count}{SCALARS[kind]}", cursor.take(count * each, what))
    else:
        cursor.skip(count * each, what)
    return array


def _read_tensor(cursor: _Cursor) -> tuple[str, int, tuple[int, ...], int]:
    """Name, type, shape and offset within the data."""
    path = cursor.path
    name = cursor.text("a tensor's name", LONGEST_NAME)
    check_tensor_name(name, path)
    count = cursor.number("I", f"the dimensions of {name!r}")
    if not 1 <= count <= MOST_DIMENSIONS:
        raise CheckpointError(
            f"must have 1 to {MOST_DIMENSIONS} dimensions, got {count}", path, name
        )
    shape = tuple(cursor.number("Q", f"the dimensions of {name!r}") for _ in range(count))[::-1]
    kind, offset = cursor.number("I", f"the type of {name!r}"), cursor.number("Q", "an offset")
    if kind not in BLOCKS:
        raise CheckpointError(f"has the unknown type {kind}", path, name)
    if not all(0 < size < 1 << 63 for size in shape) or math.prod(shape) >= 1 << 63:
        raise CheckpointError(f"has no valid shape: {shape}", path, name)
    type_name, numbers, _ = BLOCKS[kind]
    if shape[-1] % numbers:
        raise CheckpointError(
            f"has rows of {shape[-1]} numbers, {type_name} needs a multiple of {numbers}",
            path,
            name,
        )
    return name, kind, shape, offset


def _alignment(values: dict[str, Any], path: Path) -> int:
    alignment = values.get("general.alignment", 32)
    good = isinstance(alignment, int) and not isinstance(alignment, ArrayLength)
    if not good or not 0 < alignment <= LARGEST_ALIGNMENT or alignment & (alignment - 1):
        raise CheckpointError(
            f"must have a power of two up to {LARGEST_ALIGNMENT} as general.alignment, got "
            f"{str(alignment)[:40]!r}",
            path,
        )
    return int(alignment)


def _place(
    placed: list[tuple[str, int, tuple[int, ...], int]], cursor: _Cursor, alignment: int
) -> dict[str, GgufTensor]:
    """All tensors by name, which must lie in the file, aligned, and share no byte."""
    path, start = cursor.path, -(-cursor.at // alignment) * alignment
    tensors: dict[str, GgufTensor] = {}
    for name, kind, shape, offset in placed:
        _, numbers, block = BLOCKS[kind]
        nbytes = math.prod(shape) // numbers * block
        if name in tensors:
            raise CheckpointError("appears twice", path, name)
        if offset % alignment:
            raise CheckpointError(
                f"must start at a multiple of {alignment}, got {offset}", path, name
            )
        if start + offset + nbytes > cursor.size:
            raise CheckpointError(
                f"ends at byte {start + offset + nbytes}, the file at {cursor.size}: the file is "
                "cut off; download it again",
                path,
                name,
            )
        tensors[name] = GgufTensor(kind, shape, start + offset, nbytes, path)
    end = start
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise CheckpointError("overlaps the one before it", path, name)
        end = tensor.offset + tensor.nbytes
    return tensors
