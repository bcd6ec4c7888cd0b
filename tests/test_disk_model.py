"""Whole models with experts on disk: tokens, files, memory, refusals, failures."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

import hybrimoe
from hybrimoe.config import Config
from hybrimoe.errors import ConfigError, DiskReadError, StorageError
from hybrimoe.runtime.disk import file as backing
from hybrimoe.sources.packed.files import describe
from paths import TINY_MOE
from test_reader import readers

LAYERS, EXPERTS, TOP_K = 3, 32, 4
transformers.utils.logging.set_verbosity_error()  # of the layers that are left out
LEAST = TOP_K / (LAYERS * EXPERTS)
LOSSY = pytest.mark.filterwarnings("ignore:the experts were stored as int4")


def load():
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, num_hidden_layers=LAYERS).eval()
    model.config.layer_types = model.config.layer_types[:LAYERS]  # else it cannot be saved
    return model


def answer(model):
    """Logits of a prompt and greedy tokens of a batch of two."""
    ids = torch.randint(10, 4000, (2, 7), generator=torch.Generator().manual_seed(0))
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False
    )
    with torch.no_grad():
        return model(ids).logits, tokens


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b))


@pytest.fixture(scope="module")
def expected():
    """By the settings, what a model gives with all its experts in RAM."""
    known = {}

    def get(**settings):
        key = json.dumps(settings)
        if key not in known:
            known[key] = answer(hybrimoe.wrap(load(), **settings))
        return known[key]

    return get


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    hybrimoe.save_packed(hybrimoe.wrap(load(), device="cpu", weights="int4"), folder)
    return folder


def assert_nothing_is_left(folder, files):
    assert list(folder.iterdir()) == []
    assert readers() == []
    assert len(os.listdir("/proc/self/fd")) == files


@LOSSY
@pytest.mark.parametrize("ram", [LEAST, 0.5])
@pytest.mark.parametrize("weights", ["native", "int4"])
def test_on_the_cpu_every_bit_is_that_of_all_in_ram(expected, weights, ram, tmp_path):
    files = len(os.listdir("/proc/self/fd"))
    model = hybrimoe.wrap(load(), device="cpu", weights=weights, ram=ram, spill=str(tmp_path))

    assert same(answer(model), expected(device="cpu", weights=weights))
    assert list(tmp_path.iterdir()) == []  # the file has no name
    hybrimoe.unwrap(model)
    assert_nothing_is_left(tmp_path, files)


@LOSSY
@pytest.mark.parametrize("ram", [LEAST, 0.5])
@pytest.mark.parametrize("preset", ["hybrimoe", "hybrimoe-paper", "adapmoe", "ondemand", "fiddler"])
@pytest.mark.parametrize("weights", ["native", "int4"])
def test_with_an_accelerator_tokens_are_those_of_all_in_ram(expected, weights, preset, ram):
    settings = {"device": "emulated", "weights": weights, "preset": preset, "vram": 0.2}
    model = hybrimoe.wrap(load(), ram=ram, **settings)
    logits, tokens = answer(model)

    wanted = expected(**settings)
    assert torch.equal(tokens, wanted[1])
    torch.testing.assert_close(logits, wanted[0], rtol=1e-4, atol=1e-4)
    assert model.hybrimoe.stats()["disk"]["reads"] > 0
    hybrimoe.unwrap(model)
    assert readers() == []


def test_a_model_that_fits_has_no_disk(expected):
    model = hybrimoe.wrap(load(), device="cpu", ram=1.0)

    assert model.hybrimoe.pool.tier is None
    assert model.hybrimoe.stats()["disk"] is None
    assert same(answer(model), expected(device="cpu"))


@LOSSY
@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_verify_state_dict_saving_and_unwrap_read_from_the_disk(device, tmp_path):
    models = [load(), load()]
    hybrimoe.wrap(models[0], device="cpu", weights="int4")
    hybrimoe.wrap(models[1], device=device, weights="int4", ram=0.25)
    states = [model.state_dict() for model in models]

    assert hybrimoe.verify(models[1]).passed
    assert all(layer.is_intact() for layer in models[1].hybrimoe.layers)
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    models[1].save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, num_hidden_layers=LAYERS).state_dict()
    assert all(torch.equal(saved[name], states[0][name]) for name in saved)
    unwrapped = [hybrimoe.unwrap(model).state_dict() for model in models]
    assert all(torch.equal(unwrapped[0][name], unwrapped[1][name]) for name in unwrapped[0])


def test_a_byte_that_changes_on_disk_fails_verification():
    model = hybrimoe.wrap(load(), device="cpu", ram=0.25)
    place = model.hybrimoe.pool.tier.backing.places[1]
    backing._clear_direct(place.file)
    os.pwrite(place.file, b"\x55", place.offset + 3 * place.stride + 5)

    assert not hybrimoe.verify(model).passed


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_packed_folder_is_read_where_it_lies(packed, expected, device, tmp_path):
    model = hybrimoe.from_pretrained(packed, device=device, ram=0.4, spill=str(tmp_path / "none"))
    tier = model.hybrimoe.pool.tier

    assert same(answer(model), expected(device=device, weights="int4"))
    assert {Path(place.path).parent.parent for place in tier.backing.places.values()} == {packed}
    assert hybrimoe.verify(model).passed


def test_a_checkpoint_is_packed_onto_the_disk_and_can_be_saved_from_there(tmp_path):
    wanted = answer(hybrimoe.from_pretrained(TINY_MOE, device="cpu", weights="int4"))
    model = hybrimoe.from_pretrained(TINY_MOE, device="cpu", weights="int4", ram=0.4)
    assert same(answer(model), wanted)
    hybrimoe.save_packed(model, tmp_path)
    again = hybrimoe.from_pretrained(tmp_path, device="cpu", ram=0.25)
    hybrimoe.save_packed(again, tmp_path)  # over the files that it reads from
    last = hybrimoe.from_pretrained(tmp_path, device="cpu")

    for loaded in (again, last):
        assert same(answer(loaded), wanted)
        assert [describe(a) for a in loaded.hybrimoe.layers] == [
            describe(a) for a in model.hybrimoe.layers
        ]


def test_on_the_cpu_the_next_router_says_what_to_read(expected):
    model = hybrimoe.wrap(load(), device="cpu", ram=0.25)
    seen, lookahead = [], model.hybrimoe.layers[0].lookahead
    real = lookahead.forecasts
    lookahead.forecasts = lambda *arguments: seen.extend(real(*arguments)) or seen[-1:]

    assert same(answer(model), expected(device="cpu"))
    assert {found.layer for found in seen} == {1, 2}
    disk = model.hybrimoe.stats()["disk"]
    assert disk["forecast_used"] > 0.5 * disk["forecast"] > 10


def test_routers_keep_nothing_of_a_call_and_lose_their_hooks(expected):
    model = hybrimoe.wrap(load(), device="cpu", ram=0.25)
    probes = model.hybrimoe.layers[0].lookahead.probes
    answer(model)
    assert all(probe._seen.args == () and probe._seen.output is None for probe in probes)
    assert any(probe.router._forward_hooks for probe in probes)

    hybrimoe.unwrap(model)
    assert not any(probe.router._forward_hooks for probe in probes)


def test_a_model_on_disk_compiles_as_one_graph_with_equal_output():
    model = hybrimoe.wrap(load(), device="cpu", ram=0.25)
    ids = torch.arange(12)[None]
    torch.compiler.reset()
    try:
        with torch.no_grad():
            wanted = model(ids).logits
            found = torch.compile(model, backend="eager", fullgraph=True)(ids).logits
    finally:
        torch.compiler.reset()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_where_direct_reads_are_refused_results_are_the_same(expected, monkeypatch):
    monkeypatch.setattr(backing, "_set_direct", lambda file: False)
    model = hybrimoe.wrap(load(), device="cpu", ram=0.25)

    assert not model.hybrimoe.stats()["disk"]["direct"]
    assert same(answer(model), expected(device="cpu"))


def test_the_report_says_what_the_disk_did():
    model = hybrimoe.wrap(load(), device="cpu", ram=0.5, trace=True)
    answer(model)
    found = model.hybrimoe.stats()["disk"]

    assert found["slots"] == 48
    assert found["experts"] == 96
    assert found["hits"] > 0
    assert found["misses"] == found["reads"] > 0 or found["forecast"]
    assert found["disk_s"] > 0
    text = str(model.hybrimoe.report())
    assert "48 of 96 experts in" in text
    assert f"{found['reads']} experts, " in text
    model.hybrimoe.reset_stats()
    assert model.hybrimoe.stats()["disk"]["reads"] == 0


def test_reads_are_in_the_exported_trace(tmp_path):
    model = hybrimoe.wrap(load(), device="cpu", ram=0.5, trace=True)
    answer(model)
    model.hybrimoe.export_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]

    assert sum(e["pid"] == "disk" and e["tid"] == "LINK" and e["ph"] == "X" for e in events) > 10


# Refusals, each before the model is touched.


@pytest.mark.parametrize("ram", [0, -1, 0.0, 1.5, "many", True, "10 parsecs", [1], float("nan")])
def test_bad_budgets_are_refused(ram):
    with pytest.raises(ConfigError, match="ram must be"):
        Config(ram=ram)


@pytest.mark.parametrize("ram", [1, 0.001, "4KiB"])
def test_a_budget_below_one_tokens_experts_is_refused(ram):
    model = load()
    with pytest.raises(ConfigError, match=r"ram must hold at least the 4 experts"):
        hybrimoe.wrap(model, ram=ram)

    assert not hasattr(model, "hybrimoe")
    assert not model._forward_hooks


def test_a_spill_folder_must_exist_on_a_disk_with_room(tmp_path, monkeypatch):
    model = load()
    with pytest.raises(ConfigError, match="spill must be the path"):
        Config(spill=3)
    with pytest.raises(ConfigError, match="spill must be a folder that exists, got"):
        hybrimoe.wrap(model, ram=0.5, spill=str(tmp_path / "none"))
    with monkeypatch.context() as patch:
        part = type("Part", (), {"mountpoint": str(tmp_path), "fstype": "tmpfs"})
        patch.setattr(backing.psutil, "disk_partitions", lambda all: [part])
        with pytest.raises(ConfigError, match=r"on a disk, got .*tmpfs"):
            hybrimoe.wrap(model, ram=0.5, spill=str(tmp_path))
    with monkeypatch.context() as patch:
        usage = shutil.disk_usage(tmp_path)._replace(free=10**6)
        patch.setattr(shutil, "disk_usage", lambda folder: usage)
        with pytest.raises(StorageError, match=r"needs \d+ bytes .* 1000000 free"):
            hybrimoe.wrap(model, ram=0.5, spill=str(tmp_path))

    assert not hasattr(model, "hybrimoe")
    assert not model._forward_hooks
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way_gives_the_model_back(monkeypatch, tmp_path, expected):
    model, files, written = load(), len(os.listdir("/proc/self/fd")), []

    def write(file, view, offset):
        written.append(offset)
        if len(written) > EXPERTS + 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.pwrite(file, view, offset)

    monkeypatch.setattr(backing, "_write_once", write)
    with pytest.raises(StorageError, match="cannot be written"):
        hybrimoe.wrap(model, device="cpu", ram=0.5, spill=str(tmp_path))
    monkeypatch.undo()

    assert_nothing_is_left(tmp_path, files)
    assert same(answer(hybrimoe.wrap(model, device="cpu")), expected(device="cpu"))


@pytest.mark.parametrize("call", ["TemporaryFile", "posix_fallocate"])
def test_a_disk_that_refuses_at_once_leaves_the_model_alone(monkeypatch, tmp_path, call):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, "Read-only file system")

    model, files = load(), len(os.listdir("/proc/self/fd"))
    where = backing.tempfile if call == "TemporaryFile" else backing.os
    monkeypatch.setattr(where, call, refuse)
    with pytest.raises(StorageError, match=r"spill='.*Read-only file system"):
        hybrimoe.wrap(model, device="cpu", ram=0.5, spill=str(tmp_path))

    assert not hasattr(model, "hybrimoe")
    assert_nothing_is_left(tmp_path, files)


def test_a_disk_that_cannot_be_read_at_all_gives_the_model_back(monkeypatch, tmp_path, expected):
    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    model, files = load(), len(os.listdir("/proc/self/fd"))
    with monkeypatch.context() as patch:
        patch.setattr(backing, "_set_direct", fail)
        with pytest.raises(DiskReadError, match="while its first page was read"):
            hybrimoe.wrap(model, device="cpu", ram=0.5, spill=str(tmp_path))

    assert_nothing_is_left(tmp_path, files)
    assert same(answer(hybrimoe.wrap(model, device="cpu")), expected(device="cpu"))


# Failures while it runs.


@pytest.mark.parametrize("device", ["cpu", "emulated"])
@pytest.mark.parametrize("k", [0, 7, 60])
def test_a_read_error_is_raised_and_the_model_works_afterwards(expected, monkeypatch, device, k):
    model = hybrimoe.wrap(load(), device=device, ram=0.25)
    real, reads = os.preadv, []

    def preadv(file, buffers, offset):
        if threading.current_thread().name == "hybrimoe-reader":
            reads.append(offset)
            if len(reads) > k:
                raise OSError(errno.EIO, "Input/output error")
        return real(file, buffers, offset)

    with monkeypatch.context() as patch:
        patch.setattr(backing.os, "preadv", preadv)
        with pytest.raises(DiskReadError, match=r"at byte \d+: Input/output error") as caught:
            answer(model)
    assert caught.value.offset in reads[k:]
    assert same(answer(model), expected(device=device))
    hybrimoe.unwrap(model)
    assert readers() == []


def test_a_file_that_became_shorter_is_named(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "copy")
    model = hybrimoe.from_pretrained(tmp_path / "copy", device="cpu", ram=0.2)
    path = Path(model.hybrimoe.pool.tier.backing.places[1].path)
    for size in (100_001, 5000, 0):
        os.truncate(path, size)
        with pytest.raises(DiskReadError, match="has become shorter") as caught:
            answer(model)
        assert caught.value.path == str(path)


@pytest.mark.parametrize("direct", [True, False])
def test_reads_that_come_in_pieces_are_put_together(expected, monkeypatch, direct):
    real, short = os.preadv, []

    def preadv(file, buffers, offset):
        if len(buffers[0]) > 4096:
            short.append(offset)
            return real(file, [buffers[0][:4096]], offset)
        return real(file, buffers, offset)

    if not direct:
        monkeypatch.setattr(backing, "_set_direct", lambda file: False)
    model = hybrimoe.wrap(load(), device="cpu", ram=0.25)
    monkeypatch.setattr(backing.os, "preadv", preadv)

    assert same(answer(model), expected(device="cpu"))
    assert short


def test_files_that_are_removed_meanwhile_can_still_be_read(packed, expected, tmp_path):
    shutil.copytree(packed, tmp_path / "copy")
    model = hybrimoe.from_pretrained(tmp_path / "copy", device="cpu", ram=0.2)
    shutil.rmtree(tmp_path / "copy")

    assert same(answer(model), expected(device="cpu", weights="int4"))


def test_a_damaged_packed_file_is_refused_at_the_load(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "copy")
    path = next((tmp_path / "copy").glob("packed-*/experts-00001.safetensors"))
    with path.open("r+b") as file:
        file.seek(-7, os.SEEK_END)
        file.write(b"\x55")

    with pytest.raises(hybrimoe.errors.CheckpointError, match="checksum"):
        hybrimoe.from_pretrained(tmp_path / "copy", device="cpu", ram=0.2)


# Whole processes.

COMMON = """
import gc, json, os, signal, sys, threading, time, warnings
from pathlib import Path
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
import torch, transformers, hybrimoe
warnings.simplefilter("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
"""

PEAK = """
def peak(load):
    gc.collect()
    before, samples, done = anonymous(), [], threading.Event()

    def sample():
        while not done.is_set():
            samples.append(anonymous())
            time.sleep(0.001)

    sampler = threading.Thread(target=sample)
    sampler.start()
    model = load()
    model.generate(torch.arange(64)[None] % 64, max_new_tokens=2, do_sample=False)
    done.set()
    sampler.join()
    return max(samples) - before, model

settings = {"weights": "int4", "device": "cpu"}
warm = hybrimoe.from_pretrained(sys.argv[1], ram=0.5, **settings)  # compiles
warm.generate(torch.arange(64)[None], max_new_tokens=2, do_sample=False)
del warm
loaded, model = peak(lambda: hybrimoe.from_pretrained(sys.argv[2], ram=0.25, **settings))
hybrimoe.save_packed(model, sys.argv[3])
numbers = {
    "slab": model.hybrimoe.pool.tier.slab.nbytes, "pool": model.hybrimoe.pool.nbytes,
    "layer": model.hybrimoe.layers[0].native_bytes, "dense": sum(p.nbytes for p in model.parameters()),
}
del model
packed, model = peak(lambda: hybrimoe.from_pretrained(sys.argv[3], ram=0.25, **settings))
print(json.dumps({"loaded": loaded, "packed": packed, **numbers}))
"""

KILLED = """
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
hybrimoe.wrap(model, device="cpu", ram=0.5, spill=sys.argv[2])
model.generate(torch.arange(8)[None], max_new_tokens=2, do_sample=False)
print("ready", flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""

EXITS = """
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
hybrimoe.wrap(model, device="cpu", ram=0.5, spill=sys.argv[2])
tokens = model.generate(torch.arange(8)[None], max_new_tokens=8, do_sample=False)
print(json.dumps(tokens[0].tolist()))
"""


def run(code, *arguments):
    command = [sys.executable, "-c", COMMON + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc")
def test_memory_stays_within_the_budget_and_one_layer(tmp_path):
    import generated

    folder = generated.write(
        tmp_path / "big", generated.configuration(6, 1024, 512, 16, 512), shards=6
    )
    done = run(PEAK, str(TINY_MOE), str(folder), str(tmp_path / "packed"))
    assert done.returncode == 0, done.stderr[-2000:]
    used = json.loads(done.stdout.splitlines()[-1])
    room = used["slab"] + used["dense"] + used["layer"]

    assert room < used["pool"] + used["dense"]  # or all of it would pass
    assert used["slab"] <= 0.26 * used["pool"]
    assert used["slab"] * 0.9 <= used["packed"] <= room
    assert used["slab"] * 0.9 <= used["loaded"] <= room


@pytest.mark.skipif(not hasattr(os, "fork"), reason="signals")
def test_a_killed_process_leaves_no_file_and_harms_no_other_in_its_folder(tmp_path):
    arguments = str(TINY_MOE), str(tmp_path)
    with ThreadPoolExecutor(2) as pool:
        killed, other = pool.map(lambda code: run(code, *arguments), (KILLED, EXITS))

    assert killed.stdout == "ready\n", killed.stderr[-2000:]
    assert killed.returncode == -9
    assert other.returncode == 0, other.stderr[-2000:]  # and it ends without unwrap
    found = hybrimoe.wrap(AutoModelForCausalLM.from_pretrained(TINY_MOE), device="cpu")
    wanted = found.generate(torch.arange(8)[None], max_new_tokens=8, do_sample=False)
    assert json.loads(other.stdout) == wanted[0].tolist()
    assert list(tmp_path.iterdir()) == []


def test_nothing_warns_on_the_way(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = hybrimoe.wrap(load(), device="cpu", ram=0.5, spill=str(tmp_path))
        answer(model)
        hybrimoe.unwrap(model)
