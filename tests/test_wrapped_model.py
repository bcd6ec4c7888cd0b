"""What else people do with a model: move, copy, save, train, compile. It works or says why not."""

import copy
import io
import pickle

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import hybrimoe
from hybrimoe.errors import WrappedModelError
from paths import TINY_MOE
from test_wrap import batch, fingerprint

Q_PROJ = "model.layers.3.self_attn.q_proj"

# Moving and casting.

MOVES = {
    "half": lambda model: model.half(),
    "float": lambda model: model.float(),
    "double": lambda model: model.double(),
    "to dtype": lambda model: model.to(torch.float16),
    "to device": lambda model: model.to("meta"),
    "to both": lambda model: model.to("meta", torch.float32),
    "cuda-like": lambda model: model._apply(lambda tensor: tensor.to("meta")),
    "part": lambda model: model.model.to(torch.float32),
    "one layer": lambda model: model.model.layers[2].half(),
    "experts": lambda model: model.model.layers[2].mlp.experts.half(),
}


@pytest.mark.parametrize("move", MOVES)
def test_a_move_is_refused_before_any_part_moved(model, tokenizer, move):
    hybrimoe.wrap(model)
    bits = fingerprint(model)
    with pytest.raises(WrappedModelError, match=r"cannot be moved to .* or cast to .*unwrap"):
        MOVES[move](model)

    assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "cpu")}
    assert fingerprint(model) == bits
    assert hybrimoe.verify(model)


STAYS = {
    "to the same device": lambda model: model.to("cpu"),
    "to the same dtype": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "cpu": lambda model: model.cpu(),
    "part": lambda model: model.model.layers[2].to("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("stay", STAYS)
def test_a_move_to_where_the_model_is_changes_nothing(model, stay):
    hybrimoe.wrap(model)
    bits = fingerprint(model)
    STAYS[stay](model)

    assert fingerprint(model) == bits


def test_a_model_moves_again_after_unwrap(model, tokenizer):
    hybrimoe.unwrap(hybrimoe.wrap(model)).float()

    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert not any("_apply" in vars(module) for module in model.modules())


# Copies.


@pytest.mark.parametrize("part", ["model", "its body", "its experts"])
def test_copies_and_pickles_are_refused(model, part):
    hybrimoe.wrap(model)
    whole = {
        "model": model,
        "its body": model.model,
        "its experts": model.model.layers[0].mlp.experts,
    }[part]
    for attempt in (
        lambda: copy.deepcopy(whole),
        lambda: pickle.dumps(whole),
        lambda: torch.save(whole, io.BytesIO()),
    ):
        with pytest.raises(WrappedModelError, match=r"hybrimoe\.unwrap"):
            attempt()
    assert hybrimoe.verify(model)


# Saving and loading.


def test_the_state_dict_is_complete_and_bit_equal(model):
    bits, keys = fingerprint(model), list(model.state_dict())
    hybrimoe.wrap(model)

    assert list(model.state_dict()) == keys
    assert fingerprint(model) == bits


def test_save_pretrained_writes_what_the_unwrapped_model_writes(model, tokenizer, tmp_path):
    inputs = batch(tokenizer)
    model.save_pretrained(tmp_path / "before")
    with torch.no_grad():
        logits = model(**inputs).logits

    hybrimoe.wrap(model).save_pretrained(tmp_path / "after")

    assert stored(tmp_path / "after") == stored(tmp_path / "before")
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "after").eval()
    with torch.no_grad():
        assert torch.equal(reloaded(**inputs).logits, logits)
    assert hybrimoe.verify(model)


@pytest.mark.filterwarnings("ignore:the experts were stored as")
def test_save_pretrained_of_a_lossy_format_writes_dequantized_experts(model, tmp_path):
    hybrimoe.wrap(model, weights="int4").save_pretrained(tmp_path)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    hybrimoe.unwrap(model)

    assert fingerprint(reloaded) == fingerprint(model)


def stored(folder) -> dict[str, tuple]:
    """Name, dtype, shape and bytes of every tensor in a saved checkpoint."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(name)
                raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
                found[name] = (tensor.dtype, tensor.shape, raw)
    return found


def test_loading_a_state_dict_is_refused_and_changes_nothing(model):
    state = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    hybrimoe.wrap(model)
    bits = fingerprint(model)
    with pytest.raises(WrappedModelError, match=r"cannot load a state dict; .*unwrap"):
        model.load_state_dict(state)

    assert fingerprint(model) == bits


# Gradients.


def embedded(model: PreTrainedModel, tokenizer) -> tuple[Tensor, Tensor]:
    """Embeddings of some text as a leaf, and the tokens as labels."""
    ids = tokenizer("def main(arguments):\n    return arguments", return_tensors="pt").input_ids
    return model.get_input_embeddings()(ids).detach().requires_grad_(), ids


def gradients(model: PreTrainedModel, tokenizer) -> dict[str, Tensor]:
    """Gradients of the loss: of the input and of all that is trainable."""
    embeddings, labels = embedded(model, tokenizer)
    model.zero_grad()
    model(inputs_embeds=embeddings, labels=labels).loss.backward()
    trained = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {"inputs_embeds": embeddings.grad} | trained


def assert_equal_gradients(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(got) == set(wanted)
    for name, gradient in wanted.items():
        assert gradient.abs().sum() > 0, name
        torch.testing.assert_close(got[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_gradients_of_the_input_are_those_of_the_unwrapped_model(model32, tokenizer):
    model32.requires_grad_(False)
    wanted = gradients(model32, tokenizer)

    assert_equal_gradients(gradients(hybrimoe.wrap(model32), tokenizer), wanted)


def test_gradients_of_all_that_is_not_an_expert_are_those_of_the_unwrapped_model(
    model32, tokenizer
):
    for name, parameter in model32.named_parameters():
        parameter.requires_grad_(".experts." not in name)
    wanted = gradients(model32, tokenizer)
    assert any("gate.weight" in name for name in wanted)  # routers get theirs through the weights

    assert_equal_gradients(gradients(hybrimoe.wrap(model32), tokenizer), wanted)


class LoRA(nn.Module):
    """A low-rank trainable addition to a frozen linear layer."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Parameter(torch.randn(4, base.in_features) / 16)
        self.up = nn.Parameter(torch.randn(base.out_features, 4) / 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.down.T @ self.up.T


def test_an_adapter_below_wrapped_experts_gets_its_gradients(model32, tokenizer):
    torch.manual_seed(0)
    model32.requires_grad_(False)
    model32.set_submodule(Q_PROJ, LoRA(model32.get_submodule(Q_PROJ)))
    wanted = gradients(model32, tokenizer)

    assert set(wanted) == {"inputs_embeds", f"{Q_PROJ}.down", f"{Q_PROJ}.up"}
    assert_equal_gradients(gradients(hybrimoe.wrap(model32), tokenizer), wanted)


def test_gradients_with_checkpointing_are_the_same(model32, tokenizer):
    model32.requires_grad_(False)
    model32.set_submodule(Q_PROJ, LoRA(model32.get_submodule(Q_PROJ)))
    wanted = gradients(model32, tokenizer)
    hybrimoe.wrap(model32).train()
    model32.gradient_checkpointing_enable()

    assert_equal_gradients(gradients(model32, tokenizer), wanted)


def test_experts_are_no_parameters_of_a_wrapped_model(model):
    hybrimoe.wrap(model)

    assert not [name for name, _ in model.named_parameters() if ".experts." in name]


def test_backward_leaves_the_experts_packed(model32, tokenizer):
    hybrimoe.wrap(model32)
    gradients(model32, tokenizer)

    for layer in model32.hybrimoe.layers:
        assert all(parameter.numel() == 0 for parameter in layer.original.parameters())
    assert hybrimoe.verify(model32)


# Compiling.


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
def test_a_compiled_model_gives_equal_logits(tokenizer):
    small = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype="float32", num_hidden_layers=2)
    inputs = batch(tokenizer)
    with torch.no_grad():
        wanted = small(**inputs).logits
        compiled = torch.compile(hybrimoe.wrap(small), backend="eager")
        torch.testing.assert_close(compiled(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
    torch.compiler.reset()
