"""unwrap gives the weights back, and a failed wrap leaves none of its own, whatever fails meanwhile."""

import warnings

import pytest
import torch
from torch import nn

import hybrimoe
from hybrimoe import session
from hybrimoe.errors import (
    ConfigError,
    DeviceLostError,
    DiskReadError,
    InsufficientMemoryError,
    UnsupportedModelError,
    WrappedModelError,
)
from hybrimoe.modules import pooled_experts as experts_module
from hybrimoe.runtime.devices.emulated import EmulatedAccelerator
from mixed_models import Layer, logits, pruned
from small_model import Fails, wrap_on

LAYERS = (Layer(4, 2, 32), Layer(3, 1, 96), Layer(5, 2, 64))
ERRORS = [
    RuntimeError("driver"),
    ValueError("odd"),
    AssertionError(),
    InsufficientMemoryError("no"),
]
LOST = DeviceLostError("the emulated device fell off the bus")


class State:
    """Everything of a model that wrap may touch."""

    def __init__(self, model):
        self.model = model
        self.modules = dict(model.named_modules())
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.parameters = {name: id(p) for name, p in model.named_parameters()}
        self.hooks = self.count_hooks()
        self.attributes = {name: set(vars(m)) for name, m in self.modules.items()}
        self.logits = logits(model)

    def count_hooks(self):
        kinds = (
            "_forward_hooks", "_forward_pre_hooks", "_state_dict_pre_hooks",
            "_load_state_dict_pre_hooks",
        )  # fmt: skip
        modules = self.model.named_modules()
        return {name: [len(getattr(m, kind)) for kind in kinds] for name, m in modules}

    def assert_back(self):
        model = self.model
        assert not hasattr(model, "hybrimoe")
        found = dict(model.named_modules())
        assert list(found) == list(self.modules)
        assert all(found[name] is module for name, module in self.modules.items())
        assert {name: id(p) for name, p in model.named_parameters()} == self.parameters
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, self.weights[name]), name
        assert self.count_hooks() == self.hooks
        assert {name: set(vars(m)) for name, m in found.items()} == self.attributes
        assert torch.equal(logits(model), self.logits)


@pytest.fixture
def model():
    return pruned(LAYERS)


@pytest.fixture
def state(model):
    return State(model)


@pytest.fixture
def accelerator(monkeypatch, model, state):
    accelerator = EmulatedAccelerator()
    wrap_on(monkeypatch, model, accelerator, vram=0.6, ram=0.6)
    return accelerator


def raises(error):
    def call(*args, **kwargs):
        raise error

    return call


def quietly(call, *args):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*args)
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("method", ["synchronize", "allocate", "unpin"])
def test_a_device_that_does_not_let_go(model, state, accelerator, method, error):
    setattr(accelerator, method, raises(error))
    said = quietly(hybrimoe.unwrap, model)
    assert len(said) == 1
    assert f"did not let go in order: {type(error).__name__}" in said[0]
    state.assert_back()
    assert hybrimoe.unwrap(model) is model


@pytest.mark.parametrize("method", ["synchronize", "allocate", "unpin"])
def test_a_lost_device_is_let_go_of_without_a_word(model, state, accelerator, method):
    setattr(accelerator, method, raises(LOST))
    assert quietly(hybrimoe.unwrap, model) == []
    state.assert_back()


@pytest.mark.parametrize("operation", ["copy", "experts", "fetch", "upload", "wait"])
@pytest.mark.parametrize("error", [*ERRORS[:3], LOST], ids=lambda error: type(error).__name__)
def test_after_a_failed_forward(model, state, accelerator, operation, error):
    accelerator.fault = Fails(operation, 1, error, times=10**6)
    failed = accelerator.fault
    try:
        logits(model)
    except type(error):
        assert failed.raised
    quietly(hybrimoe.unwrap, model)
    state.assert_back()


@pytest.mark.parametrize("where", ["reader", "backing", "tier"])
def test_a_disk_that_does_not_let_go(model, state, where):
    hybrimoe.wrap(model, ram=0.6)
    tier = model.hybrimoe.pool.tier
    closes = {"reader": tier.reader, "backing": tier.backing, "tier": tier}[where]
    usual, closes.close = closes.close, raises(OSError("no such device"))
    assert "no such device" in quietly(hybrimoe.unwrap, model)[0]
    state.assert_back()
    closes.close = usual
    tier.close()


def test_an_interrupt_while_letting_go_is_raised_when_the_weights_are_back(
    model, state, accelerator
):
    accelerator.synchronize = raises(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        hybrimoe.unwrap(model)
    state.assert_back()


@pytest.mark.parametrize("way", [{}, {"ram": 0.6}, {"device": "emulated", "vram": 0.6}])
@pytest.mark.parametrize("k", range(len(LAYERS)))
@pytest.mark.parametrize("error", [MemoryError(), KeyboardInterrupt()], ids=["memory", "interrupt"])
def test_a_layer_that_cannot_be_unpacked_is_tried_again(monkeypatch, model, state, way, k, error):
    hybrimoe.wrap(model, **way)
    fails, usual = Fails("unpack", k, error), experts_module.formats.unpack

    def unpack(*args):
        fails("unpack")
        usual(*args)

    with monkeypatch.context() as patched:
        patched.setattr(experts_module.formats, "unpack", unpack)
        with pytest.raises(type(error)):
            hybrimoe.unwrap(model)
    last = len(LAYERS) - 1  # what was attached last is taken away first
    assert [layer.index for layer in model.hybrimoe.in_place] == [last - k]
    if "device" in way:
        with pytest.raises(WrappedModelError, match="call it again"):
            logits(model)
    else:
        torch.testing.assert_close(logits(model), state.logits, rtol=1e-4, atol=1e-4)
    hybrimoe.unwrap(model)
    state.assert_back()


@pytest.mark.parametrize("device", ["cpu", "emulated"])
def test_a_disk_that_cannot_be_read_for_a_while(model, state, device):
    hybrimoe.wrap(model, ram=0.6, device=device)
    backing = model.hybrimoe.pool.tier.backing
    usual, backing.layer = backing.layer, raises(DiskReadError("Input/output error", "file"))
    for _ in range(2):
        with pytest.raises(DiskReadError):
            hybrimoe.unwrap(model)
        assert len(model.hybrimoe.in_place) == len(LAYERS)
    backing.layer = usual
    hybrimoe.unwrap(model)
    state.assert_back()


@pytest.mark.parametrize(
    ("operation", "k", "given"),
    [
        ("allocate", 0, {}), ("pin", 0, {}), ("pin", 2, {}), ("copy", 0, {}), ("copy", 4, {}),
        ("wait", 0, {}), ("pin", 0, {"ram": 0.6}), ("copy", 2, {"ram": 0.6}),
        ("wait", 1, {"ram": 0.6}),
    ],
)  # fmt: skip
def test_a_failed_wrap_leaves_the_model_as_it_was(monkeypatch, model, state, operation, k, given):
    accelerator = EmulatedAccelerator(fault=Fails(operation, k, OSError("gone"), times=10**6))
    with pytest.raises(OSError, match="gone"):
        wrap_on(monkeypatch, model, accelerator, vram=0.6, **given)
    state.assert_back()


def test_a_wrap_whose_device_fails_twice_leaves_the_model_as_it_was(monkeypatch, model, state):
    accelerator = EmulatedAccelerator()
    accelerator.synchronize, accelerator.unpin = raises(ValueError("odd")), raises(OSError("odder"))
    with pytest.raises(ValueError, match="odd"):
        wrap_on(monkeypatch, model, accelerator, vram=0.6)
    state.assert_back()


@pytest.mark.parametrize("step", ["share", "guard"])
def test_a_wrap_that_fails_at_its_end_leaves_the_model_as_it_was(monkeypatch, model, state, step):
    usual = getattr(session.Runtime, step)

    def fail(self, *args):
        usual(self, *args)
        raise OSError("the very end")

    monkeypatch.setattr(session.Runtime, step, fail)
    with pytest.raises(OSError, match="the very end"):
        hybrimoe.wrap(model, device="emulated")
    state.assert_back()


def test_a_failed_wrap_that_cannot_undo_itself_is_undone_by_unwrap(monkeypatch, model, state):
    monkeypatch.setattr(session.Runtime, "guard", raises(OSError("the very end")))
    with monkeypatch.context() as patched:
        patched.setattr(experts_module.formats, "unpack", raises(MemoryError("no room")))
        with pytest.raises(OSError, match="the very end") as caught:
            hybrimoe.wrap(model)
    assert any("MemoryError: no room" in note for note in caught.value.__notes__)
    assert any("unwrap" in note for note in caught.value.__notes__)
    hybrimoe.unwrap(model)
    state.assert_back()


@pytest.mark.parametrize("weights", ["native", "int8", "int4"])
def test_a_vram_without_room_is_refused_before_any_weight_is_rounded(model, state, weights):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ConfigError, match="vram must hold at least one expert"):
            hybrimoe.wrap(model, device="emulated", vram=1000, weights=weights)
    state.assert_back()


@pytest.mark.parametrize("shares", ["module", "parameter"])
def test_layers_that_share_their_experts_are_refused_before_anything_is_touched(shares):
    model = pruned((Layer(4, 2, 32),) * 2)
    first, second = (layer.mlp for layer in model.model.layers)
    if shares == "module":
        second.experts = first.experts
    else:
        second.experts.down_proj = first.experts.down_proj
    state = State(model)
    with pytest.raises(
        UnsupportedModelError, match=r"layers.0.mlp.experts and .*share their weights"
    ):
        hybrimoe.wrap(model)
    state.assert_back()


class Head(nn.Module):
    """A user's own module around a model, without a configuration, or with one of its own."""

    def __init__(self, config=None):
        super().__init__()
        self.backbone, self.score = pruned(LAYERS).model, nn.Linear(64, 3)
        if config is not None:
            self.config = config

    def forward(self, ids):
        return self.score(self.backbone(ids).last_hidden_state[:, -1])


@pytest.mark.parametrize("config", [None, {"hidden": 64}, object()], ids=["none", "dict", "object"])
@pytest.mark.parametrize(
    "way",
    [{}, {"ram": 0.6}, {"device": "emulated"}, {"device": "emulated", "vram": 0.6, "ram": 0.6}],
)
@torch.no_grad()
def test_a_module_without_a_configuration_of_transformers(config, way):
    head, ids = Head(config).eval(), torch.arange(1, 10)[None]
    wanted = head(ids)
    hybrimoe.wrap(head, **way)
    torch.testing.assert_close(head(ids), wanted, rtol=1e-4, atol=1e-4)
    hybrimoe.unwrap(head)
    assert torch.equal(head(ids), wanted)


def test_layers_of_one_expert_need_no_configuration():
    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = pruned((Layer(1, 1, 32),)).model.layers[0].mlp.experts

        def forward(self, *args):
            return self.experts(*args)

    x, ids, weights = torch.randn(3, 64), torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1)
    bare = Bare().eval()
    with torch.no_grad():
        wanted = bare(x, ids, weights)
        hybrimoe.wrap(bare, device="emulated", vram=1.0)
        torch.testing.assert_close(bare(x, ids, weights), wanted, rtol=1e-4, atol=1e-4)
