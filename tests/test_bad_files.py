"""Broken and hostile checkpoints are typed errors, soon, in little memory, with nothing run."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2MoeForCausalLM

import corpus
import hybrimoe
from hybrimoe.errors import CheckpointError, UnsupportedModelError
from hybrimoe.sources.safetensors import examine_files, examine_folder, read_header
from paths import TINY_MOE

needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="links and pipes of POSIX")


def make(name: str, root: Path) -> Path:
    folder = root / "checkpoint"
    folder.mkdir()
    shutil.copy(TINY_MOE / "config.json", folder)
    corpus.CASES[name][0](folder)
    return folder


def test_the_corpus_is_large_enough():
    assert len(corpus.CASES) >= 40


@needs_pipes
@pytest.mark.parametrize("name", corpus.CASES)
def test_it_is_refused_with_the_file_and_the_reason(name, tmp_path):
    folder = make(name, tmp_path)

    with pytest.raises(CheckpointError) as caught:
        hybrimoe.from_pretrained(folder)
    error = caught.value
    assert corpus.CASES[name][1] in str(error)
    assert str(tmp_path) in error.path
    assert error.reason in str(error)
    assert str(error).isprintable()
    assert len(str(error)) < 1500
    assert not (folder / "opened").exists()


THROUGH_TRANSFORMERS = [
    "tensors overlap", "name is a path", "tensor twice", "bytes left over", "shard links outside",
    "pickle", "metadata no strings", "tensor in two shards",
]  # fmt: skip


@needs_pipes
@pytest.mark.parametrize("name", THROUGH_TRANSFORMERS)
def test_the_door_of_transformers_checks_the_same_files(name, tmp_path):
    folder = make(name, tmp_path)

    with pytest.raises(CheckpointError):
        AutoModelForCausalLM.from_pretrained(folder, quantization_config=hybrimoe.Config())
    assert not (folder / "opened").exists()


@pytest.mark.parametrize("declared", [3, "fp8", [], True, math.nan])
def test_a_declaration_that_is_no_object_is_refused_in_every_door(declared, tmp_path):
    folder = edited_config(tmp_path, quantization_config=declared)
    settings = hybrimoe.Config(device="cpu")
    for door, how in (
        (hybrimoe.from_pretrained, {}),
        (hybrimoe.plan, {}),
        (AutoModelForCausalLM.from_pretrained, {"quantization_config": settings}),
        (Qwen2MoeForCausalLM.from_pretrained, {"quantization_config": settings}),
    ):
        with pytest.raises(UnsupportedModelError, match="quantization_config must be an object"):
            door(folder, **how)


@pytest.mark.parametrize("door", [hybrimoe.from_pretrained, hybrimoe.plan])
@pytest.mark.parametrize(
    "wrong",
    [{"num_experts": "a"}, {"hidden_size": 0}, {"hidden_act": "x"}, {"dtype": "x"}],
    ids=str,
)
def test_a_configuration_that_makes_no_sense_is_a_typed_error(wrong, door, tmp_path):
    with pytest.raises(UnsupportedModelError, match="transformers"):
        door(edited_config(tmp_path, **wrong))


def edited_config(folder: Path, **changes: object) -> Path:
    """The bundled checkpoint with other values in config.json."""
    made = Path(shutil.copytree(TINY_MOE, folder / "made"))
    config = json.loads((made / "config.json").read_text())
    (made / "config.json").write_text(json.dumps(config | changes))
    return made


def test_tables_beside_a_weight_are_no_sign_of_quantization(tmp_path):
    weights = load_file(TINY_MOE / "model.safetensors")
    weights["model.norm.num_batches_tracked"] = torch.tensor(3)
    weights["model.embed_tokens.mask"] = torch.ones(4, dtype=torch.bool)
    made = Path(shutil.copytree(TINY_MOE, tmp_path / "made"))
    save_file(weights, made / "model.safetensors", metadata={"format": "pt"})

    assert hybrimoe.from_pretrained(made, device="cpu").hybrimoe.layers


CODE = """
import json, resource, sys, time
from pathlib import Path
from hybrimoe.errors import CheckpointError
from hybrimoe.sources.safetensors import examine_folder

def used():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()

limit, worst = used() + (50 << 20), 0
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
results = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    start = time.process_time()
    try:
        examine_folder(folder / "checkpoint")
    except CheckpointError as error:
        results[folder.name] = time.process_time() - start
print(json.dumps(results))
"""


@needs_pipes
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="sizes are read from /proc")
def test_the_whole_corpus_is_refused_within_50_mb_and_a_second_each(tmp_path):
    for number, name in enumerate(corpus.CASES):
        root = tmp_path / f"{number:03d}"
        root.mkdir()
        make(name, root)
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    assert done.returncode == 0, done.stderr[-2000:]
    seconds = json.loads(done.stdout.splitlines()[-1])
    assert len(seconds) == len(corpus.CASES)
    assert max(seconds.values()) < 1, seconds  # of the processor, so that a busy machine may wait


# Sound ones pass.


def test_the_bundled_checkpoint_is_sound():
    found = examine_folder(TINY_MOE)

    assert len(found) == 1322
    last = max(found.values(), key=lambda tensor: tensor.offset)
    assert last.offset + last.nbytes == (TINY_MOE / "model.safetensors").stat().st_size


@needs_pipes
def test_links_into_the_blobs_of_the_hub_s_cache_are_sound(tmp_path):
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in TINY_MOE.glob("*.*"):
        shutil.copy(path, blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(f"../../blobs/hash-{path.name}")

    assert len(examine_folder(snapshot)) == 1322
    assert hybrimoe.from_pretrained(snapshot).hybrimoe.layers
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(TINY_MOE / "model.safetensors")
    with pytest.raises(CheckpointError, match="outside of"):
        hybrimoe.from_pretrained(snapshot)


@needs_pipes
def test_a_folder_reached_by_a_link_is_sound(tmp_path):
    (tmp_path / "link").symlink_to(TINY_MOE)

    assert len(examine_folder(tmp_path / "link")) == 1322


def test_a_variant_has_names_of_its_own(tmp_path):
    content = corpus.pack({"a.weight": corpus.tensor()})
    (tmp_path / "model.fp16.safetensors").write_bytes(content)
    index = {"metadata": {}, "weight_map": {"a.weight": "model.fp16.safetensors"}}
    (tmp_path / "model.safetensors.index.bf16.json").write_text(json.dumps(index))

    assert list(examine_folder(tmp_path, "fp16")) == ["a.weight"]
    assert list(examine_folder(tmp_path, "bf16")) == ["a.weight"]
    with pytest.raises(CheckpointError, match="neither"):
        examine_folder(tmp_path)


def test_pickles_beside_safetensors_are_left_alone(tmp_path):
    corpus.pickles("pytorch_model.bin")(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(corpus.pack({"a.weight": corpus.tensor()}))

    assert list(examine_folder(tmp_path)) == ["a.weight"]


def test_pickles_asked_for_by_name_are_refused():
    with pytest.raises(CheckpointError, match="pickle files can run code"):
        hybrimoe.from_pretrained(TINY_MOE, use_safetensors=False)


def test_padding_of_the_header_and_empty_tensors_are_sound(tmp_path):
    header = {"a": corpus.tensor(0, 0, (0, 4)), "b": corpus.tensor(0, 16)}
    text = json.dumps(header).encode() + b" " * 37
    (tmp_path / "model.safetensors").write_bytes(corpus.pack(text))

    assert {name: tensor.shape for name, tensor in examine_folder(tmp_path).items()} == {
        "a": (0, 4),
        "b": (2, 4),
    }


@given(at=st.integers(0, 200), byte=st.integers(0, 255), size=st.integers(0, 220))
@settings(max_examples=150, deadline=None)
def test_any_flipped_byte_or_cut_is_found_or_harmless(tmp_path_factory, at, byte, size):
    """What passes is a header whose tensors exactly fill the file."""
    whole = corpus.pack(corpus.TWO, bytes(32))
    spoiled = bytearray(whole)
    spoiled[at % len(whole)] = byte
    path = tmp_path_factory.mktemp("flip") / "model.safetensors"
    path.write_bytes(spoiled[:size] if size < len(whole) else spoiled)
    try:
        found = read_header(path)
    except CheckpointError:
        return
    assert sum(tensor.nbytes for tensor in found.values()) == 32
    assert path.stat().st_size == len(whole)


def test_files_of_one_checkpoint_must_lie_in_its_folder(tmp_path):
    with pytest.raises(CheckpointError, match="outside of"):
        examine_files([TINY_MOE / "model.safetensors"], tmp_path)
