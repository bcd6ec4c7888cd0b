"""What save_packed writes loads as it was, and nothing in between can be half of it."""

import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM
from transformers.utils import logging

import families
import hybrimoe
from hybrimoe.config import Config
from hybrimoe.errors import (
    CheckpointError,
    ConfigError,
    StorageError,
    UnsupportedModelError,
    WrappedModelError,
)
from hybrimoe.formats.layout import expert_layout
from hybrimoe.models import weights as formats
from hybrimoe.models.weights import ExpertWeights
from hybrimoe.modules.pooled_experts import PooledExperts
from hybrimoe.runtime.pages import allocate_blobs
from hybrimoe.sources.packed import blobs as packed_blobs
from hybrimoe.sources.packed import files as packed_files
from hybrimoe.sources.packed import manifest as packed_manifest
from hybrimoe.sources.packed import source as packed_source
from paths import TINY_MOE
from test_loading import assert_same_pool, edit, generate
from test_quantized_models import with_packed_attention

LOSSY = "ignore:the experts were stored as"


@pytest.fixture(scope="module")
def loaded():
    return hybrimoe.from_pretrained(TINY_MOE, weights="int4")


@pytest.fixture(scope="module")
def saved_once(loaded, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    hybrimoe.save_packed(loaded, folder)
    return folder


@pytest.fixture
def saved(saved_once, tmp_path) -> Path:
    """A packed folder that a test may spoil."""
    return Path(shutil.copytree(saved_once, tmp_path / "saved"))


def part(folder: Path) -> Path:
    """The folder that the manifest names."""
    return folder / json.loads((folder / "hybrimoe.json").read_text())["folder"]


# There and back.


@pytest.mark.parametrize("weights", ["native", "int8", "int4"])
def test_a_saved_model_loads_with_the_same_blobs_and_tokens(weights, tmp_path, tokenizer):
    first = hybrimoe.from_pretrained(TINY_MOE, weights=weights)
    hybrimoe.save_packed(first, tmp_path / "new" / "folder")
    second = hybrimoe.from_pretrained(tmp_path / "new" / "folder")

    assert_same_pool(second, first)
    assert generate(second, tokenizer) == generate(first, tokenizer)
    assert second.hybrimoe.config == Config(weights=weights)
    wanted = dict(first.named_parameters())
    for name, parameter in second.named_parameters():
        assert torch.equal(parameter, wanted[name])
    assert second.lm_head.weight is second.model.embed_tokens.weight


def test_saving_and_reading_show_how_far_they_are(loaded, tmp_path, capsys):
    logging.enable_progress_bar()
    try:
        hybrimoe.save_packed(loaded, tmp_path)
        hybrimoe.from_pretrained(tmp_path)
    finally:
        logging.disable_progress_bar()
    err = capsys.readouterr().err

    assert "Writing experts: 100%" in err
    assert "Reading experts: 100%" in err


def test_the_second_load_packs_nothing(saved, monkeypatch):
    monkeypatch.setattr(formats, "pack_part", None)
    monkeypatch.setattr(formats, "pack", None)

    assert hybrimoe.verify(hybrimoe.from_pretrained(saved))


@pytest.mark.filterwarnings(LOSSY)
def test_it_is_like_a_wrapped_model_afterwards(saved, tmp_path, tokenizer):
    model = hybrimoe.from_pretrained(saved)
    tokens = generate(model, tokenizer)

    assert model.config.name_or_path == model.name_or_path == str(saved)
    assert not hasattr(model.config, "transformers_weights")
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.eos_token_id == 0
    assert "int4" in str(model.hybrimoe.report())
    model.save_pretrained(tmp_path / "plain")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert generate(again, tokenizer) == generate(hybrimoe.unwrap(model), tokenizer)
    assert tokens


def test_a_wrapped_model_and_a_loaded_packed_one_can_be_saved(model, saved, tmp_path):
    hybrimoe.wrap(model, weights="int4")
    hybrimoe.save_packed(model, tmp_path / "wrapped")
    hybrimoe.save_packed(hybrimoe.from_pretrained(saved), tmp_path / "again")

    first, second = (hybrimoe.from_pretrained(tmp_path / name) for name in ("wrapped", "again"))
    assert_same_pool(first, second)


def test_quantized_dense_layers_are_refused_before_anything_is_written(tmp_path):
    model = families.build("qwen3_moe.Qwen3MoeExperts")
    with_packed_attention(model)
    hybrimoe.wrap(model, device="cpu")

    with pytest.raises(UnsupportedModelError, match=r"q_proj of .* is quantized .*save_packed"):
        hybrimoe.save_packed(model, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("folder", ["", None, 5, b"folder", "a\0b"])
def test_what_is_no_folder_s_name_is_refused(folder, loaded):
    with pytest.raises(ConfigError, match="folder must be a path"):
        hybrimoe.save_packed(loaded, folder)


@pytest.mark.parametrize(
    ("key", "value"),
    [("weights", "x"), ("dtype", "x"), ("format", "int8+x"), ("weights", "native")],
)
def test_kinds_of_numbers_that_there_are_not_are_refused(key, value, saved):
    manifest = json.loads((saved / "hybrimoe.json").read_text())
    manifest["layers"][0][key] = value
    (saved / "hybrimoe.json").write_text(json.dumps(manifest))

    for door in (hybrimoe.from_pretrained, hybrimoe.plan):
        with pytest.raises(CheckpointError, match="no valid entry for layer 0"):
            door(saved)


def test_an_unwrapped_model_is_refused(model, tmp_path):
    with pytest.raises(WrappedModelError, match=r"hybrimoe\.wrap"):
        hybrimoe.save_packed(model, tmp_path)


def test_blobs_are_safetensors_that_start_on_a_page(saved):
    for path in part(saved).glob("experts-*"):
        with path.open("rb") as file:
            assert (8 + int.from_bytes(file.read(8), "little")) % 4096 == 0
        with safe_open(path, "pt") as file:
            (name,) = file.keys()
            assert file.get_tensor(name).dtype == torch.uint8


def test_no_file_of_it_stays_open_or_mapped(saved):
    model = hybrimoe.from_pretrained(saved)
    maps = Path("/proc/self/maps")
    if maps.exists():
        assert str(saved) not in maps.read_text()
        links = [path.resolve() for path in Path("/proc/self/fd").iterdir()]
        assert not any(link.is_relative_to(saved) for link in links)
    assert model.hybrimoe.layers


# What is asked for must be what is there.


def test_another_format_than_the_saved_one_is_refused(saved):
    with pytest.raises(ConfigError, match="weights must be 'int4'"):
        hybrimoe.from_pretrained(saved, weights="native")
    with pytest.raises(ConfigError, match="weights must be 'int4'"):
        hybrimoe.from_pretrained(saved, Config(weights="int8"))
    assert hybrimoe.from_pretrained(saved, weights="int4").hybrimoe.layers


def test_another_dtype_than_the_saved_one_is_refused(saved):
    with pytest.raises(ConfigError, match="dtype must be bfloat16"):
        hybrimoe.from_pretrained(saved, dtype=torch.float32)
    assert hybrimoe.from_pretrained(saved, dtype="bfloat16").dtype == torch.bfloat16


def change(name: str, value: object):
    def apply(folder: Path) -> None:
        edit(folder / "hybrimoe.json", **{name: value})

    return apply


def change_layer(**values: object):
    def apply(folder: Path) -> None:
        path = folder / "hybrimoe.json"
        manifest = json.loads(path.read_text())
        manifest["layers"][2] |= values
        path.write_text(json.dumps(manifest))

    return apply


def cut(name: str, size: int):
    return lambda folder: os.truncate(part(folder) / name, size)


def flip(name: str, at: int):
    def apply(folder: Path) -> None:
        with (part(folder) / name).open("r+b") as file:
            file.seek(at, os.SEEK_SET if at >= 0 else os.SEEK_END)
            byte = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte[0] ^ 4]))

    return apply


def remove(name: str):
    return lambda folder: (part(folder) / name).unlink()


def link_outside(folder: Path) -> None:
    outside = folder.parent / "outside.safetensors"
    shutil.move(part(folder) / "experts-00001.safetensors", outside)
    (part(folder) / "experts-00001.safetensors").symlink_to(outside)


def pipe(folder: Path) -> None:
    (folder / "hybrimoe.json").unlink()
    os.mkfifo(folder / "hybrimoe.json")


SPOILED = {
    "newer schema": (change("schema_version", 3), "schema_version must be 1 or 2"),
    "no schema": (change("schema_version", None), "schema_version must be 1 or 2"),
    "other kernels": (change("kernel_layout", 99), "save it again"),
    "folder outside": (change("folder", "../elsewhere"), "no folder of packed files"),
    "absolute folder": (change("folder", "/etc"), "no folder of packed files"),
    "no folder": (change("folder", None), "no folder of packed files"),
    "no layers": (change("layers", []), "must list layers"),
    "layers no list": (change("layers", {}), "must list layers"),
    "layer no dict": (change("layers", ["x"]), "no valid entry for layer 0"),
    "no dense": (change("dense", None), "checksum of the dense"),
    "file outside": (change_layer(file="../../x.safetensors"), "no valid entry for layer 2"),
    "other file": (change_layer(file="experts-00003.safetensors"), "no valid entry for layer 2"),
    "other name": (change_layer(name="model.layers.9.mlp.experts"), "holds the experts of 12"),
    "other experts": (change_layer(experts=16), "experts of model.layers.2.mlp.experts differ"),
    "other layout": (change_layer(layout={"hidden": 1}), "layout of"),
    "other format": (change_layer(format="int8"), "no valid entry"),
    "other shapes": (change_layer(shapes={}), "shapes of"),
    "other checksum": (change_layer(checksum=1), "does not have the checksum"),
    "checksum no number": (change_layer(checksum="1"), "no valid entry"),
    "blob cut": (cut("experts-00004.safetensors", 5000), "cut off"),
    "header cut": (cut("experts-00004.safetensors", 50), "cut off inside its header"),
    "blob empty": (cut("experts-00004.safetensors", 0), "too short"),
    "blob bit": (flip("experts-00007.safetensors", 100_000), "does not have the checksum"),
    "last bit": (flip("experts-00007.safetensors", -1), "does not have the checksum"),
    "header bit": (flip("experts-00007.safetensors", 12), "experts-00007"),
    "dense bit": (flip("dense.safetensors", -1), "is not what was saved"),
    "dense cut": (cut("dense.safetensors", 1000), "is not what was saved"),
    "blob gone": (remove("experts-00000.safetensors"), "cannot be read"),
    "dense gone": (remove("dense.safetensors"), "cannot be read"),
    "all gone": (lambda folder: shutil.rmtree(part(folder)), "cannot be read"),
    "link outside": (link_outside, "outside of"),
    "manifest a pipe": (pipe, "not a regular file"),
    "manifest no JSON": (lambda f: (f / "hybrimoe.json").write_text("{"), "no valid JSON"),
    "manifest a list": (lambda f: (f / "hybrimoe.json").write_text("[]"), "JSON object"),
    "manifest twice": (lambda f: (f / "hybrimoe.json").write_text('{"a":1,"a":2}'), "twice"),
    "manifest empty": (lambda f: (f / "hybrimoe.json").write_text(""), "no valid JSON"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_folder_is_a_typed_error(name, saved):
    spoil, message = SPOILED[name]
    spoil(saved)

    with pytest.raises(CheckpointError, match=message):
        hybrimoe.from_pretrained(saved)


def test_another_model_s_configuration_is_noticed(saved):
    edit(part(saved) / "config.json", num_experts=16)

    with pytest.raises(CheckpointError, match=r"experts, shapes of model\.layers\.0"):
        hybrimoe.from_pretrained(saved)


def test_the_meaning_of_blobs_has_not_changed_without_a_new_number():
    """When this fails, KERNEL_LAYOUT must grow: saved folders hold the old bytes."""
    digest = hashlib.sha256()
    generator = torch.Generator().manual_seed(0)
    for fmt, dtype in (("int4", torch.bfloat16), ("int8", torch.bfloat16)):
        up = torch.randint(-99, 99, (2, 2, 96, 64), generator=generator).to(dtype)
        down = torch.randint(-99, 99, (2, 64, 96), generator=generator).to(dtype)
        layout = expert_layout(fmt, 64, 96, True, False)
        blobs = allocate_blobs(2, layout)
        formats.pack(fmt, layout, ExpertWeights(up, down, None), blobs)
        digest.update(repr(tuple(layout)).encode() + blobs.tobytes())

    assert (packed_manifest.KERNEL_LAYOUT, digest.hexdigest()[:16]) == (1, "1a6b2daa2b6fb764")


def test_halves_of_a_layer_packed_one_by_one_are_the_layer():
    up, down = torch.randn(3, 2, 80, 96).bfloat16(), torch.randn(3, 96, 80).bfloat16()
    nothing = ExpertWeights(torch.zeros(()).bfloat16().expand_as(up), down, None)
    for fmt in ("int4", "int8", "bfloat16"):
        layout = expert_layout(fmt, 96, 80, True, False)
        whole, halves = allocate_blobs(3, layout), allocate_blobs(3, layout)
        formats.pack(fmt, layout, ExpertWeights(up, down, None), whole)
        formats.pack_part(fmt, layout, nothing, halves, down=True)
        assert not (halves == whole).all()
        formats.pack_part(fmt, layout, ExpertWeights(up, down, None), halves, down=False)
        assert (halves == whole).all()


# Saving is all or nothing.


def folders(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("packed-*")}


def test_a_new_save_takes_the_place_of_the_old_one(loaded, saved):
    old = part(saved).name
    hybrimoe.save_packed(loaded, saved)

    assert folders(saved) == {part(saved).name} != {old}
    assert_same_pool(hybrimoe.from_pretrained(saved), loaded)


STEPS = ["write", "save_pretrained", "_sync", "write_atomically", "checksum"]


@pytest.mark.parametrize("step", STEPS)
def test_a_full_disk_is_a_typed_error_and_the_old_save_stays(step, loaded, saved, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "write":
        monkeypatch.setattr(packed_files, "_write_layer", full)
    elif step == "save_pretrained":
        monkeypatch.setattr(type(loaded), "save_pretrained", full)
    else:
        monkeypatch.setattr(packed_files, step, full)
    before = sorted(path.name for path in saved.rglob("*"))

    with pytest.raises(StorageError, match="No space left"):
        hybrimoe.save_packed(loaded, saved)
    monkeypatch.undo()
    assert sorted(path.name for path in saved.rglob("*")) == before
    assert_same_pool(hybrimoe.from_pretrained(saved), loaded)


def test_too_little_room_is_said_before_anything_is_written(loaded, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)

    with pytest.raises(StorageError, match="its disk has 1000 free"):
        hybrimoe.save_packed(loaded, tmp_path / "new")
    assert list((tmp_path / "new").iterdir()) == []


def test_a_file_in_the_way_is_a_typed_error(loaded, tmp_path):
    (tmp_path / "file").write_text("mine")

    with pytest.raises(StorageError, match="must be a folder"):
        hybrimoe.save_packed(loaded, tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


def test_an_interrupt_leaves_the_old_save(loaded, saved, monkeypatch):
    old, write, calls = folders(saved), packed_files._write_layer, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return write(*arguments)

    monkeypatch.setattr(packed_files, "_write_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        hybrimoe.save_packed(loaded, saved)
    assert folders(saved) == old


def test_saves_at_once_wait_for_each_other(loaded, saved, monkeypatch):
    inside, most, write = [], [], packed_files._write_layer

    def watched(layer: PooledExperts, folder: Path, at: int):
        inside.append(folder)
        most.append(len(set(inside)))
        time.sleep(0.002)
        entry = write(layer, folder, at)
        inside.remove(folder)
        return entry

    monkeypatch.setattr(packed_files, "_write_layer", watched)
    threads = [threading.Thread(target=hybrimoe.save_packed, args=(loaded, saved)) for _ in "12"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert len(most) == 24
    assert max(most) == 1
    assert len(folders(saved)) == 1
    assert_same_pool(hybrimoe.from_pretrained(saved), loaded)


PROCESS = """
import os, sys
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
import transformers, hybrimoe
from hybrimoe.sources.packed import files as packed_files
transformers.utils.logging.disable_progress_bar()
model = hybrimoe.from_pretrained(sys.argv[1], weights="int4")
"""
FOREVER = """
print("ready", flush=True)
while True:
    hybrimoe.save_packed(model, sys.argv[2])
    print("saved", flush=True)
"""
SMALL_FILES = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, 1 << 19))
try:
    hybrimoe.save_packed(model, sys.argv[2])
except hybrimoe.StorageError as error:
    print(error)
"""


def start(code: str, folder: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-W", "ignore", "-c", PROCESS + code, str(TINY_MOE), str(folder)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_two_processes_that_are_killed_leave_a_whole_save(saved, loaded):
    """Killed at moments of the system's choosing, while both save into one folder."""
    processes = [start(FOREVER, saved) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process, delay in zip(processes, (0.31, 0.17)):
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert_same_pool(hybrimoe.from_pretrained(saved), loaded)
    hybrimoe.save_packed(loaded, saved)

    assert folders(saved) == {part(saved).name}


@pytest.mark.skipif(os.name == "nt", reason="RLIMIT_FSIZE")
def test_a_limit_on_file_sizes_is_a_typed_error(saved, loaded):
    process = start(SMALL_FILES, saved)
    out, _ = process.communicate(timeout=120)

    assert process.returncode == 0
    assert "cannot be written" in out
    assert_same_pool(hybrimoe.from_pretrained(saved), loaded)
    assert folders(saved) == {part(saved).name}


def test_a_load_during_which_another_save_takes_over_starts_again(loaded, saved, monkeypatch):
    check, calls = packed_source.check_dense, []

    def overtaken(*arguments):
        calls.append(1)
        if len(calls) == 1:
            hybrimoe.save_packed(loaded, saved)
        check(*arguments)

    monkeypatch.setattr(packed_source, "check_dense", overtaken)
    assert_same_pool(hybrimoe.from_pretrained(saved), loaded)
    assert len(calls) == 2


def test_checksums_add_up_over_chunks(saved, monkeypatch):
    monkeypatch.setattr(packed_blobs, "CHUNK", 4096)

    assert hybrimoe.from_pretrained(saved).hybrimoe.layers[0].is_intact()


def test_a_short_file_is_not_read_past_its_end(tmp_path):
    (tmp_path / "short").write_bytes(b"12345")
    out = np.zeros(8, np.uint8)
    with (tmp_path / "short").open("rb") as file:
        assert packed_blobs.read_at(file.fileno(), out, 2) == 3
    assert bytes(out) == b"345\0\0\0\0\0"
