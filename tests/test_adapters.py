"""What experts compute between their projections is found by evaluation, not by name."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import hybrimoe
from hybrimoe.errors import UnsupportedModelError
from hybrimoe.formats.gate import Gate
from hybrimoe.models import adapters
from hybrimoe.models.gates import find_gate
from hybrimoe.models.weights import ExpertWeights
from parity import nmse, violation
from paths import TINY_MOE

SILU, GELU, GELU_TANH, RELU, RELU2 = range(5)
LIMITLESS = math.inf


class Gated:
    """The parts of a decorated module that say what its gate computes."""

    has_gate = True

    def __init__(self, formula, concatenated: bool = True, **numbers) -> None:
        self.formula, self.is_concatenated = formula, concatenated
        self.act_fn = formula
        vars(self).update(numbers)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        if self.is_concatenated:
            gate, up = gate_up.chunk(2, dim=-1)
        else:
            gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        return self.formula(gate, up)


def gelu_tanh(x: Tensor) -> Tensor:
    return nn.functional.gelu(x, approximate="tanh")


def relu2(x: Tensor) -> Tensor:
    return nn.functional.relu(x).square()


ACTS = {
    SILU: nn.functional.silu,
    GELU: nn.functional.gelu,
    GELU_TANH: gelu_tanh,
    RELU: nn.functional.relu,
    RELU2: relu2,
}


def gpt_oss(gate: Tensor, up: Tensor, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


def clamped(gate: Tensor, up: Tensor, limit: float) -> Tensor:
    return nn.functional.silu(gate.clamp(max=limit)) * up.clamp(-limit, limit)


@pytest.mark.parametrize("concatenated", [True, False])
@pytest.mark.parametrize("kind", ACTS)
def test_a_product_of_activation_and_up_is_found(kind, concatenated):
    module = Gated(lambda gate, up: ACTS[kind](gate) * up, concatenated)

    assert find_gate(module) == Gate(kind, 1.0, LIMITLESS)


@pytest.mark.parametrize("kind", ACTS)
def test_an_activation_without_a_gate_is_found(kind):
    module = SimpleNamespace(has_gate=False, act_fn=ACTS[kind])

    assert find_gate(module) == Gate(kind, 1.0, LIMITLESS)


@pytest.mark.parametrize("name", ["limit", "swiglu_limit"])
@pytest.mark.parametrize("limit", [2.5, 7.0, 10.0])
def test_a_clamped_swiglu_is_found_with_its_limit(name, limit):
    module = Gated(lambda gate, up: clamped(gate, up, limit), **{name: limit})

    assert find_gate(module) == Gate(SILU, 1.0, limit)


def test_a_limit_that_the_formula_does_not_use_is_not_believed():
    module = Gated(lambda gate, up: nn.functional.silu(gate) * up, limit=7.0)

    assert find_gate(module).limit == LIMITLESS


@pytest.mark.parametrize(("alpha", "limit"), [(1.702, 7.0), (1.5, 3.0)])
def test_the_gate_of_gpt_oss_is_found(alpha, limit):
    formula = Gated(lambda gate, up: gpt_oss(gate, up, alpha, limit), False)
    formula.alpha, formula.limit = alpha, limit

    assert find_gate(formula) == Gate(SILU, alpha, limit, 1.0)


def test_swapped_gate_and_up_are_not_taken_for_the_usual_order():
    with pytest.raises(UnsupportedModelError):
        find_gate(Gated(lambda gate, up: nn.functional.silu(up) * gate))


def test_an_unknown_gate_is_refused_by_the_name_of_its_class():
    class MishExperts(Gated):
        pass

    with pytest.raises(UnsupportedModelError) as caught:
        find_gate(MishExperts(lambda gate, up: nn.functional.mish(gate) * up))

    assert "MishExperts" in str(caught.value)
    assert "silu, gelu, gelu_tanh, relu, relu2" in str(caught.value)


class ToyExperts(nn.Module):
    """Experts of another library: one parameter per matrix, columns first, relu in between."""

    def __init__(self, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.into = nn.Parameter(torch.randn(experts, hidden, inner) / hidden**0.5)
        self.out = nn.Parameter(torch.randn(experts, inner, hidden) / inner**0.5)

    def forward(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        inner = torch.einsum("td,tkdf->tkf", hidden, self.into[ids]).relu()
        return torch.einsum("tkf,tkfd,tk->td", inner, self.out[ids], weights)


class ToyModel(nn.Module):
    """One layer of toy experts with a top-2 router."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 48)
        self.router = nn.Linear(48, 6)
        self.toys = ToyExperts(6, 48, 40)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embedding

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = self.embedding(input_ids).flatten(0, 1)
        weights, ids = self.router(hidden).softmax(-1).topk(2)
        return self.toys(hidden, ids, weights)


def describe(module: ToyExperts) -> ExpertWeights:
    up = module.into.detach().transpose(1, 2).unsqueeze(1)
    return ExpertWeights(
        up, module.out.detach().transpose(1, 2), Gate(RELU), parameters=("into", "out")
    )


@pytest.fixture
def toy(monkeypatch) -> ToyModel:
    monkeypatch.setattr(adapters, "_ADAPTERS", {})
    torch.manual_seed(0)
    return ToyModel().requires_grad_(False)


def test_a_foreign_class_is_refused_until_an_adapter_is_registered(toy):
    with pytest.raises(UnsupportedModelError) as caught:
        hybrimoe.wrap(toy)

    assert "ToyExperts" in str(caught.value)
    assert "register_adapter" in str(caught.value)


def test_a_registered_adapter_works_end_to_end(toy):
    hybrimoe.register_adapter(ToyExperts, describe)
    ids = torch.arange(40).reshape(2, 20)
    experts, wanted = toy.toys, toy(ids)
    bits = toy.toys.into.clone(), toy.toys.out.clone()

    hybrimoe.wrap(toy)

    assert toy.toys is not experts
    assert violation(toy(ids), wanted) <= 1
    assert hybrimoe.verify(toy)
    hybrimoe.unwrap(toy)
    assert toy.toys is experts
    assert torch.equal(toy.toys.into, bits[0])
    assert torch.equal(toy.toys.out, bits[1])
    assert torch.equal(toy(ids), wanted)


@pytest.mark.parametrize(("weights", "bound"), [("int8", 1e-3), ("int4", 2e-2)])
@pytest.mark.filterwarnings("ignore:the experts were stored as")
def test_a_registered_adapter_works_with_quantized_experts(toy, weights, bound):
    hybrimoe.register_adapter(ToyExperts, describe)
    ids = torch.arange(40).reshape(2, 20)
    wanted = toy(ids)

    hybrimoe.wrap(toy, weights=weights)

    assert nmse(toy(ids), wanted) < bound
    assert hybrimoe.verify(toy)


@pytest.mark.parametrize(
    ("experts_class", "function", "message"),
    [
        ("ToyExperts", describe, "experts_class must be a subclass of nn.Module, got 'ToyExperts'"),
        (dict, describe, "experts_class must be a subclass of nn.Module"),
        (ToyExperts, None, "describe must be callable, got None"),
    ],
)
def test_a_bad_registration_is_refused(experts_class, function, message):
    with pytest.raises(TypeError, match=message):
        hybrimoe.register_adapter(experts_class, function)


@pytest.mark.parametrize("door", ["wrap", "load", "disk", "shared"])
def test_a_gate_is_looked_for_once_per_layer(monkeypatch, door):
    seen, find = [], adapters.find_gate
    monkeypatch.setattr(adapters, "find_gate", lambda module: seen.append(module) or find(module))
    if door == "load":
        model = hybrimoe.from_pretrained(TINY_MOE)
    else:
        model = AutoModelForCausalLM.from_pretrained(TINY_MOE)
        settings = {"disk": {"ram": 0.5}, "shared": {"device": "emulated"}}
        hybrimoe.wrap(model, **settings.get(door, {}))

    assert len(seen) == len({id(module) for module in seen}) == len(model.hybrimoe.layers)
