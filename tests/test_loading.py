"""A checkpoint loaded straight into the pool is the model that wrap makes of it."""

import functools
import gc
import json
import re
import shutil
import signal
import subprocess
import sys
import warnings
import weakref
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    pipeline,
)
from transformers.utils import logging

import families
import generated
import hybrimoe
from hybrimoe.config import Config
from hybrimoe.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    FormatError,
    InsufficientMemoryError,
    UnsupportedModelError,
)
from hybrimoe.formats.layout import expert_layout
from hybrimoe.limits import MARGIN, HostMemory
from hybrimoe.models.adapters import find_experts
from hybrimoe.sources import load_memory
from hybrimoe.sources.sink import ExpertSink
from paths import TINY_MOE

LOSSY = "ignore:the experts were stored as"


def through_transformers(path, **config):
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=Config(**config))


DOORS = {"hybrimoe": hybrimoe.from_pretrained, "transformers": through_transformers}


def generate(model, tokenizer) -> list[list[int]]:
    inputs = tokenizer("def main(arguments):\n    ", return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=16, do_sample=False).tolist()


def assert_same_pool(got, wanted) -> None:
    assert len(got.hybrimoe.layers) == len(wanted.hybrimoe.layers) > 0
    for a, b in zip(got.hybrimoe.layers, wanted.hybrimoe.layers):
        assert a.name == b.name
        assert a.packed[:4] == b.packed[:4]
        assert (a.packed.blobs == b.packed.blobs).all()
        assert a.checksum == b.checksum


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A copy of the bundled checkpoint that a test may spoil."""
    return Path(shutil.copytree(TINY_MOE, tmp_path / "checkpoint"))


@pytest.fixture
def small(tmp_path) -> Path:
    """A sharded checkpoint of 2 layers with 4 experts each."""
    config = generated.configuration(2, 64, 32, 4, 128)
    config.num_experts_per_tok = 2
    return generated.write(tmp_path / "small", config, 3)


# Both doors.


@pytest.mark.parametrize("weights", ["native", "int8", "int4"])
@pytest.mark.parametrize("door", DOORS)
def test_a_loaded_model_has_the_blobs_and_the_tokens_of_a_wrapped_one(
    door, weights, model, tokenizer
):
    loaded = DOORS[door](TINY_MOE, weights=weights)
    hybrimoe.wrap(model, weights=weights)

    assert_same_pool(loaded, model)
    assert generate(loaded, tokenizer) == generate(model, tokenizer)
    assert loaded.hybrimoe.config == Config(weights=weights)
    assert not any(module.training for module in loaded.modules())


@pytest.mark.parametrize("name", families.decorated())
def test_every_family_loads_bit_equal(name, tmp_path):
    if name in families.SKIPPED:
        pytest.skip(families.SKIPPED[name])
    built = families.build(name)
    built.save_pretrained(tmp_path)
    plain = hybrimoe.wrap(type(built).from_pretrained(tmp_path, dtype=torch.float32))
    loaded = type(built).from_pretrained(
        tmp_path, dtype=torch.float32, quantization_config=Config()
    )

    assert_same_pool(loaded, plain)
    plain, loaded = (hybrimoe.unwrap(model).state_dict() for model in (plain, loaded))
    assert loaded.keys() == plain.keys()
    assert all(torch.equal(loaded[key], plain[key]) for key in plain)


def test_per_expert_tensors_are_read_a_few_at_a_time_and_never_merged(monkeypatch, small):
    shapes, merged = [], []
    stream, accept = ExpertSink.stream, ExpertSink.accept

    def watched(self, name, fill):
        def seen(out, first):
            shapes.append(tuple(out.shape))
            fill(out, first)

        stream(self, name, seen)

    monkeypatch.setattr(ExpertSink, "stream", watched)
    monkeypatch.setattr(ExpertSink, "accept", lambda *a: (merged.append(a[1]), accept(*a)))
    monkeypatch.setattr("hybrimoe.sources.sink.STAGING_BYTES", 3 * 2 * 32 * 64 * 2)
    loaded = hybrimoe.from_pretrained(small, weights="native")

    assert merged == []
    assert (3, 64, 64) in shapes  # 3 experts at a time, then the last one
    assert (1, 64, 64) in shapes
    plain = hybrimoe.wrap(AutoModelForCausalLM.from_pretrained(small))
    assert_same_pool(loaded, plain)


def test_dense_weights_are_those_of_the_checkpoint(model):
    loaded = hybrimoe.from_pretrained(TINY_MOE)
    wanted = dict(model.named_parameters())

    for name, parameter in loaded.named_parameters():
        assert torch.equal(parameter, wanted[name]), name
        assert parameter.dtype == wanted[name].dtype
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight  # still tied


@pytest.mark.parametrize("dtype", [torch.float32, "float16"])
def test_the_dtype_asked_for_is_the_dtype_of_dense_weights_and_experts(dtype):
    loaded = hybrimoe.from_pretrained(TINY_MOE, dtype=dtype)
    plain = hybrimoe.wrap(AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=dtype))

    assert_same_pool(loaded, plain)
    assert {p.dtype for p in loaded.parameters()} == {p.dtype for p in plain.parameters()}


def test_settings_may_come_in_a_config_or_by_name():
    both = hybrimoe.from_pretrained(TINY_MOE, Config(weights="int4"), threads=1)

    assert both.hybrimoe.config == Config(weights="int4", threads=1)


def test_an_accelerator_is_opened_as_by_wrap(tokenizer):
    loaded = hybrimoe.from_pretrained(TINY_MOE, device="emulated", vram=0.5)

    generate(loaded, tokenizer)
    assert loaded.hybrimoe.hybrid is not None
    hybrimoe.unwrap(loaded)


# Afterwards it is like a wrapped model.


@pytest.mark.filterwarnings(LOSSY)
def test_nothing_of_the_loader_stays_on_the_model(model):
    loaded = hybrimoe.from_pretrained(TINY_MOE, weights="int4")

    assert not hasattr(loaded, "hf_quantizer")
    assert not hasattr(loaded, "quantization_method")
    assert not loaded.is_quantized
    assert loaded.config.to_dict() == model.config.to_dict()
    assert not hasattr(loaded.config, "_is_quantized")


def test_native_weights_come_back_bit_equal(model):
    loaded = hybrimoe.unwrap(hybrimoe.from_pretrained(TINY_MOE))

    wanted, got = model.state_dict(), loaded.state_dict()
    assert got.keys() == wanted.keys()
    assert all(torch.equal(got[name], wanted[name]) for name in wanted)
    assert [type(m) for m in loaded.modules()] == [type(m) for m in model.modules()]


def test_rounded_weights_come_back_with_the_usual_warning():
    loaded = hybrimoe.from_pretrained(TINY_MOE, weights="int8")

    with pytest.warns(UserWarning, match="dequantized ones"):
        hybrimoe.unwrap(loaded)
    assert loaded.model.layers[0].mlp.experts.down_proj.shape == (32, 192, 64)


def test_verify_and_report_know_the_model():
    loaded = hybrimoe.from_pretrained(TINY_MOE, weights="int4")

    assert hybrimoe.verify(loaded)
    assert "int4" in str(loaded.hybrimoe.report())


def test_save_pretrained_writes_the_checkpoint_s_own_names(tmp_path, model, tokenizer):
    loaded = hybrimoe.from_pretrained(TINY_MOE)
    loaded.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)

    assert generate(again, tokenizer) == generate(model, tokenizer)
    names = set(read_names(tmp_path / "model.safetensors"))
    assert "model.layers.0.mlp.experts.3.gate_proj.weight" in names


def read_names(path: Path) -> list[str]:
    with path.open("rb") as file:
        return list(json.loads(file.read(int.from_bytes(file.read(8), "little"))))


# What cannot be.


PLACED = ["cuda", "balanced", {"": "meta"}, {"model": 0}, {"model": "cpu", "lm_head": "disk"}]


@pytest.mark.parametrize("device_map", PLACED)
def test_other_devices_than_the_cpu_are_refused(device_map):
    with pytest.raises(ConfigError, match="device_map must be left out, 'auto' or 'cpu'"):
        hybrimoe.from_pretrained(TINY_MOE, device_map=device_map)


def test_other_devices_are_refused_in_transformers_door():
    for device_map in ("balanced", {"model": "cpu", "lm_head": "disk"}):
        with pytest.raises(ConfigError, match="device_map must be left out, 'auto' or 'cpu'"):
            AutoModelForCausalLM.from_pretrained(
                TINY_MOE, quantization_config=Config(), device_map=device_map
            )


@pytest.mark.parametrize("device_map", [None, "auto", "cpu", {"": "cpu"}, torch.device("cpu")])
def test_the_cpu_and_our_own_placing_are_accepted(device_map):
    assert hybrimoe.from_pretrained(TINY_MOE, device_map=device_map).hybrimoe.layers


def test_our_own_placing_is_accepted_in_every_door(tokenizer):
    arguments = {"device_map": "auto", "quantization_config": Config(device="emulated", vram=0.25)}
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, **arguments)
    write = pipeline(
        "text-generation",
        model=str(TINY_MOE),
        device_map="auto",
        model_kwargs={"quantization_config": Config(weights="int4")},
    )
    placed = AutoModelForCausalLM.from_pretrained(TINY_MOE, device_map="auto")

    assert model.hybrimoe.hybrid is not None
    assert not hasattr(model, "hf_device_map")
    assert write.model.hybrimoe.config == Config(weights="int4")
    if not torch.cuda.is_available():
        assert generate(hybrimoe.wrap(placed), tokenizer) == generate(model, tokenizer)


def test_what_accelerate_offloaded_is_refused_before_it_is_touched(tmp_path):
    device_map = {"model.embed_tokens": "cpu", "lm_head": "cpu", "model.norm": "cpu"}
    device_map |= {"model.rotary_emb": "cpu"}
    device_map |= {f"model.layers.{n}": "disk" if n > 9 else "cpu" for n in range(12)}
    model = AutoModelForCausalLM.from_pretrained(
        TINY_MOE, device_map=device_map, offload_folder=tmp_path
    )

    with pytest.raises(UnsupportedModelError, match="must be on the CPU to be wrapped"):
        hybrimoe.wrap(model)
    assert not hasattr(model, "hybrimoe")


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("quantization_config", Config()),
        ("state_dict", {"a": 1}),
        ("tp_plan", "auto"),
        ("ignore_mismatched_sizes", True),
        ("max_memory", {"cpu": "1GiB"}),
        ("offload_folder", "folder"),
        ("device_map", {}),
        ("dtype", 5),
        ("dtype", "torch.float16"),
        ("subfolder", 5),
    ],
)
def test_arguments_that_mean_something_else_here_are_refused(argument, value):
    with pytest.raises(ConfigError, match=argument):
        hybrimoe.from_pretrained(TINY_MOE, **{argument: value})


def test_another_kind_of_config_is_refused():
    with pytest.raises(ConfigError, match=r"must be a hybrimoe\.Config"):
        hybrimoe.from_pretrained(TINY_MOE, Qwen3MoeConfig())


def test_an_unknown_setting_is_refused_by_the_model():
    with pytest.raises(TypeError, match="wheights"):
        hybrimoe.from_pretrained(TINY_MOE, wheights="int4")


def test_a_dtype_experts_cannot_have_is_refused():
    with pytest.raises(FormatError, match="float64"):
        hybrimoe.from_pretrained(TINY_MOE, dtype=torch.float64)


def test_a_dense_model_is_refused(tmp_path):
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 32}
    config |= {"intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(**config)).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="no routed experts"):
        hybrimoe.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["/nowhere/at/all", "./nowhere", "nobody/has-this-model"])
def test_a_name_that_is_nothing_is_not_found(name):
    with pytest.raises(CheckpointNotFoundError):
        hybrimoe.from_pretrained(name)


@pytest.mark.parametrize("door", [hybrimoe.from_pretrained, hybrimoe.plan])
@pytest.mark.parametrize("name", [None, 5, b"folder", ["folder"], "a\0b"])
def test_what_cannot_be_a_name_is_refused(name, door):
    with pytest.raises(ConfigError, match="must be a path or a name"):
        door(name)


@pytest.mark.parametrize("door", [hybrimoe.from_pretrained, hybrimoe.plan])
def test_a_name_too_long_for_the_system_is_not_found(door):
    with pytest.raises(CheckpointNotFoundError):
        door("x" * 5000)


def test_a_folder_that_is_not_in_the_folder_is_not_found():
    with pytest.raises(CheckpointNotFoundError, match="subfolder='nowhere'"):
        hybrimoe.from_pretrained(TINY_MOE, subfolder="nowhere")


@pytest.mark.parametrize("door", DOORS)
def test_experts_of_another_size_than_config_json_says_are_refused(door, checkpoint):
    edit(checkpoint / "config.json", moe_intermediate_size=96)

    with pytest.raises(CheckpointError, match="must have the shape"):
        DOORS[door](checkpoint)


@pytest.mark.parametrize("door", DOORS)
def test_dense_weights_of_another_size_are_refused(door, checkpoint):
    edit(checkpoint / "config.json", vocab_size=4000)

    with pytest.raises(CheckpointError, match=r"embed_tokens.*must have the shape \(4000, 192\)"):
        DOORS[door](checkpoint)


@pytest.mark.parametrize("door", DOORS)
def test_experts_that_the_checkpoint_lacks_are_named(door, checkpoint):
    edit(checkpoint / "config.json", num_hidden_layers=13, layer_types=["full_attention"] * 13)

    with pytest.raises(CheckpointError, match=r"no weights for model\.layers\.12\.mlp\.experts"):
        DOORS[door](checkpoint)


def test_too_many_experts_in_config_json_are_refused(checkpoint):
    edit(checkpoint / "config.json", num_experts=33)

    with pytest.raises(CheckpointError):
        hybrimoe.from_pretrained(checkpoint)


def test_weights_that_a_format_cannot_hold_are_refused_by_name(tmp_path, model):
    with torch.no_grad():
        model.model.layers[3].mlp.experts.down_proj[7, 2, 2] = float("nan")
    model.save_pretrained(tmp_path)

    with pytest.raises(FormatError, match=r"model\.layers\.3\.mlp\.experts\.down_proj"):
        hybrimoe.from_pretrained(tmp_path, weights="int4")
    assert hybrimoe.from_pretrained(tmp_path).hybrimoe.layers  # native keeps even that


@pytest.fixture
def taken(monkeypatch) -> list:
    """What was allocated for blobs: a test of a refusal wants nothing."""
    found = []
    monkeypatch.setattr(
        "hybrimoe.modules.pooled_experts.allocate_blobs", lambda *a: found.append(a)
    )
    return found


def enlarge(monkeypatch, free: int) -> None:
    """Experts of GiB, and so many bytes of memory besides the margin."""
    monkeypatch.setattr(load_memory, "host_memory", lambda **_: HostMemory(free + MARGIN, "a test"))
    monkeypatch.setattr("hybrimoe.models.spec.expert_layout", enormous)


def enormous(fmt, *shape):
    layout = expert_layout(fmt, *shape)
    return layout._replace(expert_bytes=layout.expert_bytes << 10)


@pytest.mark.parametrize("door", DOORS)
def test_too_little_memory_is_said_before_any_is_taken(door, monkeypatch, taken):
    enlarge(monkeypatch, 16 << 30)

    with pytest.raises(
        InsufficientMemoryError, match=r"weights='native' needs 27\..*a test.*weights='int8' fits"
    ):
        DOORS[door](TINY_MOE)
    assert taken == []


@pytest.fixture
def repository(tmp_path) -> Path:
    """A cache of the hub with all of tiny-moe but its weights."""
    cache = tmp_path / "cache"
    snapshot = cache / "models--someone--tiny" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    shutil.copy(TINY_MOE / "config.json", snapshot)
    index = {"metadata": {}, "weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    (cache / "models--someone--tiny" / "refs").mkdir()
    (cache / "models--someone--tiny" / "refs" / "main").write_text("a" * 40)
    return cache


def test_too_little_memory_is_said_before_weights_are_fetched(monkeypatch, repository):
    enlarge(monkeypatch, 16 << 30)
    load = functools.partial(hybrimoe.from_pretrained, "someone/tiny", cache_dir=repository)

    with pytest.raises(InsufficientMemoryError, match=r"weights='native' needs 27\..*'int8' fits"):
        load()
    with pytest.raises(InsufficientMemoryError, match=r"weights='native' needs 54\..*'int8' fits"):
        load(dtype="float32")
    for settings in ({"weights": "int4"}, {"num_hidden_layers": 3}):
        with pytest.raises(CheckpointError, match="is the download complete"):  # it would fetch
            load(**settings)


def test_where_no_format_fits_the_error_says_how_much_may_stay_in_ram(monkeypatch, taken):
    enlarge(monkeypatch, 4 << 30)

    with pytest.raises(InsufficientMemoryError, match=r"ram='\d+MiB' fits") as refused:
        hybrimoe.from_pretrained(TINY_MOE, weights="int4")
    assert taken == []
    ram = re.search(r"ram='(\d+MiB)'", str(refused.value)).group(1)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY_MOE))
    load_memory.ensure_fits(model, "int4", ram)
    with pytest.raises(InsufficientMemoryError, match="fits, with the other experts on disk"):
        load_memory.ensure_fits(model, "int4", "5GiB")


def test_not_even_a_budget_of_ram_helps_where_dense_weights_do_not_fit(monkeypatch, taken):
    monkeypatch.setattr(load_memory, "host_memory", lambda **_: HostMemory(MARGIN + 1024, "a test"))

    with pytest.raises(InsufficientMemoryError, match="no format of the experts fits, not even"):
        hybrimoe.from_pretrained(TINY_MOE)
    assert taken == []


def test_packed_files_fit_in_their_own_format_or_partly_on_disk(monkeypatch, tmp_path):
    hybrimoe.save_packed(hybrimoe.from_pretrained(TINY_MOE, weights="int8"), tmp_path)
    enlarge(monkeypatch, 12 << 30)

    with pytest.raises(InsufficientMemoryError, match=r"weights='int8' needs 14\..*; ram='\d+MiB'"):
        hybrimoe.from_pretrained(tmp_path)


@pytest.mark.parametrize("weights", ["native", "int4"])
@pytest.mark.parametrize("is_packed", [False, True])
def test_the_budget_of_ram_in_the_message_loads_a_model_that_works(
    monkeypatch, tmp_path, weights, is_packed
):
    wanted = hybrimoe.from_pretrained(TINY_MOE, weights=weights, device="cpu")
    hybrimoe.save_packed(wanted, tmp_path)
    load = functools.partial(hybrimoe.from_pretrained, tmp_path if is_packed else TINY_MOE)
    settings = {} if is_packed else {"weights": weights}
    memory = HostMemory(MARGIN, "a test")
    monkeypatch.setattr(load_memory, "host_memory", lambda **_: memory)
    with pytest.raises(InsufficientMemoryError) as refused:
        load(**settings)
    memory = memory._replace(free=MARGIN + refused.value.need - (2 << 20))
    monkeypatch.setattr(load_memory, "choices", tuple)  # that another format fits is tested above
    with pytest.raises(
        InsufficientMemoryError, match=r"; ram='\d+MiB' fits, with the other"
    ) as refused:
        load(**settings)
    assert refused.value.need == refused.value.have + (2 << 20)
    assert refused.value.nearest in str(refused.value)

    ram = re.search(r"ram='(\d+MiB)'", refused.value.nearest).group(1)
    model = load(ram=ram, device="cpu", **settings)
    ids = torch.arange(24)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, wanted(ids).logits)
    assert model.hybrimoe.stats()["disk"]["slots"] > 0


def test_another_format_and_a_budget_of_ram_are_both_named_where_both_fit(monkeypatch):
    enlarge(monkeypatch, 16 << 30)

    with pytest.raises(InsufficientMemoryError, match=r"'int8' fits, and ram='\d+MiB' fits, with"):
        hybrimoe.from_pretrained(TINY_MOE)


def test_wrap_names_the_format_or_the_budget_of_ram_that_fits(monkeypatch, model):
    enlarge(monkeypatch, 16 << 30)
    with pytest.raises(
        InsufficientMemoryError, match=r"'native' needs 27\..*; weights='int8' fits"
    ):
        hybrimoe.wrap(model)
    enlarge(monkeypatch, 4 << 30)
    with pytest.raises(
        InsufficientMemoryError, match=r"; ram='\d+MiB' fits, with the other"
    ) as refused:
        hybrimoe.wrap(model, weights="int4")
    assert not hasattr(model, "hybrimoe")

    ram = re.search(r"ram='(\d+)MiB'", refused.value.nearest).group(1)
    found = find_experts(model)
    load_memory.ensure_wrap_fits(model, found, "int4", f"{ram}MiB")
    with pytest.raises(InsufficientMemoryError, match=rf"; ram='{ram}MiB' fits"):
        load_memory.ensure_wrap_fits(model, found, "int4", f"{int(ram) + 30}MiB")
    enlarge(monkeypatch, 1 << 20)
    with pytest.raises(InsufficientMemoryError, match=r"; hybrimoe\.from_pretrained packs experts"):
        hybrimoe.wrap(model, weights="int4")


def test_the_check_agrees_with_the_plan(monkeypatch):
    needs = []
    monkeypatch.setattr(load_memory, "ensure_host_fits", lambda need, *_: needs.append(need))
    for weights in ("native", "int8", "int4"):
        hybrimoe.from_pretrained(TINY_MOE, weights=weights)
    plans = [hybrimoe.plan(TINY_MOE, weights=weights) for weights in ("native", "int8", "int4")]

    assert needs == [found.load_peak_bytes for found in plans]


@pytest.mark.parametrize("weights", ["native", "int4"])
def test_wrap_says_too_little_memory_before_the_model_is_touched(monkeypatch, model, weights):
    experts = model.model.layers[0].mlp.experts
    monkeypatch.setattr(load_memory, "host_memory", lambda **_: HostMemory(MARGIN + 1024, "a test"))

    with pytest.raises(
        InsufficientMemoryError, match=rf"wrapping.*weights='{weights}' needs.*a te"
    ):
        hybrimoe.wrap(model, weights=weights)
    assert model.model.layers[0].mlp.experts is experts
    monkeypatch.undo()
    assert hybrimoe.wrap(model, weights=weights).hybrimoe.layers


def test_wrap_needs_one_layer_more_and_gives_back_each_as_it_goes(monkeypatch, model):
    needs = []
    monkeypatch.setattr(load_memory, "ensure_host_fits", lambda need, *_: needs.append(need))
    hybrimoe.wrap(model)

    assert needs == [model.hybrimoe.layers[0].packed.blobs.nbytes]


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


# An interrupted load.


@pytest.mark.parametrize("door", DOORS)
def test_an_interrupted_load_leaves_nothing_behind(door, monkeypatch, tokenizer):
    references, stream = [], ExpertSink.stream

    def interrupted(self, name, fill):
        references.append(weakref.ref(self.layers[0].pool))
        if len(references) == 5:
            raise KeyboardInterrupt
        stream(self, name, fill)

    with monkeypatch.context() as patch:
        patch.setattr(ExpertSink, "stream", interrupted)
        with pytest.raises(KeyboardInterrupt):
            DOORS[door](TINY_MOE, weights="int4")
    gc.collect()

    assert references[0]() is None
    assert torch.get_default_dtype() == torch.float32
    assert torch.empty(1).device.type == "cpu"
    assert generate(DOORS[door](TINY_MOE), tokenizer)


# Whole processes.

COMMON = """
import json, os, sys, threading, time, warnings
from pathlib import Path
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
import torch, transformers, hybrimoe
warnings.simplefilter("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
"""

PEAK = """
def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

hybrimoe.from_pretrained(sys.argv[1], weights="int4")  # compiles, which takes memory of its own
before, samples, done = anonymous(), [], threading.Event()

def sample():
    while not done.is_set():
        samples.append(anonymous())
        time.sleep(0.001)

sampler = threading.Thread(target=sample)
sampler.start()
model = hybrimoe.from_pretrained(sys.argv[2], weights="int4")
done.set()
sampler.join()
print(json.dumps({
    "peak": max(samples) - before, "samples": len(samples), "pool": model.hybrimoe.pool.nbytes,
    "layer": model.hybrimoe.layers[0].native_bytes,
    "dense": sum(p.nbytes for p in model.parameters()),
}))
"""

INTERRUPTED = """
import gc, signal
from hybrimoe.sources.sink import ExpertSink

pack, count = ExpertSink._pack, []

def ask_to_be_interrupted(self, *arguments):
    count.append(None)
    if len(count) == 3:
        print("third", flush=True)  # the signal comes while the layer is packed
        sys.stdin.readline()
        time.sleep(0.05)
    pack(self, *arguments)

before = set(os.listdir(sys.argv[2])), set(os.listdir("/proc/self/fd"))
ExpertSink._pack = ask_to_be_interrupted
try:
    hybrimoe.from_pretrained(sys.argv[1], weights="int4", **json.loads(sys.argv[3]))
except KeyboardInterrupt:
    ExpertSink._pack = pack
gc.collect()
maps = Path("/proc/self/maps").read_text()
threads = [thread.name for thread in threading.enumerate() if thread.name != "MainThread"]
print(json.dumps({
    "files": sorted(set(os.listdir(sys.argv[2])) - before[0]),
    "open": [os.readlink(f"/proc/self/fd/{n}") for n in set(os.listdir("/proc/self/fd")) - before[1]
             if os.path.lexists(f"/proc/self/fd/{n}")],
    "mapped": sys.argv[1] in maps,
    "threads": threads,
    "again": len(hybrimoe.from_pretrained(sys.argv[1], weights="int4").hybrimoe.layers),
    "count": len(count),
}))
"""

LIMITED = """
import resource
hybrimoe.from_pretrained(sys.argv[1], weights="int4")  # compiles, which takes memory of its own
status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
used = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}
limit = int(status[used[sys.argv[3]]].split()[0]) * 1024 + int(sys.argv[4])
resource.setrlimit(getattr(resource, sys.argv[3]), (limit, limit))
try:
    hybrimoe.from_pretrained(sys.argv[2], weights="int4")
except hybrimoe.InsufficientMemoryError as error:
    print(json.dumps(str(error)))
"""

SHRINKING = """
path = Path(sys.argv[1]) / "model.safetensors"
model = hybrimoe.from_pretrained(sys.argv[1], weights="int4")
os.truncate(path, 4096)
model.generate(torch.arange(8)[None], max_new_tokens=2, do_sample=False)
print(json.dumps("Path" in globals() and str(path) not in Path("/proc/self/maps").read_text()))
"""


def run(code: str, *arguments: str) -> object:
    """The last line that a fresh process prints, as JSON."""
    command = [sys.executable, "-c", COMMON + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="what is open is read from /proc")
@pytest.mark.parametrize("settings", [{}, {"ram": 0.5}], ids=["in RAM", "on disk"])
def test_ctrl_c_leaves_no_file_no_thread_and_no_map(checkpoint, tmp_path, settings):
    spill = tmp_path / "spill"
    spill.mkdir()
    if settings:
        settings = settings | {"spill": str(spill)}
    command = [sys.executable, "-c", COMMON + INTERRUPTED, str(checkpoint), str(spill)]
    process = subprocess.Popen(
        [*command, json.dumps(settings)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "third\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate("go on\n", timeout=120)

    assert process.returncode == 0, err[-2000:]
    assert json.loads(out.splitlines()[-1]) == {
        "files": [],
        "open": [],
        "mapped": False,
        "threads": [],
        "again": 12,
        "count": 3,
    }


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc")
def test_a_load_takes_the_packed_experts_the_dense_weights_and_less_than_a_layer(tmp_path):
    folder = generated.write(
        tmp_path / "big", generated.configuration(6, 1024, 512, 16, 512), shards=6
    )
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 300e6
    used = run(PEAK, str(TINY_MOE), str(folder))

    assert used["samples"] > 20
    assert used["peak"] >= used["pool"]  # or it was not measured
    assert used["peak"] <= used["pool"] + used["dense"] + used["layer"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmData is read from /proc")
@pytest.mark.parametrize("limit", ["RLIMIT_AS", "RLIMIT_DATA"])
def test_a_limit_of_the_process_counts_the_mapped_files(tmp_path, limit):
    folder = generated.write_hollow(
        tmp_path / "big", generated.configuration(2, 512, 256, 64, 512), shards=2
    )
    said = run(LIMITED, str(TINY_MOE), str(folder), limit, str(64 << 20))

    assert f"{limit} of " in said
    assert "of mapped files" in said


def test_a_file_that_shrinks_after_the_load_does_not_kill_the_process(checkpoint):
    assert run(SHRINKING, str(checkpoint)) is True


def test_a_file_that_shrinks_during_the_load_is_a_typed_error(checkpoint, monkeypatch):
    stream, calls = ExpertSink.stream, []

    def cut(self, name, fill):
        calls.append(name)
        if len(calls) == 3:
            with (checkpoint / "model.safetensors").open("r+b") as file:
                file.truncate(1 << 20)
        stream(self, name, fill)

    monkeypatch.setattr(ExpertSink, "stream", cut)
    with pytest.raises(CheckpointError, match="shorter since it was checked"):
        hybrimoe.from_pretrained(checkpoint)


def test_importing_does_not_import_the_loader():
    code = "import sys, hybrimoe; print('transformers.quantizers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "False\n"


def test_a_load_warns_of_nothing_and_shows_the_bar_of_transformers(capsys):
    logging.enable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hybrimoe.from_pretrained(TINY_MOE)
    finally:
        logging.disable_progress_bar()
    printed = capsys.readouterr()

    assert printed.out == ""
    assert "Loading weights" in printed.err
