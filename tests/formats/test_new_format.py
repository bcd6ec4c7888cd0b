"""A new format is one file and one line: all the rest of the package takes it from there."""

import pytest
import torch
from toy import WIDE4
from transformers import AutoModelForCausalLM

import hybrimoe
from hybrimoe.formats import registry
from parity import nmse
from paths import TINY_MOE

IDS = torch.arange(10, 34)[None]


@pytest.fixture(scope="module", autouse=True)
def wide4():
    registry.register(WIDE4)
    yield
    del registry.FORMATS[WIDE4.name], registry.TAGS[WIDE4.name]


@pytest.fixture
def model():
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize(
    "settings", [{}, {"device": "emulated", "vram": 0.5}], ids=["cpu", "shared"]
)
def test_it_is_packed_computed_and_verified(model, settings):
    wanted = logits(model)
    hybrimoe.wrap(model, weights="wide4", **settings)

    assert nmse(logits(model), wanted) < 2e-2  # four bits round as much
    assert hybrimoe.verify(model, IDS).passed
    assert model.hybrimoe.layers[0].packed.fmt == "wide4"
    assert "wide4" in str(model.hybrimoe.report())
    with pytest.warns(UserWarning, match="stored as wide4"):
        hybrimoe.unwrap(model)
    assert nmse(logits(model), wanted) < 2e-2


def test_a_packed_folder_keeps_it(model, tmp_path):
    hybrimoe.wrap(model, weights="wide4", linear="wide4")
    hybrimoe.save_packed(model, tmp_path)
    loaded = hybrimoe.from_pretrained(tmp_path)

    assert torch.equal(logits(loaded), logits(model))
    assert loaded.hybrimoe.config.weights == loaded.hybrimoe.config.linear == "wide4"


def test_a_checkpoint_is_packed_on_arrival_and_planned(model):
    hybrimoe.wrap(model, weights="wide4")
    loaded = hybrimoe.from_pretrained(TINY_MOE, weights="wide4", dtype=torch.float32)

    assert torch.equal(logits(loaded), logits(model))
    assert hybrimoe.plan(TINY_MOE, weights="wide4").weights == "wide4"
