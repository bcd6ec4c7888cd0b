"""A packed folder is a model folder: complete, and opened by transformers' own doors."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    Mxfp4Config,
    pipeline,
)

import families
import hybrimoe
from hybrimoe.choices import METHOD
from hybrimoe.config import Config
from hybrimoe.errors import CheckpointError, ConfigError
from hybrimoe.sources.packed.folder import PackedFolder
from paths import TINY_MOE
from test_loading import assert_same_pool, generate
from test_packed_files import part

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    """The bundled checkpoint with all that may lie beside one."""
    folder = Path(shutil.copytree(TINY_MOE, tmp_path_factory.mktemp("origin") / "tiny"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text(TEMPLATE)
    (folder / "preprocessor_config.json").write_text("{}")
    (folder / "modeling_tiny.py").write_text("raise SystemExit")
    outside = folder.parent / "secret"
    outside.write_text("{}")
    (folder / "special_tokens_map.json").symlink_to(outside)
    return folder


@pytest.fixture(scope="module")
def loaded(origin):
    return hybrimoe.from_pretrained(origin, weights="int4", device="cpu")


@pytest.fixture(scope="module")
def saved(loaded, tmp_path_factory) -> Path:
    """A packed folder that no test spoils."""
    folder = tmp_path_factory.mktemp("packed")
    hybrimoe.save_packed(loaded, folder)
    return folder


# It is complete.


def test_what_belongs_to_the_model_is_there_and_nothing_else(saved, tokenizer):
    there = {str(path.relative_to(saved)) for path in saved.rglob("*") if path.is_file()}

    inside = part(saved).name
    assert {name for name in there if not name.startswith(inside)} == {
        ".hybrimoe.lock",
        "additional_chat_templates/tools.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "hybrimoe.json",
        "model.safetensors.index.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    found = AutoTokenizer.from_pretrained(saved)
    assert found("import os").input_ids == tokenizer("import os").input_ids
    assert found.chat_template


def test_a_wrapped_model_s_folder_is_found_by_its_name(model, tmp_path, tokenizer):
    hybrimoe.save_packed(hybrimoe.wrap(model, weights="int4"), tmp_path)

    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found("import os").input_ids == tokenizer("import os").input_ids


def test_a_snapshot_in_the_cache_is_found_by_its_name(origin, tmp_path, tokenizer):
    repository = tmp_path / "cache" / "models--someone--tiny"
    snapshot, blobs = repository / "snapshots" / ("a" * 40), repository / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(origin / name, blobs / name)
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    loaded = hybrimoe.from_pretrained("someone/tiny", cache_dir=tmp_path / "cache", device="cpu")
    hybrimoe.save_packed(loaded, tmp_path / "packed")

    found = AutoTokenizer.from_pretrained(tmp_path / "packed")
    assert found("import os").input_ids == tokenizer("import os").input_ids
    assert not (tmp_path / "packed" / "tokenizer.json").is_symlink()


def test_a_model_from_nowhere_is_saved_without_a_tokenizer(model, tmp_path):
    model.config.name_or_path = model.name_or_path = ""
    hybrimoe.save_packed(hybrimoe.wrap(model), tmp_path)

    assert not (tmp_path / "tokenizer.json").exists()
    assert hybrimoe.from_pretrained(tmp_path).hybrimoe.layers


def test_generation_settings_are_the_model_s_own_as_they_are_now(model, tmp_path):
    model.generation_config.max_length = 77
    hybrimoe.save_packed(hybrimoe.wrap(model), tmp_path)

    assert hybrimoe.from_pretrained(tmp_path).generation_config.max_length == 77
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.max_length == 77


# transformers' doors.


def test_transformers_opens_it(saved, loaded, tokenizer):
    model = AutoModelForCausalLM.from_pretrained(saved)

    assert_same_pool(model, loaded)
    assert generate(model, tokenizer) == generate(loaded, tokenizer)
    assert model.hybrimoe.config == Config(weights="int4")
    assert model.config.name_or_path == str(saved)
    for name in ("quantization_config", "transformers_weights"):
        assert not hasattr(model.config, name)
    assert not hasattr(model, "hf_quantizer")


def test_a_class_of_a_model_opens_it_moved_or_inside_another_folder(saved, loaded, tmp_path):
    inside = Path(shutil.copytree(saved, tmp_path / "inside"))
    doors = {"here": type(loaded).from_pretrained, "auto": AutoModelForCausalLM.from_pretrained}
    for door in doors.values():
        assert_same_pool(door(inside), loaded)
        assert_same_pool(door(tmp_path, subfolder="inside"), loaded)
    config = type(loaded.config).from_pretrained(inside)
    assert_same_pool(type(loaded).from_pretrained(inside, config=config), loaded)
    assert str(tmp_path) not in config.to_json_string()


def test_a_family_that_initializes_its_children_s_weights_opens_it(tmp_path):
    plain = families.build("qwen3_omni_moe.Qwen3OmniMoeThinkerTextExperts")
    plain.save_pretrained(tmp_path / "plain")
    packed = hybrimoe.from_pretrained(tmp_path / "plain", device="cpu", linear="int8")
    hybrimoe.save_packed(packed, tmp_path / "packed")
    again = hybrimoe.from_pretrained(tmp_path / "packed", device="cpu")

    inputs = families.inputs("qwen3_omni_moe.", plain)
    assert torch.equal(families.logits(again, inputs), families.logits(packed, inputs))


def test_its_configuration_says_how_it_is_packed(saved):
    said = AutoConfig.from_pretrained(saved).quantization_config

    assert said == {"quant_method": "hybrimoe", "weights": "int4", "linear": None}


def test_settings_come_through_quantization_config(saved, loaded, recwarn):
    settings = Config(device="cpu", ram=0.5, threads=1)
    model = AutoModelForCausalLM.from_pretrained(saved, quantization_config=settings)

    assert model.hybrimoe.config == settings.replace(weights="int4")
    assert model.hybrimoe.pool.tier is not None
    assert not [w for w in recwarn if "quantization_config" in str(w.message)]


def test_the_base_model_and_an_accelerator_come_through_it_too(saved):
    shared = AutoModel.from_pretrained(saved, quantization_config=Config(device="emulated"))
    model = AutoModel.from_pretrained(saved)

    assert shared.hybrimoe.hybrid is not None
    assert model(torch.tensor([[40, 41, 42]])).last_hidden_state.isfinite().all()


@pytest.mark.parametrize("arguments", [{}, {"device_map": "auto"}, {"device": "cpu"}])
def test_a_pipeline_opens_it(saved, tokenizer, arguments):
    write = pipeline("text-generation", model=str(saved), **arguments)
    answer = write("def main(", max_new_tokens=4, do_sample=False)

    assert write.model.hybrimoe.layers
    assert answer[0]["generated_text"].startswith("def main(")


def test_what_it_does_not_hold_is_refused(saved):
    for settings in (Config(weights="int8"), Mxfp4Config()):
        with pytest.raises(ConfigError, match=r"weights must be 'int4'|hybrimoe\.Config"):
            AutoModelForCausalLM.from_pretrained(saved, quantization_config=settings)
    with pytest.raises(ConfigError, match="dtype must be bfloat16"):
        AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    with pytest.raises(ConfigError, match="device_map must be left out"):
        AutoModelForCausalLM.from_pretrained(saved, device_map={"": "meta"})


def test_settings_may_be_a_dict_with_the_method_s_name():
    settings = {"quant_method": "hybrimoe", "weights": "int4", "device": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, quantization_config=settings)

    assert model.hybrimoe.config == Config(weights="int4", device="cpu")


@pytest.mark.parametrize("door", [hybrimoe.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_its_configuration_alone_is_no_model(door, saved, tmp_path):
    shutil.copy(saved / "config.json", tmp_path)
    shutil.copy(saved / "model.safetensors.index.json", tmp_path)

    with pytest.raises(CheckpointError, match=r"packed by hybrimoe, but hybrimoe\.json|cannot be"):
        door(tmp_path)


def test_damage_is_found_through_transformers_too(saved, tmp_path):
    spoiled = Path(shutil.copytree(saved, tmp_path / "spoiled"))
    os.truncate(part(spoiled) / "dense.safetensors", 1000)

    with pytest.raises(CheckpointError, match="is not what was saved"):
        AutoModelForCausalLM.from_pretrained(spoiled)


# When hybrimoe is imported, and when it is not.


def run(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_without_the_import_the_error_says_what_to_do(saved):
    code = "import sys, transformers as t; t.AutoModelForCausalLM.from_pretrained(sys.argv[1])"
    done = run(code, saved)

    assert done.returncode != 0
    assert "packed by hybrimoe, import hybrimoe before" in done.stderr.splitlines()[-1]


def test_transformers_may_be_imported_after_hybrimoe():
    code = (
        "import hybrimoe, sys\n"
        "from transformers.quantizers import auto\n"
        "print('hybrimoe' in auto.AUTO_QUANTIZATION_CONFIG_MAPPING,\n"
        "      'hybrimoe' in auto.AUTO_QUANTIZER_MAPPING, 'hybrimoe.pretrained' in sys.modules)\n"
    )

    assert run(code).stdout.split() == ["True", "True", "False"]


def test_importing_hybrimoe_imports_nothing_large_and_hooks_once():
    code = (
        "import importlib, sys, hybrimoe\n"
        "importlib.reload(hybrimoe)\n"
        "large = {'torch', 'transformers', 'numpy', 'numba', 'huggingface_hub', 'safetensors'}\n"
        "waiting = [f for f in sys.meta_path if type(f).__module__ == 'hybrimoe.sources.registration']\n"
        "print(sorted(large & sys.modules.keys()), len(waiting))\n"
    )

    assert run(code).stdout == "[] 1\n"


def test_other_methods_are_merged_as_before():
    from transformers.quantizers.auto import AutoHfQuantizer

    stored = {"quant_method": "mxfp4"}
    merged = AutoHfQuantizer.merge_quantization_configs(stored, Mxfp4Config(dequantize=True))
    assert merged.dequantize
    ours = AutoHfQuantizer.merge_quantization_configs({"quant_method": METHOD}, None)
    assert isinstance(ours, PackedFolder)
    assert json.dumps(ours.to_dict()) == '{"quant_method": "hybrimoe"}'
