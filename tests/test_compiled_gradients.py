"""Training through torch.compile: gradients as without it, and the same refusals and notices."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import hybrimoe
from adapted import BOTH, IDS, adapted, bare
from hybrimoe.errors import WrappedModelError

PLACES = {
    "cpu": {"device": "cpu"},
    "packed dense layers": {"device": "cpu", "linear": "int8"},
    "emulated and disk": {"device": "emulated", "vram": 0.3, "ram": 0.6},
}


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(model: nn.Module, whole: bool = True, backend: str = "aot_eager") -> nn.Module:
    return torch.compile(model, backend=backend, fullgraph=whole)


def gradients(model: nn.Module, called: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    called(input_ids=IDS, labels=IDS).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.filterwarnings("ignore:the experts", "ignore:Dynamo does not know how to trace")
@pytest.mark.parametrize("place", PLACES)
def test_gradients_of_all_that_is_not_an_expert(place):
    model = hybrimoe.wrap(bare().train(), **PLACES[place])
    wanted = gradients(model, model)
    got = gradients(model, compiled(model, whole=place != "emulated and disk"))

    assert set(got) == set(wanted)
    assert any("gate.weight" in name or "norm" in name for name in wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def tuned(model: nn.Module) -> nn.Module:
    """LoRA on attention that trains, beside LoRA on experts."""
    return adapted(model, target_modules=["q_proj"]).train()


def frozen(model: nn.Module) -> None:
    """Let nothing but LoRA on attention want gradients."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name and ".experts." not in name)


def test_lora_beside_frozen_lora_on_experts():
    model = tuned(bare())
    frozen(model)
    wanted = gradients(model, model)
    hybrimoe.wrap(model, device="cpu")
    got = gradients(model, compiled(model))

    assert set(got) == set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_gradients_are_those_of_the_adapter_that_is_active():
    """A reference pass without adapters before the backward pass, as preference training has it."""
    model = tuned(bare())
    frozen(model)
    wanted = gradients(model, model)
    hybrimoe.wrap(model, device="cpu")
    model.zero_grad()
    loss = compiled(model, backend="eager")(input_ids=IDS, labels=IDS).loss
    with torch.no_grad(), model.disable_adapter():
        model(IDS)
    frozen(model)  # leaving the block, PEFT wants gradients of all factors again
    loss.backward()

    for name, gradient in wanted.items():
        got = model.get_parameter(name).grad
        torch.testing.assert_close(got, gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_lora_on_experts_is_refused_and_gets_no_silent_nothing(mode):
    model = getattr(hybrimoe.wrap(tuned(bare()), device="cpu"), mode)()
    with pytest.raises(WrappedModelError, match="cannot be trained while they are wrapped"):
        gradients(model, compiled(model))


def test_lora_on_the_first_layer_s_experts_alone_is_refused_too():
    config = LoraConfig(r=2, target_modules=[], target_parameters=list(BOTH))
    model = get_peft_model(hybrimoe.wrap(bare(), device="cpu"), config).train()
    with pytest.raises(WrappedModelError, match="cannot be trained while they are wrapped"):
        compiled(model)(input_ids=IDS, labels=IDS)


def test_full_training_says_once_that_experts_are_frozen():
    model = hybrimoe.wrap(bare().train(), device="cpu")
    called = compiled(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            gradients(model, called)
    assert len([w for w in caught if "are frozen" in str(w.message)]) == 1
