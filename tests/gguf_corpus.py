"""GGUF files that are broken, each in one way; the classes of llama.cpp's own tests are among them."""

import struct
from collections.abc import Callable
from typing import Any

Case = tuple[Callable[[], bytes], str]
"""What makes a file, and a part of the message that refuses it."""
U8, U32, BOOL, STRING, ARRAY, U64 = 0, 4, 7, 8, 9, 10
F32, Q8_0, Q4_K = 0, 8, 12


def string(text: bytes, length: int | None = None) -> bytes:
    """A string; `length` is what it claims to be long."""
    return struct.pack("<Q", len(text) if length is None else length) + text


def value(key: bytes, kind: int, content: bytes, length: int | None = None) -> bytes:
    return string(key, length) + struct.pack("<I", kind) + content


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return value(b"tokens", ARRAY, struct.pack("<IQ", kind, count) + content)


def tensor(
    name: bytes = b"blk.0.ffn_up_exps.weight",
    shape: tuple[int, ...] = (32, 4),
    kind: int = F32,
    offset: int = 0,
    length: int | None = None,
    dimensions: int | None = None,
) -> bytes:
    count = len(shape) if dimensions is None else dimensions
    sizes = struct.pack(f"<{len(shape)}Q", *shape)
    return (
        string(name, length) + struct.pack("<I", count) + sizes + struct.pack("<IQ", kind, offset)
    )


ARCHITECTURE = value(b"general.architecture", STRING, string(b"qwen3moe"))


def file(
    values: Any = (ARCHITECTURE,),
    tensors: Any = (),
    magic: bytes = b"GGUF",
    version: int = 3,
    value_count: int | None = None,
    tensor_count: int | None = None,
    body: int = 512,
    alignment: int = 32,
) -> Callable[[], bytes]:
    """A file that is sound but for what is given."""

    def make() -> bytes:
        counts = (
            len(tensors) if tensor_count is None else tensor_count,
            len(values) if value_count is None else value_count,
        )
        head = magic + struct.pack("<IQQ", version, *counts) + b"".join((*values, *tensors))
        return head + bytes(-len(head) % alignment) + bytes(body)

    return make


def aligned(content: bytes, kind: int = U32) -> bytes:
    return value(b"general.alignment", kind, content)


def number(text: int) -> bytes:
    return struct.pack("<I", text)


LONG = 1 << 40
HANG = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + value(b"a", ARRAY, struct.pack("<IQ", U8, 1 << 40))
"""What the published reader loops over for hours, of 49 bytes."""

CASES: dict[str, Case] = {
    "empty": (lambda: b"", "too short"),
    "half a header": (lambda: file()()[:20], "too short"),
    "magic": (file(magic=b"GGML"), "must start with b'GGUF'"),
    "magic swapped": (file(magic=b"FUGG"), "must start with"),
    "safetensors": (lambda: struct.pack("<Q", 64) + b"{" * 64, "must start with"),
    "version 0": (file(version=0), "version 2 or 3, got 0"),
    "version 1": (file(version=1), "version 2 or 3, got 1"),
    "version of the future": (file(version=4), "version 2 or 3, got 4"),
    "big-endian": (file(version=3 << 24), "big-endian"),
    "tensor count": (file(tensor_count=(1 << 64) - 1), "tensors, more than"),
    "value count": (file(value_count=1 << 62), "values, more than"),
    "values missing": (file(value_count=9), "empty or unprintable key"),
    "tensors missing": (file(tensor_count=2), "1 to 4 dimensions|no name of a parameter"),
    "cut off in a key": (lambda: file()()[:40], "ends inside a key"),
    "cut off in a value": (lambda: file()()[:60], "ends inside the value"),
    "key too long": (file([value(b"a", U8, b"\0", length=LONG)]), "gives a key a length"),
    "key empty": (file([value(b"", U8, b"\0"), ARCHITECTURE]), "empty or unprintable key"),
    "key not UTF-8": (file([value(b"\xff", U8, b"\0")]), "no valid UTF-8"),
    "key twice": (file([ARCHITECTURE, ARCHITECTURE]), "twice"),
    "value type": (file([value(b"a", 13, b"\0")]), "unknown type 13"),
    "value type huge": (file([value(b"a", (1 << 32) - 1, b"\0")]), "unknown type"),
    "bool of 2": (file([value(b"a", BOOL, b"\2")]), "must have 0 or 1"),
    "string too long": (file([value(b"a", STRING, string(b"x", LONG))]), "a length of"),
    "string of 2 MB": (file([value(b"a", STRING, string(bytes(2 << 20)))]), "at most 1048576"),
    "string past the end": (
        file([value(b"a", STRING, string(b"x", 5000))]),
        "ends inside the value of 'a'",
    ),
    "string not UTF-8": (file([value(b"a", STRING, string(b"\xc3"))]), "no valid UTF-8"),
    "array count": (file([array(U8, 1 << 63)]), "claims 9223372036854775808 elements"),
    "array that hangs": (lambda: HANG, "claims 1099511627776 elements"),
    "array of strings that hangs": (file([array(STRING, 1 << 32)]), "claims 4294967296 elements"),
    "array of too many": (
        file([array(U8, 5 << 20, bytes(5 << 20))]),
        "claims 5242880 elements",
    ),
    "array type": (file([array(77, 1, b"\0")]), "elements of type 77"),
    "array of arrays": (file([array(ARRAY, 1, bytes(12))]), "arrays must not hold"),
    "string in an array": (file([array(STRING, 1, string(b"", LONG))]), "a length of"),
    "alignment 0": (file([ARCHITECTURE, aligned(number(0))]), "power of two"),
    "alignment 3": (file([ARCHITECTURE, aligned(number(3))]), "power of two"),
    "alignment huge": (file([ARCHITECTURE, aligned(number(1 << 31))]), "power of two"),
    "alignment a string": (file([aligned(string(b"32"), STRING)]), "power of two"),
    "alignment another": (
        file([ARCHITECTURE, aligned(number(64))], [tensor(offset=32)]),
        "multiple of 64, got 32",
    ),
    "architecture missing": (file([]), "must name its general.architecture"),
    "architecture a number": (
        file([value(b"general.architecture", U32, number(7))]),
        "must name its general.architecture, got '7'",
    ),
    "split": (
        file([ARCHITECTURE, value(b"split.count", 2, b"\3\0")]),
        "one of 3 files",
    ),
    "name too long": (file(tensors=[tensor(b"a" * 65)]), "at most 64"),
    "name length": (file(tensors=[tensor(length=LONG)]), "a length of"),
    "name a path": (file(tensors=[tensor(b"../../etc/passwd")]), "no name of a parameter"),
    "name empty": (file(tensors=[tensor(b"")]), "no name of a parameter"),
    "name twice": (file(tensors=[tensor(shape=(1,)), tensor(shape=(1,), offset=32)]), "twice"),
    "dimensions 0": (file(tensors=[tensor(shape=())]), "1 to 4 dimensions, got 0"),
    "dimensions 5": (file(tensors=[tensor(shape=(1,) * 5)]), "1 to 4 dimensions, got 5"),
    "dimensions huge": (file(tensors=[tensor(dimensions=(1 << 32) - 1)]), "1 to 4 dimensions"),
    "dimension 0": (file(tensors=[tensor(shape=(32, 0))]), "no valid shape"),
    "dimension negative": (file(tensors=[tensor(shape=(32, (1 << 64) - 1))]), "no valid shape"),
    "elements overflow": (file(tensors=[tensor(shape=(1 << 40, 1 << 40))]), "no valid shape"),
    "bytes too many": (file(tensors=[tensor(shape=(1 << 61,))]), "the file is cut off"),
    "type": (file(tensors=[tensor(kind=99)]), "unknown type 99"),
    "type that is gone": (file(tensors=[tensor(kind=4)]), "unknown type 4"),
    "rows of 31 in Q8_0": (file(tensors=[tensor(shape=(31,), kind=Q8_0)]), "multiple of 32"),
    "rows of 32 in Q4_K": (file(tensors=[tensor(kind=Q4_K)]), "multiple of 256"),
    "offset not aligned": (file(tensors=[tensor(offset=4)]), "multiple of 32, got 4"),
    "offset outside": (file(tensors=[tensor(offset=1 << 50)]), "the file is cut off"),
    "offset overflows": (file(tensors=[tensor(offset=(1 << 64) - 32)]), "the file is cut off"),
    "tensors overlap": (
        file(tensors=[tensor(), tensor(b"b", offset=32)], body=1024),
        "overlaps",
    ),
    "data cut off": (file(tensors=[tensor()], body=500), "the file is cut off"),
    "no data": (file(tensors=[tensor()], body=0), "the file is cut off"),
}
