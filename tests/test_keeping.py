"""The first start packs and keeps, every later one reads; what is kept is listed and cleared."""

import json
import logging
import os
import shutil
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from transformers import GenerationConfig

import hybrimoe
from hybrimoe.cli.main import main
from hybrimoe.config import Config
from hybrimoe.errors import ConfigError, StorageError
from hybrimoe.models import weights as formats
from hybrimoe.sources import keeping, kept_packs
from paths import TINY_MOE
from test_loading import assert_same_pool
from test_packed_files import flip

SMALL = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
SETTINGS = {"device": "cpu", "weights": "int4", **SMALL}


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the bundled checkpoint that a test may change."""
    return Path(shutil.copytree(TINY_MOE, tmp_path / "tiny"))


@pytest.fixture
def store(tmp_path) -> Path:
    return tmp_path / "store"


@pytest.fixture(scope="module")
def plain():
    return hybrimoe.from_pretrained(TINY_MOE, **SETTINGS)


def load(name, store, **settings):
    return hybrimoe.from_pretrained(name, keep_packed=store, **SETTINGS | settings)


def kept(store) -> list[Path]:
    return [pack.folder for pack in kept_packs.packs(store)]


# The second start.


def test_the_second_start_packs_nothing_and_is_the_same_model(
    source, store, plain, monkeypatch, caplog
):
    with caplog.at_level(logging.WARNING, "hybrimoe"):
        first = load(source, store)
    (folder,) = kept(store)
    assert f"the packed model is kept in {folder} (" in caplog.text
    assert "MiB)" in caplog.text
    caplog.clear()
    monkeypatch.setattr(formats, "pack_part", None)
    second = load(source, store)

    assert caplog.text == ""
    assert_same_pool(second, plain)
    for model in (first, second):
        assert model.config.name_or_path == model.name_or_path == str(source)
        assert model.hybrimoe.config == plain.hybrimoe.config
    wanted = dict(plain.named_parameters())
    assert all(torch.equal(p, wanted[name]) for name, p in second.named_parameters())


def test_settings_that_change_no_bytes_share_a_pack_and_others_do_not(source, store, monkeypatch):
    load(source, store)
    monkeypatch.setattr(formats, "pack_part", None)
    half = load(source, store, ram=0.5, attn_implementation="eager", threads=1)
    assert half.hybrimoe.pool.tier is not None
    assert half.config._attn_implementation == "eager"
    monkeypatch.undo()
    for settings in ({"weights": "int8"}, {"dtype": torch.float32}, {"linear": "int4"}):
        load(source, store, **settings)

    assert len(kept(store)) == 4
    monkeypatch.setattr(formats, "pack_part", None)
    monkeypatch.setattr(formats, "pack", None)
    again = load(source, store, linear="int4")
    assert again.hybrimoe.config.linear == "int4"
    assert len(again.hybrimoe.linears) > 0


def test_a_model_that_changed_is_packed_anew_in_the_same_place(source, store):
    load(source, store)
    (folder,) = kept(store)
    before = json.loads((folder / "hybrimoe.json").read_text())["folder"]
    os.utime(source / "model.safetensors", ns=(1, 1))
    load(source, store)

    assert kept(store) == [folder]
    assert json.loads((folder / "hybrimoe.json").read_text())["folder"] != before


@pytest.mark.parametrize("name", ["experts-00001.safetensors", "dense.safetensors"])
def test_a_damaged_pack_is_said_and_made_anew(name, source, store, plain):
    load(source, store)
    (folder,) = kept(store)
    flip(name, -1)(folder)
    with pytest.warns(UserWarning, match=r"damaged.*the model is packed anew"):
        assert_same_pool(load(source, store), plain)

    assert_same_pool(load(source, store), plain)


def test_a_damaged_pack_that_cannot_be_replaced_does_not_stand_in_the_way(
    source, store, plain, monkeypatch
):
    load(source, store)
    (folder,) = kept(store)
    (folder / "hybrimoe.json").write_text("{")

    def refused(pack):
        raise PermissionError(13, "Permission denied", "kept.json")

    monkeypatch.setattr(kept_packs.Pack, "begin", refused)
    for _ in range(2):
        with pytest.warns(UserWarning, match=r"without its pack, which cannot be replaced: .*13"):
            loaded = load(source, store)
        assert_same_pool(loaded, plain)


def test_a_pack_that_may_not_be_read_is_made_anew(source, store, plain, monkeypatch):
    load(source, store)

    def unreadable(*_):
        raise PermissionError(13, "Permission denied", "hybrimoe.json")

    with monkeypatch.context() as patched:
        patched.setattr(keeping, "_from_pack", unreadable)
        with pytest.warns(UserWarning, match=r"Permission denied.*the model is packed anew"):
            loaded = load(source, store)
    assert_same_pool(loaded, plain)
    assert_same_pool(load(source, store), plain)


def test_a_pack_in_a_folder_that_may_not_be_looked_into_is_not_there(source, store, monkeypatch):
    load(source, store)
    (pack,) = kept_packs.packs(store)

    def hidden(path, *_, **__):
        raise PermissionError(13, "Permission denied", path)

    with monkeypatch.context() as patched:
        patched.setattr(os, "stat", hidden)
        is_current = pack.is_current
    assert not is_current


def test_a_pack_without_its_note_is_made_anew(source, store, plain):
    load(source, store)
    (folder,) = kept(store)
    (folder / "kept.json").write_text("{")

    assert kept(store) == []
    assert_same_pool(load(source, store), plain)
    assert kept(store) == [folder]


def test_an_interrupted_save_leaves_nothing_that_counts(source, store, plain, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(kept_packs.Pack, "settle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load(source, store)
    monkeypatch.undo()

    assert kept(store) == []
    assert_same_pool(load(source, store), plain)
    assert len(kept(store)) == 1


def test_two_that_keep_the_same_pack_at_once_leave_a_whole_one(source, store, plain):
    settings = keeping._settings_of(str(source), Config(weights="int4"), dict(SMALL))
    pack = keeping._find(str(source), {}, settings, store)
    arguments = (pack, plain, hybrimoe.save_packed)
    threads = [threading.Thread(target=keeping._keep, args=arguments) for _ in "12"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert kept(store) == [pack.folder]
    assert len(list(pack.folder.glob("packed-*"))) == 1
    assert_same_pool(load(source, store), plain)


# The hub.


def snapshot(cache: Path, revision: str) -> None:
    repository = cache / "models--someone--tiny"
    folder = repository / "snapshots" / revision
    folder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        shutil.copy(TINY_MOE / name, folder)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / "main").write_text(revision)


def test_a_repository_s_pack_is_its_revision_s(tmp_path, store, monkeypatch):
    cache = tmp_path / "cache"
    for revision in ("a" * 40, "b" * 40):
        snapshot(cache, revision)
        load("someone/tiny", store, cache_dir=cache)
    monkeypatch.setattr(formats, "pack_part", None)
    older = load("someone/tiny", store, cache_dir=cache, revision="a" * 40)

    assert older.name_or_path == "someone/tiny"
    notes = [kept_packs.read_note(folder) for folder in kept(store)]
    assert {note["revision"] for note in notes} == {"a" * 40, "b" * 40}
    assert all(folder.name.startswith("models--someone--tiny--") for folder in kept(store))
    assert all((folder / "tokenizer.json").is_file() for folder in kept(store))


def test_a_packed_repository_is_loaded_and_not_kept_twice(tmp_path, store, plain):
    cache = tmp_path / "cache"
    folder = cache / "models--someone--packed" / "snapshots" / ("c" * 40)
    hybrimoe.save_packed(plain, folder)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text("c" * 40)
    settings = {"device": "cpu", "cache_dir": cache}
    model = hybrimoe.from_pretrained("someone/packed", keep_packed=store, **settings)

    assert_same_pool(model, plain)
    assert kept(store) == []


def test_packs_lie_beside_the_cache_of_the_hub(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "big" / "hub"))
    hybrimoe.from_pretrained(TINY_MOE, keep_packed=True, **SETTINGS)

    (folder,) = kept(tmp_path / "big" / "hub-hybrimoe")
    assert folder.name.startswith("folder--tiny-moe--")


# Where none can be kept, the model is loaded all the same.


def test_too_little_room_is_a_warning_with_the_reason(source, store, plain, monkeypatch):
    usage = shutil.disk_usage(source)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.warns(UserWarning, match="not kept: .* needs .* bytes, its disk has 1000 free"):
        assert_same_pool(load(source, store), plain)

    assert list(store.iterdir()) == []


def test_a_folder_that_is_refused_is_a_warning_with_the_reason(source, store, plain):
    store.write_text("a file")

    with pytest.warns(UserWarning, match="the packed model is not kept: .*store"):
        assert_same_pool(load(source, store), plain)


def test_what_cannot_be_part_of_a_name_is_not_kept(source, store, plain):
    with pytest.warns(UserWarning, match="not kept: generation_config is no plain value"):
        assert_same_pool(load(source, store, generation_config=GenerationConfig()), plain)
    with pytest.warns(UserWarning, match="not kept: code of a model"):
        load(source, store, trust_remote_code=True)

    assert kept(store) == []


def test_a_packed_folder_is_not_packed_again(store, plain, tmp_path):
    hybrimoe.save_packed(plain, tmp_path / "packed")
    hybrimoe.from_pretrained(tmp_path / "packed", keep_packed=store, device="cpu")

    assert kept(store) == []


@pytest.mark.parametrize("value", [None, 3, ""])
def test_keep_packed_is_yes_no_or_a_folder(value):
    with pytest.raises(ConfigError, match="keep_packed must be True, False or the path"):
        hybrimoe.from_pretrained(TINY_MOE, keep_packed=value)


# The commands.


def run(capsys, *arguments) -> tuple[int, str]:
    code = main([str(argument) for argument in arguments])
    return code, capsys.readouterr().out


def test_the_command_lists_and_clears(source, store, capsys):
    load(source, store)
    load(source, store, weights="int8")
    code, out = run(capsys, "cache", "--folder", store)
    assert code == 0
    assert f"{source}: int4, auto, " in out
    assert "2 packed models kept, " in out
    code, out = run(capsys, "cache", "--folder", store, "--json")
    first = json.loads(out)["packs"][0]
    names = {"name", "revision", "weights", "linear", "dtype", "bytes", "last_used", "path"}
    assert first.keys() == names
    assert first["bytes"] > 1 << 20
    load(TINY_MOE, store)
    assert run(capsys, "cache", "--folder", store, "--clear", source)[0] == 0
    assert [f.name.startswith("folder--tiny-moe") for f in kept(store)] == [True]
    code, out = run(capsys, "cache", "--folder", store, "--clear", "--json")
    assert len(json.loads(out)["cleared"]) == 1
    assert run(capsys, "cache", "--folder", store) == (0, f"no packed models in {store}\n")
    assert list(store.iterdir()) == []


def test_clearing_what_is_not_kept_or_being_written_is_an_error(source, store, capsys):
    assert main(["cache", "--folder", str(store), "--clear", "nothing/here"]) == 2
    assert "no packed model of" in capsys.readouterr().err
    load(source, store)
    (pack,) = kept_packs.packs(store)
    with (
        kept_packs.FileLock(pack.folder / kept_packs.LOCK),
        pytest.raises(StorageError, match="is being written"),
    ):
        pack.clear()
    assert kept(store) == [pack.folder]


def test_a_link_is_never_followed(source, store, tmp_path):
    load(source, tmp_path / "elsewhere")
    (folder,) = kept(tmp_path / "elsewhere")
    store.mkdir()
    (store / "link").symlink_to(folder)

    assert kept_packs.clear(store) == []
    assert folder.exists()


def test_commands_keep_the_pack_unless_told_not_to(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    quick = ("generate", TINY_MOE, "--prompt", "def ", "--max-new-tokens", "2", "--weights", "int4")
    assert run(capsys, *quick, "--no-keep-packed")[0] == 0
    assert kept(tmp_path / "hub-hybrimoe") == []
    assert run(capsys, *quick)[0] == 0
    assert len(kept(tmp_path / "hub-hybrimoe")) == 1
    monkeypatch.setattr(formats, "pack_part", None)

    assert run(capsys, *quick)[0] == 0
