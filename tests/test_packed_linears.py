"""A packed folder holds packed dense layers as they are, and remembers how they were packed."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen3MoeForCausalLM,
)

import generated
import hybrimoe
from hybrimoe.config import Config
from hybrimoe.errors import CheckpointError, ConfigError
from hybrimoe.models import weights as formats
from hybrimoe.modules.fused_norm import FusedNorm
from hybrimoe.modules.packed_linear import PackedLinear
from paths import TINY_MOE
from test_loading import assert_same_pool
from test_packed_files import part

LOSSY = "ignore:the (experts|dense layers) were stored as"
IDS = torch.arange(40, 60).reshape(2, 10)


def load_three_layers(**settings):
    layers = {"num_hidden_layers": 3, "layer_types": ["full_attention"] * 3}
    arguments = {"dtype": torch.float32, **layers}
    return hybrimoe.from_pretrained(TINY_MOE, device="cpu", **settings, **arguments)


@pytest.fixture(scope="module", params=["int4", "int8"])
def loaded(request):
    """Experts and dense layers in one format."""
    return load_three_layers(weights=request.param, linear=request.param)


@pytest.fixture(scope="module")
def saved_once(loaded, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    hybrimoe.save_packed(loaded, folder)
    return folder


@pytest.fixture
def saved(saved_once, tmp_path) -> Path:
    """A packed folder that a test may spoil."""
    return Path(shutil.copytree(saved_once, tmp_path / "saved"))


@torch.no_grad()
def logits(model):
    return model(IDS).logits


def test_it_loads_as_it_was_saved_and_packs_nothing(loaded, saved, monkeypatch):
    monkeypatch.setattr(formats, "pack", None)
    monkeypatch.setattr(formats, "pack_part", None)
    again = hybrimoe.from_pretrained(saved, device="cpu")

    assert torch.equal(logits(again), logits(loaded))
    assert again.hybrimoe.config == loaded.hybrimoe.config
    assert_same_pool(again, loaded)
    assert [type(m) for m in again.modules()] == [type(m) for m in loaded.modules()]
    assert any(isinstance(module, FusedNorm) for module in again.modules())
    for got, wanted in zip(again.hybrimoe.linears, loaded.hybrimoe.linears, strict=True):
        assert (got.matrix.blob == wanted.matrix.blob).all()
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.filterwarnings(LOSSY)
def test_its_state_is_that_of_the_saved_one_and_so_is_what_unwrap_restores(loaded, saved):
    again, wanted = hybrimoe.from_pretrained(saved, device="cpu"), loaded.state_dict()
    state = again.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in state)
    parameters = dict(hybrimoe.unwrap(again).named_parameters())

    assert not any(isinstance(module, PackedLinear) for module in again.modules())
    assert all(torch.equal(parameters[name], wanted[name]) for name in parameters)
    assert again.model.layers[0].self_attn.q_proj.weight.requires_grad


def test_it_can_be_saved_again(loaded, saved, tmp_path):
    hybrimoe.save_packed(hybrimoe.from_pretrained(saved, device="cpu"), tmp_path / "again")
    manifests = [
        json.loads((folder / "hybrimoe.json").read_text()) for folder in (saved, tmp_path / "again")
    ]

    assert all(manifest.pop("folder") for manifest in manifests)
    assert manifests[0] == manifests[1]
    again = hybrimoe.from_pretrained(tmp_path / "again", device="cpu")
    assert torch.equal(logits(again), logits(loaded))


def test_its_experts_may_stay_in_its_files(loaded, saved):
    again = hybrimoe.from_pretrained(saved, device="cpu", ram=0.5)

    assert again.hybrimoe.pool.tier is not None
    assert torch.equal(logits(again), logits(loaded))


def test_transformers_door_opens_it(loaded, saved):
    again = AutoModelForCausalLM.from_pretrained(saved, quantization_config=Config(device="cpu"))

    assert torch.equal(logits(again), logits(loaded))
    assert again.hybrimoe.config == loaded.hybrimoe.config


@pytest.mark.parametrize("loaded", ["int4"], indirect=True)
def test_other_classes_take_what_they_have_of_it(loaded, saved, tmp_path):
    base = AutoModel.from_pretrained(saved)
    with torch.no_grad():
        got, wanted = (model(IDS).last_hidden_state for model in (base, loaded.model))
    classifier = AutoModelForSequenceClassification.from_pretrained(saved)
    hybrimoe.save_packed(base, tmp_path / "base")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")

    assert torch.equal(got, wanted)
    names = {layer.name for layer in loaded.hybrimoe.linears} - {"lm_head"}
    assert {f"model.{layer.name}" for layer in base.hybrimoe.linears} == names
    for model in (classifier, again):
        assert {layer.name for layer in model.hybrimoe.linears} == names


def test_what_is_asked_for_must_be_what_is_there(loaded, saved):
    fmt = loaded.hybrimoe.config.linear
    other = {"int4": "int8", "int8": "int4"}[fmt]
    for asked in (other, None):
        with pytest.raises(ConfigError, match=f"linear must be '{fmt}'"):
            hybrimoe.from_pretrained(saved, device="cpu", linear=asked)
    with pytest.raises(ConfigError, match=f"linear must be '{fmt}'"):
        AutoModelForCausalLM.from_pretrained(saved, quantization_config=Config(linear=other))
    with pytest.raises(ConfigError, match="device must be 'cpu', for which the dense layers"):
        hybrimoe.from_pretrained(saved, device="emulated")
    assert hybrimoe.from_pretrained(saved, device="cpu", linear=fmt, weights=fmt).hybrimoe


def test_dense_layers_that_were_not_packed_are_packed_on_load(tmp_path, loaded):
    config = loaded.hybrimoe.config
    hybrimoe.save_packed(load_three_layers(weights=config.weights), tmp_path)
    again = hybrimoe.from_pretrained(tmp_path, config)

    assert torch.equal(logits(again), logits(loaded))


def test_biases_and_a_head_of_its_own_come_back(tmp_path):
    config = generated.configuration(2, 64, 32, 4, 128)
    config.num_experts_per_tok, config.attention_bias = 2, True
    torch.manual_seed(0)
    model = Qwen3MoeForCausalLM(config).float().eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    hybrimoe.wrap(model, device="cpu", weights="int4", linear="int4")
    hybrimoe.save_packed(model, tmp_path)
    again = hybrimoe.from_pretrained(tmp_path, device="cpu")

    assert isinstance(again.lm_head, PackedLinear)
    assert not again.lm_head.found.tied
    assert torch.equal(logits(again), logits(model))
    assert again.state_dict().keys() == model.state_dict().keys()


def test_a_folder_of_before_loads_and_one_without_packed_dense_layers_is_like_it(tmp_path, loaded):
    plain = load_three_layers(weights=loaded.hybrimoe.config.weights)
    hybrimoe.save_packed(plain, tmp_path)
    manifest = json.loads((tmp_path / "hybrimoe.json").read_text())
    assert manifest["schema_version"] == 1
    assert "linears" not in manifest
    shutil.copy(part(tmp_path) / "config.json", tmp_path / "config.json")
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / "generation_config.json").unlink()
    again = hybrimoe.from_pretrained(tmp_path, device="cpu")

    assert torch.equal(logits(again), logits(plain))
    assert again.hybrimoe.config.linear is None


def change_linear(**values: object):
    def apply(folder: Path) -> None:
        path = folder / "hybrimoe.json"
        manifest = json.loads(path.read_text())
        manifest["linears"]["layers"][1] |= values
        path.write_text(json.dumps(manifest))

    return apply


def change_linears(value: object):
    def apply(folder: Path) -> None:
        path = folder / "hybrimoe.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"linears": value}))

    return apply


def flip_last_byte(folder: Path) -> None:
    with (part(folder) / "linears.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


SPOILED = {
    "gone": (lambda f: (part(f) / "linears.safetensors").unlink(), "cannot be read"),
    "cut": (lambda f: os.truncate(part(f) / "linears.safetensors", 9000), "cut off"),
    "bit": (flip_last_byte, "does not have the checksum"),
    "checksum": (change_linear(checksum=1), "does not have the checksum"),
    "name": (change_linear(name="model.layers.0.mlp"), "that the manifest lists"),
    "shape": (change_linear(shape=[1, 2]), "from another dense layer"),
    "layout": (change_linear(layout={}), "from another dense layer"),
    "format": (change_linear(format="int2"), "which is no dense layer"),
    "dtype": (change_linear(dtype="int8"), "which is no dense layer"),
    "no entry": (change_linear(tied=3), "no valid entry for packed dense layer 1"),
    "no shape": (change_linear(shape=["1", 2]), "no valid entry for packed dense layer 1"),
    "no format": (change_linears({"layers": []}), "the format and the layers"),
    "no list": (change_linears([]), "the format and the layers"),
    "none of them": (change_linears(None), "no weights for"),
}


@pytest.mark.parametrize("loaded", ["int4"], indirect=True)
@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_folder_is_a_typed_error(name, saved):
    spoil, message = SPOILED[name]
    spoil(saved)

    with pytest.raises(CheckpointError, match=message):
        hybrimoe.from_pretrained(saved, device="cpu")


@pytest.mark.parametrize("loaded", ["int4"], indirect=True)
def test_the_plan_counts_its_dense_layers_as_they_are(loaded, saved):
    dense = hybrimoe.plan(saved).parts["dense"]
    packed = sum(layer.packed_bytes for layer in loaded.hybrimoe.linears)
    kept = sum(p.nbytes for p in loaded.parameters())

    assert dense == pytest.approx(packed + kept, rel=0.01)
