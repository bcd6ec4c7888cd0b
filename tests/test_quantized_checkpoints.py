"""Quantized numbers are never read as weights: every door says so, with what helps."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.quantizers import HfQuantizer

import families
import hybrimoe
from hybrimoe.cli.main import main
from hybrimoe.config import Config
from hybrimoe.errors import CheckpointError, UnsupportedModelError
from hybrimoe.models.skeleton import build_skeleton
from hybrimoe.sources import quantized
from hybrimoe.sources.packed import blobs as packed_blobs
from hybrimoe.sources.safetensors import examine_folder
from hybrimoe.sources.stored_numbers import ensure_plain

DOORS = {
    "hybrimoe": hybrimoe.from_pretrained,
    "transformers": lambda folder, **given: AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Config(), **given
    ),
    "class": lambda folder, **given: Qwen3MoeForCausalLM.from_pretrained(
        folder, quantization_config=Config(), **given
    ),
    "plan": hybrimoe.plan,
}
FP8 = torch.float8_e4m3fn
BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
PLACES = [
    EXPERT,
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.1.mlp.gate.weight",
    "model.layers.0.input_layernorm.weight",
    "model.embed_tokens.weight",
    "lm_head.weight",
]


@functools.cache
def config() -> Qwen3MoeConfig:
    # fmt: off
    return Qwen3MoeConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                          num_key_value_heads=2, head_dim=16, intermediate_size=32,
                          moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2,
                          bos_token_id=0, eos_token_id=0, pad_token_id=0)
    # fmt: on


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config()).bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def store(folder: Path, change, **said) -> None:
    """Rewrite the tensors, and what config.json says."""
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file({name: t.contiguous() for name, t in tensors.items()}, path, {"format": "pt"})
    place = folder / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | said))


def keep(tensors) -> None:
    """Plain numbers."""


def matrices(tensors) -> list[str]:
    return [name for name in tensors if name.endswith("_proj.weight")]


def fp8(tensors, names=None, suffix="_scale_inv") -> None:
    for name in names or matrices(tensors):
        scale = tensors[name].float().abs().max().reshape(1, 1) / 448
        tensors[name] = (tensors[name].float() / scale).to(FP8)
        tensors[name + suffix] = scale


def bytes_of_the_same_shape(tensors) -> None:
    for name in matrices(tensors):
        tensors[name] = torch.zeros(tensors[name].shape, dtype=torch.uint8)


def int8(tensors) -> None:
    for name in matrices(tensors):
        tensors[name] = tensors[name].to(torch.int8)
        tensors[name.replace("weight", "SCB")] = torch.ones(len(tensors[name]))


def integers_as_floats(tensors) -> None:
    """Only the scale beside it says that 93.0 is not the weight."""
    tensors[EXPERT] = (tensors[EXPERT].float() * 100).round().bfloat16()
    tensors[f"{EXPERT}_scale"] = torch.ones(1)


def gptq(tensors) -> None:
    for name in matrices(tensors):
        rows, columns = tensors.pop(name).shape
        at = name.removesuffix("weight")
        tensors[f"{at}qweight"] = torch.zeros(columns // 8, rows, dtype=torch.int32)
        tensors[f"{at}qzeros"] = torch.zeros(1, rows // 8, dtype=torch.int32)
        tensors[f"{at}scales"] = torch.ones(1, rows).half()
        tensors[f"{at}g_idx"] = torch.zeros(columns, dtype=torch.int32)


def nvfp4(tensors) -> None:
    for name in matrices(tensors):
        rows, columns = tensors.pop(name).shape
        tensors[f"{name}_packed"] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        tensors[f"{name}_scale"] = torch.ones(rows, columns // 16).to(FP8)
        tensors[f"{name}_global_scale"] = torch.ones(1)


def half_width(tensors) -> None:
    """Two numbers a byte: the shape is wrong too, but that is not what is the matter."""
    for name in matrices(tensors):
        rows, columns = tensors[name].shape
        tensors[name] = torch.zeros(rows, columns // 2, dtype=torch.uint8)
        tensors[f"{name}_scale"] = torch.ones(rows, columns // 32).to(torch.float8_e8m0fnu)


def bnb4(tensors) -> None:
    for name in matrices(tensors):
        size = tensors[name].numel()
        tensors[name] = torch.zeros(size // 2, 1, dtype=torch.uint8)
        tensors[f"{name}.absmax"] = torch.ones(size // 64)
        tensors[f"{name}.quant_state.bitsandbytes__nf4"] = torch.zeros(9, dtype=torch.uint8)


def merged(tensors) -> None:
    """All experts of a layer in one tensor, as gpt-oss has them."""
    for name in [name for name in tensors if ".experts." in name]:
        del tensors[name]
    for layer in range(2):
        at = f"model.layers.{layer}.mlp.experts."
        tensors[f"{at}gate_up_proj_blocks"] = torch.zeros(4, 64, 1, 16, dtype=torch.uint8)
        tensors[f"{at}gate_up_proj_scales"] = torch.zeros(4, 64, 1, dtype=torch.uint8)
        tensors[f"{at}down_proj_blocks"] = torch.zeros(4, 32, 1, 16, dtype=torch.uint8)
        tensors[f"{at}down_proj_scales"] = torch.zeros(4, 32, 1, dtype=torch.uint8)


def aqlm(tensors) -> None:
    for name in matrices(tensors):
        rows, columns = tensors.pop(name).shape
        at = name.removesuffix("weight")
        tensors[f"{at}codes"] = torch.zeros(rows, columns // 8, 1, dtype=torch.int16)


def mlx(tensors) -> None:
    for name in matrices(tensors):
        rows, columns = tensors[name].shape
        tensors[name] = torch.zeros(rows, columns // 8, dtype=torch.uint32)
        tensors[name.replace("weight", "scales")] = torch.ones(rows, 1).bfloat16()
        tensors[name.replace("weight", "biases")] = torch.ones(rows, 1).bfloat16()


STORED = [fp8, bytes_of_the_same_shape, int8, integers_as_floats, gptq, nvfp4, half_width, bnb4, merged,
          aqlm, mlx]  # fmt: skip


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("change", STORED, ids=lambda change: change.__name__)
def test_what_nothing_declares_is_refused_with_the_tensor(change, door, checkpoint):
    store(checkpoint, change)
    with pytest.raises(CheckpointError, match="the checkpoint is quantized") as caught:
        DOORS[door](checkpoint)

    assert quantized.UNDECLARED in str(caught.value)
    assert caught.value.path.endswith("model.safetensors")
    assert caught.value.tensor in load_file(checkpoint / "model.safetensors")


@pytest.mark.parametrize("door", ["hybrimoe", "plan"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "dtype", [FP8, torch.float8_e5m2, torch.int8, torch.int64, torch.bool, torch.complex64], ids=str
)
def test_any_part_of_a_model_stored_as_anything_else_is_refused(place, dtype, door, checkpoint):
    store(checkpoint, lambda tensors: tensors.update({place: tensors[place].to(dtype)}))
    with pytest.raises(CheckpointError, match=r"is stored as .*quantized") as caught:
        DOORS[door](checkpoint)

    assert caught.value.tensor == place


@pytest.mark.parametrize("place", PLACES[:4])
@pytest.mark.parametrize(
    "suffix", ["_scale", "_scale_inv", "_scale_2", "_zero_point", ".absmax", "._scale", "_shape"]
)
def test_a_scale_beside_any_weight_is_refused(place, suffix, original):
    found = examine_folder(original)
    found[place + suffix] = found[place]
    with pytest.raises(CheckpointError, match=f"beside the weight {re.escape(place[:14])}"):
        ensure_plain(skeleton(), found)


def skeleton() -> nn.Module:
    return build_skeleton(config(), torch.bfloat16)


DECLARED = {
    "fp8": (fp8, {"quant_method": "fp8"}, "FineGrainedFP8Config(dequantize=True)"),
    "mxfp4": (merged, {"quant_method": "mxfp4"}, "Mxfp4Config(dequantize=True)"),
    "gptq": (gptq, {"quant_method": "gptq", "bits": 4}, "does not dequantize it; use an unquant"),
    "awq": (gptq, {"quant_method": "awq", "bits": 4}, "package gptqmodel"),
    "compressed-tensors": (
        functools.partial(fp8, suffix="_scale"),
        {"quant_method": "compressed-tensors", "format": "float-quantized"},
        "with the package compressed-tensors, loads it dequantized",
    ),
    "compressed-tensors nvfp4": (
        nvfp4,
        {"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"},
        "does not dequantize this format",
    ),
    "bitsandbytes": (bnb4, {"quant_method": "bitsandbytes"}, "package bitsandbytes only"),
    "bitsandbytes by its flag": (bnb4, {"load_in_4bit": True}, "package bitsandbytes only"),
    "modelopt": (fp8, {"quant_method": "modelopt"}, "does not know this method"),
    "modelopt_fp4": (nvfp4, {"quant_method": "modelopt_fp4"}, "does not know this method"),
    "quark": (fp8, {"quant_method": "quark"}, "package amd-quark"),
    "mlx": (mlx, {"bits": 4, "group_size": 64}, "only MLX reads it"),
    "no such method": (fp8, {"quant_method": "nonesuch"}, quantized.UNKNOWN),
    "no method": (fp8, {}, "an unnamed method"),
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("method", DECLARED)
def test_what_is_declared_is_refused_with_what_helps(method, door, checkpoint):
    change, said, hint = DECLARED[method]
    store(checkpoint, change, quantization_config=said)
    with pytest.raises(UnsupportedModelError, match="quantized by") as caught:
        DOORS[door](checkpoint)

    assert hint in str(caught.value)
    assert quantized.USE_PLAIN in str(caught.value)
    assert ("dequantize=True" in str(caught.value)) == (
        "dequantize=True" in hint or "loads" in hint
    )


@pytest.mark.parametrize("door", ["hybrimoe", "transformers", "plan"])
def test_no_dequantizing_is_promised_that_finds_no_scales(door, checkpoint):
    store(checkpoint, functools.partial(fp8, suffix="_scale"), quantization_config=BLOCKS)
    with pytest.raises(UnsupportedModelError, match=re.escape(quantized.NO_SCALES)):
        DOORS[door](checkpoint)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("method", ["quark", "fp8", "modelopt"])
def test_plain_numbers_that_are_declared_quantized_say_what_to_remove(method, door, checkpoint):
    store(checkpoint, keep, quantization_config={"quant_method": method})
    with pytest.raises(
        UnsupportedModelError, match=rf"(for|by) {method}.*remove quantization_config"
    ):
        DOORS[door](checkpoint)


def test_plain_numbers_load_once_the_declaration_is_gone(checkpoint):
    store(checkpoint, keep, quantization_config={"quant_method": "quark"})
    cleaned = transformers.AutoConfig.from_pretrained(checkpoint)
    del cleaned.quantization_config

    model = Qwen3MoeForCausalLM.from_pretrained(
        checkpoint, config=cleaned, quantization_config=Config()
    )
    assert len(model.hybrimoe.layers) == 2


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize(
    ("key", "said"),
    [
        ("compression_config", {"quant_method": "compressed-tensors", "format": "pack-quantized"}),
        ("quantization", {"group_size": 64, "bits": 4}),
    ],
)
def test_keys_that_transformers_does_not_read_are_read(key, said, door, checkpoint):
    store(checkpoint, nvfp4, **{key: said})
    with pytest.raises(UnsupportedModelError, match=f"transformers does not read {key}; use an"):
        DOORS[door](checkpoint)


@pytest.mark.parametrize("said", [{"quant_method": "fp8"}, {"quant_method": "modelopt"}])
def test_a_declaration_inside_the_text_model_s_part_counts(said):
    whole = families.build("gemma4.Gemma4TextExperts").config
    outer = transformers.Gemma4Config(text_config=whole.to_dict() | {"quantization_config": said})
    with pytest.raises(UnsupportedModelError, match=r"\(text_config.quantization_config in"):
        quantized.refuse_declared("NAME", outer)


@pytest.mark.parametrize("door", DOORS)
def test_the_file_of_modelopt_names_the_method(door, checkpoint):
    store(checkpoint, functools.partial(fp8, suffix="_scale"))
    (checkpoint / "hf_quant_config.json").write_text('{"quantization": {"quant_algo": "FP8"}}')
    with pytest.raises(CheckpointError, match=r"hf_quant_config.json says modelopt.*unquantized"):
        DOORS[door](checkpoint)


@pytest.mark.parametrize("door", DOORS)
def test_one_tensor_in_one_of_several_files_is_found(door, checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    tensors[EXPERT] = tensors[EXPERT].to(torch.int8)
    names = sorted(tensors)
    # The index says bfloat16: only the headers count.
    index = {"metadata": {"dtype": "bfloat16"}, "weight_map": {}}
    for shard, part in enumerate((names[::2], names[1::2])):
        file = f"model-0000{shard + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, checkpoint / file, {"format": "pt"})
        index["weight_map"] |= dict.fromkeys(part, file)
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match="is stored as I8"):
        DOORS[door](checkpoint)


@pytest.mark.parametrize("door", ["hybrimoe", "transformers", "class"])
def test_a_variant_is_looked_into(door, checkpoint):
    store(checkpoint, fp8)
    (checkpoint / "model.safetensors").rename(checkpoint / "model.fp8.safetensors")
    with pytest.raises(CheckpointError, match="is stored as F8_E4M3"):
        DOORS[door](checkpoint, variant="fp8")


def test_the_commands_refuse_it_too(checkpoint, capsys):
    store(checkpoint, gptq, quantization_config={"quant_method": "gptq"})

    assert main(["plan", str(checkpoint)]) != 0
    assert "does not dequantize it" in capsys.readouterr().err


@pytest.mark.parametrize("door", ["hybrimoe", "transformers", "class"])
@pytest.mark.parametrize("dtype", [FP8, torch.int8, "float8_e4m3fn"], ids=str)
def test_a_dtype_that_is_no_plain_number_is_refused(dtype, door, original):
    with pytest.raises(hybrimoe.HybriMoEError, match="float32, bfloat16 or float16"):
        DOORS[door](original, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_other_plain_dtypes_beside_bfloat16_load(dtype, checkpoint):
    wide = [EXPERT, "model.layers.0.mlp.gate.weight", "model.norm.weight"]
    store(checkpoint, lambda tensors: tensors.update({n: tensors[n].to(dtype) for n in wide}))
    ids = torch.arange(8)[None]
    with torch.no_grad():
        want = AutoModelForCausalLM.from_pretrained(checkpoint).eval()(ids).logits
        got = hybrimoe.from_pretrained(checkpoint).eval()(ids).logits

    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("tail", ["k_scale", "v_scale", "rotary_emb.inv_freq"])
def test_what_belongs_to_no_weight_of_the_model_is_left_alone(tail, original):
    found = examine_folder(original)
    one = found["model.norm.weight"]
    found[f"model.layers.0.self_attn.{tail}"] = one
    found["model.layers.2.mlp.experts.0.up_proj.weight"] = one._replace(dtype="F8_E4M3")
    found["model.layers.2.mlp.experts.0.up_proj.weight_scale_inv"] = one

    ensure_plain(skeleton(), found)


# What the messages advise.


def test_fp8_can_be_dequantized_by_transformers_and_wrapped(checkpoint):
    store(checkpoint, fp8, quantization_config=BLOCKS)
    said = transformers.FineGrainedFP8Config(dequantize=True)
    if not hasattr(HfQuantizer, "update_weight_conversions"):  # so the message names a version
        with pytest.raises(RuntimeError):
            Qwen3MoeForCausalLM.from_pretrained(checkpoint, quantization_config=said)
        return
    model = Qwen3MoeForCausalLM.from_pretrained(checkpoint, quantization_config=said).eval()
    ids = torch.arange(8)[None]
    with torch.no_grad():
        want = model(ids).logits
        got = hybrimoe.wrap(model)(ids).logits

    torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("door", ["hybrimoe", "transformers"])
def test_a_key_mapping_hides_nothing(door, checkpoint):
    def rename(tensors):
        bytes_of_the_same_shape(tensors)
        for name in list(tensors):
            tensors[f"outer.{name}"] = tensors.pop(name)

    store(checkpoint, rename)
    with pytest.raises(CheckpointError, match="is stored as U8"):
        DOORS[door](checkpoint, key_mapping={r"^outer\.": ""})


def test_a_packed_folder_is_looked_into(original, tmp_path):
    hybrimoe.save_packed(hybrimoe.from_pretrained(original), tmp_path / "packed")
    manifest = json.loads((tmp_path / "packed" / "hybrimoe.json").read_text())
    path = tmp_path / "packed" / manifest["folder"] / "dense.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    fp8(tensors, ["lm_head.weight"])
    save_file(tensors, path, {"format": "pt"})
    manifest["dense"] = {"bytes": path.stat().st_size, "checksum": packed_blobs.file_sum(path)}
    (tmp_path / "packed" / "hybrimoe.json").write_text(json.dumps(manifest))

    for door in ("hybrimoe", "plan"):
        with pytest.raises(CheckpointError, match="is stored as F8_E4M3"):
            DOORS[door](tmp_path / "packed")


@pytest.mark.parametrize("door", ["hybrimoe", "plan"])
@pytest.mark.parametrize("said", ["fp8", ["fp8"]])
def test_a_declaration_that_is_no_object_is_refused(said, door, checkpoint):
    store(checkpoint, keep, quantization_config=said)
    with pytest.raises(UnsupportedModelError):
        DOORS[door](checkpoint)


def test_a_dtype_that_torch_does_not_know_is_refused(original):
    with pytest.raises(hybrimoe.ConfigError, match="dtype must name a dtype of torch"):
        hybrimoe.from_pretrained(original, dtype="nonesuch")


FAMILIES = [name for name in families.decorated() if name not in families.SKIPPED]
SCALES = ["gemma4.Gemma4TextExperts", "deepseek_v4.DeepseekV4Experts", "inkling.InklingExperts"]


@pytest.mark.parametrize(
    "name", [n if n in SCALES else pytest.param(n, marks=pytest.mark.wide) for n in FAMILIES]
)
def test_scales_that_a_model_has_are_weights(name, tmp_path):
    """And one beside each of its matrices is not."""
    built = families.build(name)
    built.save_pretrained(tmp_path)
    found = examine_folder(tmp_path)
    model = build_skeleton(built.config, torch.float32, type(built))
    ensure_plain(model, found)
    if name in SCALES:
        assert any(quantized.owners(key) for key in found)
    for key in [key for key in found if key.endswith(("weight", "_proj"))]:
        with pytest.raises(CheckpointError, match="beside the weight"):
            ensure_plain(model, {**found, f"{key}_scale": found[key]})
        with pytest.raises(CheckpointError, match="is stored as U8"):
            ensure_plain(model, {**found, key: found[key]._replace(dtype="U8")})
