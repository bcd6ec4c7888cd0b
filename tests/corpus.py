"""Checkpoints that are broken, each in one way, for the checks that stand before every loader."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from paths import TINY_MOE

Case = tuple[Callable[[Path], object], str]
"""What makes a folder, and a part of the message that refuses it."""
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def tensor(begin: int = 0, end: int = 16, shape: Any = (2, 4), dtype: Any = "BF16") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pack(header: Any, body: bytes = bytes(16), length: int | None = None) -> bytes:
    """A safetensors file; `length` is what it claims its header to be long."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def single(content: bytes) -> Callable[[Path], object]:
    """A folder with one file of weights."""
    return lambda folder: (folder / SINGLE).write_bytes(content)


def header(value: Any, body: bytes = bytes(16)) -> Callable[[Path], object]:
    return single(pack(value, body))


def entry(**changes: Any) -> Callable[[Path], object]:
    """One tensor that is sound but for `changes`."""
    return header({"a.weight": tensor() | changes})


def index(placed: Any, *names: str) -> Callable[[Path], object]:
    """An index and, for each name, a sound file that holds the tensor `a.weight`."""

    def make(folder: Path) -> None:
        content = {"metadata": {}, "weight_map": placed}
        text = placed if isinstance(placed, str) else json.dumps(content)
        (folder / INDEX).write_text(text)
        for name in names:
            (folder / name).write_bytes(pack({"a.weight": tensor()}))

    return make


def outside(folder: Path) -> Path:
    """A sound file next to the folder, which no check may open."""
    path = folder.parent / "canary.safetensors"
    path.write_bytes(pack({"a.weight": tensor()}))
    return path


def named(name: Callable[[Path], str] | str) -> Callable[[Path], object]:
    """An index that names a file that exists, but not here."""

    def make(folder: Path) -> None:
        path = outside(folder)
        index({"a.weight": name if isinstance(name, str) else name(path)})(folder)

    return make


def linked(make_target: Callable[[Path], object]) -> Callable[[Path], object]:
    """An index whose file is a link."""

    def make(folder: Path) -> None:
        index({"a.weight": "a.safetensors"})(folder)
        (folder / "a.safetensors").symlink_to(str(make_target(folder)))

    return make


def linked_folder(folder: Path) -> None:
    (folder / "sub").symlink_to(folder.parent)
    outside(folder)
    index({"a.weight": "sub/canary.safetensors"})(folder)


def cut_copy(size: int) -> Callable[[Path], object]:
    """The bundled checkpoint, cut off."""

    def make(folder: Path) -> None:
        shutil.copy(TINY_MOE / SINGLE, folder)
        os.truncate(folder / SINGLE, size)

    return make


def pickles(*names: str) -> Callable[[Path], object]:
    """Files whose opening by pickle would create a file called `opened`."""

    def make(folder: Path) -> None:
        code = f"cposix\nsystem\n(S'touch {folder / 'opened'}'\ntR.".encode()
        for name in names:
            (folder / name).write_bytes(code)

    return make


def both(first: Callable[[Path], object], second: Callable[[Path], object]):
    return lambda folder: (first(folder), second(folder))


DEEP = b'{"a":' * 100_000
TWO = {"a.weight": tensor(0, 16), "b.weight": tensor(16, 32)}
CASES: dict[str, Case] = {
    # Where the files are.
    "index with ..": (named("../canary.safetensors"), "outside of its folder"),
    "index with .. inside": (named("x/../../canary.safetensors"), "outside of its folder"),
    "index with absolute": (named(str), "outside of its folder"),
    "index with drive": (named("C:\\canary.safetensors"), "outside of its folder"),
    "index with share": (named("\\\\host\\share\\a.safetensors"), "outside of its folder"),
    "index with backslash": (named("..\\canary.safetensors"), "outside of its folder"),
    "index with NUL": (named("a\0.safetensors"), "no file name"),
    "index with empty name": (named(""), "no file name"),
    "index with device": (named("/dev/zero"), "outside of its folder"),
    "index with pickle": (index({"a.weight": "a.bin"}), "pickle files can run code"),
    "index with text": (index({"a.weight": "a.txt"}), "not a .safetensors file"),
    "index with number": (index({"a.weight": 3}), "no file name"),
    "index with list": (index({"a.weight": ["a.safetensors"]}), "no file name"),
    "index without map": (index('{"metadata": {}}'), "weight_map"),
    "index without metadata": (index('{"weight_map": {"a": "a.safetensors"}}'), "metadata"),
    "index with empty map": (index({}), "weight_map"),
    "index is a list": (index("[1]"), "JSON object"),
    "index is cut": (index('{"weight_map": {"a.weight": "a.sa'), "no valid JSON"),
    "index is empty": (index(""), "no valid JSON"),
    "index is deep": (index(DEEP.decode()), "no valid JSON"),
    "index is not UTF-8": (lambda f: (f / INDEX).write_bytes(b'{"\xff": 1}'), "no valid JSON"),
    "index names a tensor twice": (
        index('{"weight_map": {"a.weight": "a.safetensors", "a.weight": "b.safetensors"}}'),
        "appears twice",
    ),
    "index names a path as tensor": (index({"../a": "a.safetensors"}), "no name of a parameter"),
    "index is a pipe": (lambda f: os.mkfifo(f / INDEX), "not a regular file"),
    "index is a folder": (lambda f: (f / INDEX).mkdir(), "not a regular file"),
    "index is a dangling link": (lambda f: (f / INDEX).symlink_to("gone"), "cannot be read"),
    "shard missing": (
        index({"a.weight": "a.safetensors", "b.weight": "b.safetensors"}, "a.safetensors"),
        "download complete",
    ),
    "tensor not in its shard": (
        index({"a.weight": "a.safetensors", "b.weight": "a.safetensors"}, "a.safetensors"),
        "is not in a.safetensors",
    ),
    "tensor in another shard": (
        both(
            index({"a.weight": "b.safetensors", "b.weight": "b.safetensors"}, "a.safetensors"),
            lambda f: (f / "b.safetensors").write_bytes(pack({"b.weight": tensor()})),
        ),
        "is not in b.safetensors",
    ),
    "tensor in two shards": (
        index(
            {"a.weight": "a.safetensors", "b": "b.safetensors"}, "a.safetensors", "b.safetensors"
        ),
        "is in a.safetensors as well",
    ),
    "shard is a pipe": (
        both(index({"a.weight": "a.safetensors"}), lambda f: os.mkfifo(f / "a.safetensors")),
        "not a regular file",
    ),
    "shard is a folder": (
        both(index({"a.weight": "a.safetensors"}), lambda f: (f / "a.safetensors").mkdir()),
        "not a regular file",
    ),
    "shard links outside": (linked(outside), "outside of"),
    "shard links to a device": (linked(lambda _: "/dev/zero"), "outside of"),
    "shard links to itself": (linked(lambda f: f / "a.safetensors"), "cannot be read"),
    "shard links nowhere": (linked(lambda f: f / "gone"), "cannot be read"),
    "shard in a linked folder": (linked_folder, "outside of"),
    "weights link outside": (lambda f: (f / SINGLE).symlink_to(outside(f)), "outside of"),
    "weights are a pipe": (lambda f: os.mkfifo(f / SINGLE), "not a regular file"),
    "no weights": (lambda _: None, "has neither"),
    "pickle": (pickles("pytorch_model.bin"), "safetensors/convert"),
    "sharded pickle": (pickles("pytorch_model-00001-of-00002.bin"), "safetensors/convert"),
    "old pickles": (pickles("model.pt", "model.pth", "model.ckpt"), "safetensors/convert"),
    # What is in them.
    "empty file": (single(b""), "too short"),
    "seven bytes": (single(bytes(7)), "too short"),
    "no header": (single(bytes(8)), "no valid JSON"),
    "header longer than the file": (single(pack({}, b"", 1000)), "cut off inside its header"),
    "header of 2**63 bytes": (single(pack({}, b"", 1 << 63)), "claims a header of"),
    "header of 100 MB": (single(pack({}, b"", 100_000_000)), "claims a header of"),
    "header cut by one": (single(pack({"a.weight": tensor()}, length=60)), "no valid JSON"),
    "header is a list": (header([]), "JSON object"),
    "header is no JSON": (header(b"\x80\x04torch"), "no valid JSON"),
    "header is deep": (header(DEEP), "no valid JSON"),
    "header not UTF-8": (header(b'{"\xff\xfe": 1}'), "no valid JSON"),
    "number without end": (header(b'{"a": ' + b"9" * 5000 + b"}"), "no valid JSON"),
    "tensor twice": (
        header(b'{"a":%b,"a":%b}' % ((json.dumps(tensor()).encode(),) * 2)),
        "appears twice",
    ),
    "offsets twice": (
        header(b'{"a":{"dtype":"BF16","shape":[8],"data_offsets":[0,16],"shape":[8]}}'),
        "appears twice",
    ),
    "metadata no strings": (header({"__metadata__": {"a": 1}, "b": tensor()}), "__metadata__"),
    "metadata a list": (header({"__metadata__": [], "b": tensor()}), "__metadata__"),
    "entry no object": (header({"a": 3}), "needs dtype"),
    "entry without shape": (header({"a": {"dtype": "BF16"}}), "needs dtype"),
    "entry with more": (entry(more=1), "needs dtype"),
    "unknown dtype": (entry(dtype="BF17"), "unknown dtype"),
    "dtype no string": (entry(dtype=["BF16"]), "unknown dtype"),
    "negative shape": (entry(shape=[-2, -4]), "no valid shape"),
    "fraction as shape": (entry(shape=[2.0, 4]), "no valid shape"),
    "truth as shape": (entry(shape=[True, 8]), "no valid shape"),
    "text as shape": (entry(shape="24"), "no valid shape"),
    "shape that overflows": (entry(shape=[1 << 62, 4]), "takes"),
    "shape beyond 64 bits": (entry(shape=[1 << 64, 4]), "no valid shape"),
    "too many dimensions": (entry(shape=[1] * 1000), "no valid shape"),
    "shape too large": (entry(shape=[2, 5]), "takes 20 bytes"),
    "shape too small": (entry(shape=[2, 3]), "takes 12 bytes"),
    "negative offset": (entry(data_offsets=[-16, 0]), "no valid data_offsets"),
    "offsets backwards": (entry(data_offsets=[16, 0]), "no valid data_offsets"),
    "one offset": (entry(data_offsets=[16]), "no valid data_offsets"),
    "three offsets": (entry(data_offsets=[0, 16, 32]), "no valid data_offsets"),
    "offset null": (entry(data_offsets=[0, None]), "no valid data_offsets"),
    "offset beyond the end": (entry(data_offsets=[16, 32]), "cut off"),
    "tensors overlap": (
        header({"a": tensor(0, 16), "b": tensor(8, 24)}, bytes(24)),
        "overlaps the one before",
    ),
    "same bytes twice": (header({"a": tensor(), "b": tensor()}), "overlaps the one before"),
    "hole at the start": (header({"a": tensor(8, 24)}, bytes(24)), "leaves a hole"),
    "hole in between": (
        header({"a": tensor(0, 16), "b": tensor(24, 40)}, bytes(40)),
        "leaves a hole",
    ),
    "bytes left over": (header(TWO, bytes(33)), "belong to no tensor"),
    "no tensors but bytes": (header({}), "belong to no tensor"),
    "cut by one byte": (header(TWO, bytes(31)), "cut off"),
    "cut to the header": (header(TWO, b""), "cut off"),
    "bundled, cut by half": (cut_copy(16 << 20), "cut off"),
    "bundled, cut in the header": (cut_copy(1000), "cut off inside its header"),
    "name is a path": (header({"../../etc/passwd": tensor()}), "no name of a parameter"),
    "name is absolute": (header({"/etc/passwd": tensor()}), "no name of a parameter"),
    "name with backslash": (header({"..\\a": tensor()}), "no name of a parameter"),
    "name with NUL": (header({"a\0b": tensor()}), "no name of a parameter"),
    "name with newline": (header({"a\nb": tensor()}), "no name of a parameter"),
    "name with escape": (header({"a\x1b[2J": tensor()}), "no name of a parameter"),
    "name empty": (header({"": tensor()}), "no name of a parameter"),
    "name too long": (header({"a" * 5000: tensor()}), "no name of a parameter"),
}
