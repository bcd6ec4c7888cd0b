"""A weight that a checkpoint lacks is an error in every door, and never a random number."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Qwen3MoeForCausalLM,
)

import families
import generated
import hybrimoe
from hybrimoe.config import Config
from hybrimoe.errors import CheckpointError
from hybrimoe.sources.packed import files as packed_files
from test_loading import DOORS, edit

KINDS = {
    "router": "model.layers.1.mlp.gate.weight",
    "norm": "model.layers.0.input_layernorm.weight",
    "dense layer": "model.layers.1.self_attn.q_proj.weight",
    "untied head": "lm_head.weight",
    "embedding": "model.embed_tokens.weight",
}
WRONG = r"no weights for {}: it is incomplete"


@pytest.fixture
def small(tmp_path) -> Path:
    """Two layers with four experts each and a head of its own."""
    config = generated.configuration(2, 64, 32, 4, 128)
    config.num_experts_per_tok = 2
    return generated.write(tmp_path / "small", config, 1)


def drop(folder: Path, *names: str) -> None:
    """Take tensors out of a checkpoint of one file."""
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    save_file({n: t for n, t in tensors.items() if n not in names}, file, {"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        placed = json.loads(index.read_text())["weight_map"]
        edit(index, weight_map={n: f for n, f in placed.items() if n not in names})


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_weight_is_named(kind, door, small):
    drop(small, KINDS[kind])

    with pytest.raises(CheckpointError, match=WRONG.format(KINDS[kind])):
        DOORS[door](small)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("kind", ["router", "untied head"])
def test_a_weight_that_a_packed_folder_lacks_is_named(kind, door, small, tmp_path, monkeypatch):
    whole = packed_files.dense_state
    monkeypatch.setattr(
        packed_files,
        "dense_state",
        lambda model: {n: t for n, t in whole(model).items() if n != KINDS[kind]},
    )
    hybrimoe.save_packed(hybrimoe.from_pretrained(small), tmp_path / "packed")

    with pytest.raises(CheckpointError, match=WRONG.format(KINDS[kind])):
        DOORS[door](tmp_path / "packed")


def test_several_missing_weights_are_named_and_counted(small):
    names = [f"model.layers.{layer}.self_attn.{p}_proj.weight" for layer in "01" for p in "kqv"]
    drop(small, *names)

    with pytest.raises(CheckpointError, match=rf"no weights for {names[0]}, .* and 2 more"):
        hybrimoe.from_pretrained(small)


def test_a_tied_head_without_its_embedding_is_an_error(small):
    edit(small / "config.json", tie_word_embeddings=True)
    drop(small, "lm_head.weight", "model.embed_tokens.weight")

    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight"):
        hybrimoe.from_pretrained(small)


@pytest.mark.parametrize("door", DOORS)
def test_a_tied_head_is_not_missing(door, small):
    edit(small / "config.json", tie_word_embeddings=True)
    drop(small, "lm_head.weight")
    model = DOORS[door](small)

    assert model.lm_head.weight is model.model.embed_tokens.weight


@pytest.mark.parametrize("door", DOORS)
def test_what_a_family_does_without_is_not_missing(door, small, monkeypatch):
    monkeypatch.setattr(Qwen3MoeForCausalLM, "_keys_to_ignore_on_load_missing", {"lm_head"})
    drop(small, "lm_head.weight")

    assert DOORS[door](small).hybrimoe.layers


def test_a_router_s_missing_bias_is_an_error(tmp_path):
    family = next(name for name in families.decorated() if name.startswith("deepseek_v3."))
    built = families.build(family)
    built.save_pretrained(tmp_path)
    name = next(n for n in built.state_dict() if n.endswith("e_score_correction_bias"))
    drop(tmp_path, name)

    with pytest.raises(CheckpointError, match=WRONG.format(name)):
        type(built).from_pretrained(tmp_path, quantization_config=Config())


# A head for another task.


def test_a_new_head_is_what_was_asked_for_in_transformers_door(small):
    model = AutoModelForSequenceClassification.from_pretrained(
        small, quantization_config=Config(), num_labels=3
    )

    assert model.score.weight.shape == (3, 64)
    assert model.hybrimoe.layers


def test_a_new_head_excuses_no_missing_router(small):
    drop(small, KINDS["router"])

    with pytest.raises(CheckpointError, match=KINDS["router"]):
        AutoModelForSequenceClassification.from_pretrained(small, quantization_config=Config())


def test_a_checkpoint_without_a_head_is_a_base_model(small):
    edit(small / "config.json", architectures=["Qwen3MoeModel"])
    drop(small, "lm_head.weight")

    with pytest.raises(CheckpointError, match=WRONG.format("lm_head.weight")):
        hybrimoe.from_pretrained(small)
    model = AutoModel.from_pretrained(small, quantization_config=Config())
    assert model(torch.tensor([[1, 2, 3]])).last_hidden_state.isfinite().all()
    assert AutoModelForCausalLM.from_pretrained(small, quantization_config=Config()).hybrimoe
