"""Broken and hostile GGUF files are typed errors, soon and in little memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrimoe
from gguf_corpus import ARCHITECTURE, CASES, HANG, U32, aligned, array, file, tensor, value
from gguf_corpus import number as u32
from hybrimoe.errors import CheckpointError
from hybrimoe.sources.gguf.header import GgufHeader
from hybrimoe.sources.gguf.parts import read_gguf


def test_the_corpus_is_large_enough():
    assert len(CASES) >= 26
    assert len(HANG) == 49


@pytest.mark.parametrize("name", CASES)
def test_it_is_refused_with_the_file_and_the_reason(name, tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(CASES[name][0]())

    with pytest.raises(CheckpointError, match=CASES[name][1]) as caught:
        hybrimoe.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert caught.value.path == str(path)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 1000


CODE = """
import json, resource, sys, time
from pathlib import Path
from hybrimoe.errors import CheckpointError
from hybrimoe.sources.gguf.header import GgufHeader
from hybrimoe.sources.gguf.parts import read_gguf

def used():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

limit = used() + (50 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
results, folder = {}, Path(sys.argv[1])
for path in sorted(folder.iterdir()):
    start = time.process_time()
    try:
        read_gguf(path, folder)
    except CheckpointError as error:
        results[path.name] = time.process_time() - start
print(json.dumps(results))
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="sizes are read from /proc")
def test_the_whole_corpus_is_refused_within_50_mb_and_a_second_each(tmp_path):
    for number, (make, _) in enumerate(CASES.values()):
        (tmp_path / f"{number:03d}.gguf").write_bytes(make())
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    assert done.returncode == 0, done.stderr[-2000:]
    seconds = json.loads(done.stdout.splitlines()[-1])
    assert len(seconds) == len(CASES)
    assert max(seconds.values()) < 1, seconds  # of the processor, so that a busy machine may wait


def test_links_out_of_the_folder_and_pipes_are_not_opened(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "canary.gguf").write_bytes(file()())
    os.symlink(tmp_path / "canary.gguf", folder / "link.gguf")
    os.mkfifo(folder / "pipe.gguf")

    for name, reason in (
        ("link.gguf", "outside of"),
        ("pipe.gguf", "not a regular file"),
        ("../canary.gguf", "outside of"),
        ("none.gguf", "cannot be read"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            hybrimoe.from_pretrained(folder, gguf_file=name)


# Sound ones pass.


def test_a_sound_header_is_read_whole(tmp_path):
    path = tmp_path / "model.gguf"
    values = [ARCHITECTURE, aligned(u32(64)), value(b"a", U32, u32(7)), array(0, 3, b"abc")]
    tensors = [tensor(b"one"), tensor(b"two", (32, 2), kind=8, offset=512)]
    path.write_bytes(file(values, tensors, body=640, alignment=64)())
    header = read_gguf(path, tmp_path)

    assert header.architecture == "qwen3moe"
    assert header.values["a"] == 7
    assert header.values["tokens"] == 3
    assert header.tensors["one"].shape == (4, 32)
    assert header.tensors["two"].type_name == "Q8_0"
    assert header.tensors["two"].nbytes == 2 * 34
    assert header.tensors["two"].offset - header.tensors["one"].offset == 512


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_any_damage_is_a_checkpoint_error_or_none(tmp_path_factory, data):
    sound = file([ARCHITECTURE, aligned(u32(32)), array(8, 2, bytes(16))], [tensor()])()
    folder = tmp_path_factory.getbasetemp()
    path = folder / "damaged.gguf"
    head = len(sound) - 512
    changes = data.draw(st.lists(st.tuples(st.integers(0, head - 1), st.integers(0, 255))))
    content = bytearray(sound)
    for at, byte in changes:
        content[at] = byte
    content = content[: data.draw(st.integers(0, len(content)))]
    path.write_bytes(content)

    header = sound_or_none(path, folder)
    if header is not None:
        assert all(t.offset + t.nbytes <= len(content) for t in header.tensors.values())


def sound_or_none(path: Path, folder: Path) -> GgufHeader | None:
    try:
        return read_gguf(path, folder)
    except CheckpointError:
        return None
