"""`hybrimoe.plan`: every byte it names is compared with one that was really taken."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import families
import generated
import hybrimoe
import hybrimoe.memory.plan
from hybrimoe.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    InsufficientMemoryError,
)
from hybrimoe.formats.registry import choices
from hybrimoe.limits import MARGIN, host_memory
from hybrimoe.models.adapters import find_experts
from hybrimoe.models.forward import forward_memory, storage_bytes
from hybrimoe.models.releases import cache_in
from paths import TINY_MOE
from processes import needs_proc, run, start

MIB, GIB = 1 << 20, 1 << 30
TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """About 650 MiB, most of it experts."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return generated.write(folder, generated.configuration(6, 512, 256, 128, 32000), shards=3)


@pytest.mark.parametrize("weights", choices())
def test_parts_are_those_of_the_wrapped_model(model, weights):
    found = hybrimoe.plan(TINY_MOE, weights=weights)
    hybrimoe.wrap(model, weights=weights)
    dense = {id(t): t for t in (*model.parameters(), *model.buffers())}

    assert found.parts["experts"] == model.hybrimoe.pool.nbytes
    assert found.parts["dense"] == sum(tensor.nbytes for tensor in dense.values())
    assert list(found.layers) == [layer.name for layer in model.hybrimoe.layers]
    assert sum(found.layers.values()) == found.parts["experts"]


def test_a_loaded_model_is_planned_for_wrap(model):
    found = hybrimoe.plan(model, weights="int4")
    same = hybrimoe.plan(TINY_MOE, weights="int4")

    assert found.call == "hybrimoe.wrap(model, weights='int4')"
    assert (found.parts["dense"], found.parts["experts"]) == (
        same.parts["dense"],
        same.parts["experts"],
    )
    hybrimoe.wrap(model)
    with pytest.raises(hybrimoe.WrappedModelError, match="before it is wrapped"):
        hybrimoe.plan(model)


@pytest.mark.parametrize("weights", choices())
def test_packed_files_are_planned_as_what_they_load_to(tmp_path, weights):
    loaded = hybrimoe.from_pretrained(TINY_MOE, weights=weights)
    hybrimoe.save_packed(loaded, tmp_path)
    found = hybrimoe.plan(tmp_path)
    wanted = hybrimoe.plan(TINY_MOE, weights=weights)

    assert found.parts["experts"] == loaded.hybrimoe.pool.nbytes
    assert (found.parts["dense"], found.layers) == (wanted.parts["dense"], wanted.layers)
    assert [row.weights for row in found.formats] == [weights]
    assert (found.checkpoint.packed, found.checkpoint.files, found.notes) == (weights, 13, ())
    assert eval(found.call, {"hybrimoe": hybrimoe}).hybrimoe.config.weights == weights
    assert "files of" in str(found)


def test_packed_files_have_one_format_and_must_be_whole(tmp_path):
    hybrimoe.save_packed(hybrimoe.from_pretrained(TINY_MOE, weights="int8"), tmp_path)

    with pytest.raises(ConfigError, match="must be 'int8', which the experts"):
        hybrimoe.plan(tmp_path, weights="int4")
    assert "no format fits" in hybrimoe.plan(tmp_path, ram="1MiB").nearest
    (last,) = tmp_path.glob("packed-*/experts-00011.safetensors")
    last.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        hybrimoe.plan(tmp_path)


FAMILIES = (
    *("mixtral.MixtralExperts", "gpt_oss.GptOssExperts", "deepseek_v3.DeepseekV3Experts"),
    *("qwen3_next.Qwen3NextExperts", "jamba.JambaExperts", "minimax.MiniMaxExperts"),
    *("nemotron_h.NemotronHExperts", "gemma4.Gemma4TextExperts"),
)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_cache_is_as_large_as_the_one_a_forward_pass_fills(name):
    if name not in families.decorated():
        pytest.skip("this transformers does not have it")
    model, tokens = families.build(name), 40
    with torch.no_grad():
        filled = cache_in(model(torch.full((1, tokens), 5), use_cache=True))
    with torch.device("meta"):
        skeleton = type(model)._from_config(model.config, dtype=torch.float32).eval()
    found = forward_memory(skeleton, find_experts(skeleton), tokens)

    assert found.traced
    assert found.cache_bytes == storage_bytes(filled) > tokens * model.dtype.itemsize
    assert found.activation_bytes > 2 * tokens * model.config.get_text_config().hidden_size


def test_what_cannot_be_traced_is_estimated_and_said_so():
    name = "qwen4_exp.Qwen4ExpTextExperts"
    if name not in families.decorated():
        pytest.skip("this transformers does not have it")
    found = hybrimoe.plan(families.build(name), context=64)

    assert not found.traced
    assert found.parts["kv_cache"] > 0
    assert "estimated by a formula" in str(found)


def test_sixty_shards_are_planned_from_their_headers(tmp_path):
    """A checkpoint of the size of Qwen3-235B-A22B, whose weights are holes."""
    config = generated.configuration(94, 4096, 1536, 128, 151936)
    generated.write_hollow(tmp_path, config, shards=60)
    before = _bytes_read()
    found = hybrimoe.plan(tmp_path, ram="200GiB")

    assert found.checkpoint.files == 60
    assert found.checkpoint.nbytes > 400 * GIB
    assert found.parts["dense"] + 94 * 128 * 3 * 4096 * 1536 * 2 == pytest.approx(
        found.checkpoint.nbytes, rel=1e-3
    )
    assert (found.weights, found.fits) == ("int4", True)
    assert _bytes_read() - before < 64 * MIB


def _bytes_read() -> int:
    path = Path("/proc/self/io")
    return int(path.read_text().split()[1]) if path.exists() else 0


MEASURE = """
CONTEXT = 256

def write(model, tokens):
    ids = torch.arange(5, 5 + tokens - 4)[None]
    model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)

def loaded(path):
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype="auto")

path, tiny, weights = sys.argv[1:]
write(hybrimoe.from_pretrained(tiny, weights=weights), 32)  # compiles, which takes memory too
"""
LOAD = """
found = hybrimoe.plan(path, weights=weights, context=CONTEXT)
with Peak() as peak:
    model = hybrimoe.from_pretrained(path, weights=weights)
    load = peak.bytes()
    write(model, CONTEXT)
print(json.dumps({"load": load, "all": peak.last,
                  "plan_load": found.load_peak_bytes, "plan_all": found.peak_bytes}))
"""
WRAP = """
model = loaded(path)
for parameter in model.parameters():
    parameter.data = parameter.data.clone()  # not a map of the file
gc.collect()
found = hybrimoe.plan(model, weights=weights, context=CONTEXT)
experts = [layer.mlp.experts for layer in model.model.layers]
held = found.parts["dense"] + sum(p.nbytes for module in experts for p in module.parameters())
del experts
with Peak() as peak:
    hybrimoe.wrap(model, weights=weights)
print(json.dumps({"load": peak.last + held, "plan_load": found.load_peak_bytes}))
"""


@needs_proc
@pytest.mark.parametrize("weights", ["native", "int4"])
def test_the_peak_of_loading_and_running_is_foreseen(checkpoint, weights):
    took = run(MEASURE + LOAD, checkpoint, TINY_MOE, weights)

    assert 0.98 * took["load"] <= took["plan_load"] <= 1.05 * took["load"]
    assert 0.98 * took["all"] <= took["plan_all"] <= 1.05 * took["all"]


@needs_proc
def test_the_peak_of_wrapping_is_foreseen(checkpoint):
    took = run(MEASURE + WRAP, checkpoint, TINY_MOE, "native")

    assert 0.98 * took["load"] <= took["plan_load"] <= 1.05 * took["load"]


def test_the_most_precise_format_that_fits_is_chosen(checkpoint):
    peaks = {row.weights: row.peak_bytes for row in hybrimoe.plan(checkpoint, context=512).formats}
    assert peaks["native"] > peaks["int8"] > peaks["int4"]

    for weights in choices():
        found = hybrimoe.plan(checkpoint, ram=peaks[weights], context=512)
        assert (found.weights, found.fits) == (weights, True)
        assert found.ensure_fits() is found
        assert f"weights={weights!r}" in found.call


def test_what_does_not_fit_names_need_have_and_a_format_that_does(checkpoint):
    found = hybrimoe.plan(checkpoint, ram="400MiB", weights="native", context=512)
    with pytest.raises(InsufficientMemoryError) as raised:
        found.ensure_fits()

    assert (raised.value.need, raised.value.have) == (found.peak_bytes, 400 * MIB)
    assert re.search(r"needs 6\d\d\.\d MiB .* 400\.0 MiB available", str(raised.value))
    assert "weights='int8' fits" in raised.value.nearest
    assert "weights='int8'" in found.call


def test_a_shorter_context_is_offered_where_the_cache_is_too_large(checkpoint):
    whole = hybrimoe.plan(checkpoint, weights="int4", context=65536)
    found = hybrimoe.plan(checkpoint, ram="300MiB", weights="int4", context=65536)
    offered = int(re.search(r"context=(\d+)", found.nearest)[1])

    assert whole.parts["kv_cache"] > 100 * MIB
    assert not found.fits
    assert hybrimoe.plan(checkpoint, ram="300MiB", weights="int4", context=offered).fits


def test_where_nothing_fits_no_call_is_offered(checkpoint):
    found = hybrimoe.plan(checkpoint, ram="20MiB")

    assert found.call == ""
    assert "no format fits" in found.nearest
    with pytest.raises(InsufficientMemoryError, match="MiB of memory are missing"):
        found.ensure_fits()


def test_slots_go_to_the_gpu_with_the_dense_part(checkpoint):
    found = hybrimoe.plan(checkpoint, vram=0.25, weights="int4")
    expert = found.parts["experts"] // found.experts

    assert found.slots == found.experts // 4
    assert set(found.ram) == {"experts", "workspace"}
    assert found.gpu["slots"] >= found.slots * expert
    assert found.gpu["dense"] == found.parts["dense"]
    assert "vram=0.25" in found.call


@pytest.mark.parametrize(
    ("free", "nearest", "call"),
    [(3 * GIB, "vram=", "vram="), (200 * MIB, "device='cpu' fits", "device='cpu'")],
)
def test_a_gpu_that_is_too_small_is_said_so(tmp_path, monkeypatch, free, nearest, call):
    config = generated.configuration(8, 2048, 768, 128, 32000)  # 9 GiB of experts
    folder = generated.write_hollow(tmp_path, config, shards=2)
    monkeypatch.setattr(hybrimoe.memory.plan, "_gpu_free", lambda: free)
    monkeypatch.setattr(hybrimoe.memory.plan, "_gpu_name", lambda: None)
    found = hybrimoe.plan(folder, vram=free, ram="20GiB", weights="native", context=512)
    with pytest.raises(InsufficientMemoryError, match="of GPU memory"):
        found.ensure_fits()

    assert nearest in found.nearest
    assert call in found.call


def test_text_table_and_dict_say_the_same():
    found = hybrimoe.plan(TINY_MOE, vram="3MiB")
    text, table = str(found), found._repr_html_()

    assert json.loads(json.dumps(found.to_dict()))["peak_bytes"] == found.peak_bytes
    for word in ("dense weights", "KV cache", "expert slots", "int8", "It fits: hybrimoe."):
        assert word in text
        assert word in table
    assert table.startswith("<table>")
    assert table.count("<tr>") == table.count("</tr>") > 8
    assert "<pre>" not in table


def test_names_are_escaped_in_html(tmp_path):
    folder = tmp_path / "<b>"
    config = generated.configuration(1, 64, 32, 8, 64)

    assert "<b>" not in hybrimoe.plan(generated.write(folder, config, 1))._repr_html_()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"weights": "int2"}, "weights must be one of"),
        ({"context": 0}, "context must be a positive number"),
        ({"vram": "lots"}, "vram must be"),
        ({"ram": -1}, "ram must be"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(hybrimoe.ConfigError, match=message):
        hybrimoe.plan(TINY_MOE, **arguments)


@pytest.mark.parametrize("name", ["", str(TINY_MOE / "config.json")])
def test_a_name_of_nothing_is_an_error_of_its_own(name):
    with pytest.raises(CheckpointNotFoundError, match="no folder with a checkpoint"):
        hybrimoe.plan(name)


@pytest.mark.parametrize("ram", ["24GiB", "24000MB", "0.5", 0.25, 24 << 30])
def test_a_budget_is_shown_as_it_was_given(ram):
    assert f"ram={ram!r}" in hybrimoe.plan(TINY_MOE, ram=ram).have_limit


def test_a_dense_model_is_refused(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        num_hidden_layers=1, hidden_size=32, intermediate_size=32, vocab_size=64,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    with pytest.raises(hybrimoe.UnsupportedModelError, match="no routed experts"):
        hybrimoe.plan(tmp_path)


def test_planning_changes_no_model(model):
    before = {name: id(module) for name, module in model.named_modules()}
    hybrimoe.plan(model)

    assert {name: id(module) for name, module in model.named_modules()} == before
    assert isinstance(model, type(AutoModelForCausalLM.from_config(model.config)))


LIMITED = """
import resource
from hybrimoe.cli.main import main
main(["plan", sys.argv[2]])  # loads all that is imported late
line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("VmSize"))
limit = int(line.split()[1]) * 1024 + (600 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
sys.exit(main(["generate", sys.argv[1], "--prompt", "x", "--weights", "native"]))
"""


@needs_proc
def test_too_little_address_space_is_a_message_and_no_crash(checkpoint, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (checkpoint / name).write_bytes((TINY_MOE / name).read_bytes())
    done = start(LIMITED, checkpoint, TINY_MOE)

    assert done.returncode == 1, done.stderr[-2000:]
    assert re.search(r"needs .*RLIMIT_AS of .*weights='int", done.stderr.splitlines()[-1])
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
@needs_proc
def test_files_that_the_load_maps_count_where_a_limit_counts_them(checkpoint, monkeypatch, limit):
    import resource

    field = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}[limit]
    lines = Path("/proc/self/status").read_text().splitlines()
    used = next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))
    need = hybrimoe.plan(checkpoint, weights="int4", context=512).peak_bytes
    files = sum(path.stat().st_size for path in checkpoint.glob("*.safetensors"))
    soft = used + MARGIN + need + files // 2  # enough, but for the files
    original = resource.getrlimit

    def limited(which):
        return (soft, soft) if which == getattr(resource, limit) else original(which)

    monkeypatch.setattr(resource, "getrlimit", limited)
    found = hybrimoe.plan(checkpoint, weights="int4", context=512)

    assert found.checkpoint.mapped == files
    assert not found.fits
    assert re.match(rf"{limit} of .*, which counts .* of mapped files", found.have_limit)
    soft += 2 * files
    assert hybrimoe.plan(checkpoint, weights="int4", context=512).fits


def test_of_packed_files_only_the_dense_weights_are_mapped(tmp_path):
    hybrimoe.save_packed(hybrimoe.from_pretrained(TINY_MOE, weights="int4"), tmp_path)
    found = hybrimoe.plan(tmp_path)
    (dense,) = tmp_path.glob("packed-*/dense.safetensors")

    assert found.checkpoint.mapped == dense.stat().st_size < found.checkpoint.nbytes / 2


def test_what_does_not_fit_is_offered_with_experts_on_disk(checkpoint):
    """`ram` of the plan is for the whole model, `ram` in the call for its experts alone."""
    whole = hybrimoe.plan(checkpoint, weights="int4", context=256)
    room = whole.peak_bytes - 60 * MIB
    found = hybrimoe.plan(checkpoint, ram=room, context=256)
    budget = int(re.search(r"ram='(\d+)MiB'", found.call)[1]) * MIB
    model = eval(found.call, {"hybrimoe": hybrimoe})

    assert not found.fits
    assert "weights='int4' with ram='" in found.nearest
    assert found.nearest.endswith("fits, with the other experts on disk")
    assert room - 2 * found.parts["dense"] < budget < room - found.parts["dense"]
    assert model.hybrimoe.pool.tier is not None


def test_a_loaded_model_is_not_offered_a_disk(model):
    held = hybrimoe.plan(model, weights="int4")

    assert "on disk" not in hybrimoe.plan(model, weights="int4", ram="1MiB").nearest
    assert held.fits


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_cgroup_of_version_2_limits_the_plan(tmp_path):
    group = "sys/fs/cgroup/user/job"
    files = {
        "proc/self/cgroup": "0::/user/job\n",
        f"{group}/memory.max": "max\n",
        f"{group}/memory.current": str(50 * MIB),
        "sys/fs/cgroup/user/memory.max": str(100 * MIB),
        "sys/fs/cgroup/user/memory.current": str(60 * MIB),
        "sys/fs/cgroup/user/memory.stat": f"anon 1\ninactive_file {20 * MIB}\nactive_file {MIB}\n",
    }
    found = host_memory(tree(tmp_path, files))

    assert found.free == (100 - (60 - 21)) * MIB  # the page cache of the group is given back
    assert "cgroup limit of 100.0 MiB" in found.limit
    (tmp_path / f"{group}/memory.high").write_text(str(51 * MIB))
    assert host_memory(tmp_path).free == MIB


def test_a_cgroup_of_version_1_limits_the_plan(tmp_path):
    group = "sys/fs/cgroup/memory/docker/abc"
    files = {
        "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n",
        f"{group}/memory.limit_in_bytes": str(100 * MIB),
        f"{group}/memory.usage_in_bytes": str(70 * MIB),
        f"{group}/memory.stat": f"total_inactive_file {10 * MIB}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
        "sys/fs/cgroup/memory/memory.usage_in_bytes": "1\n",
    }

    assert host_memory(tree(tmp_path, files)).free == 40 * MIB


def test_in_a_container_the_path_of_the_host_does_not_exist(tmp_path):
    files = {
        "proc/self/cgroup": "0::/system.slice/docker-abc.scope\n",
        "sys/fs/cgroup/memory.max": str(64 * MIB),
        "sys/fs/cgroup/memory.current": str(4 * MIB),
    }

    assert host_memory(tree(tmp_path, files)).free == 60 * MIB


def test_without_limits_the_machine_decides(tmp_path):
    assert (
        host_memory(tree(tmp_path, {"proc/self/cgroup": "0::/\n"})).limit == "memory of the machine"
    )


def test_a_plan_in_a_small_cgroup_is_refused(monkeypatch, tmp_path):
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": str(260 * MIB),
        "sys/fs/cgroup/memory.current": "0",
    }
    have = host_memory(tree(tmp_path, files))
    monkeypatch.setattr(hybrimoe.memory.plan, "host_memory", lambda **_: have)
    with pytest.raises(InsufficientMemoryError, match=r"cgroup limit of 260\.0 MiB"):
        hybrimoe.plan(TINY_MOE).ensure_fits()
