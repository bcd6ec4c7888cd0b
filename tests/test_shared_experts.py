"""Shared experts run beside the routed ones, and the block gets what it would have computed."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import families
import hybrimoe
from hybrimoe.modules.shared_experts import _Expert
from hybrimoe.runtime.executor import TorchExecutor

LATER = ["deepseek_v3", "glm4_moe", "flint", "cohere2_moe", "granitemoeshared", "nemotron_h"]
"""Families that call them last: on [B, S, D], on [T, D], beside the block, and of other width."""
SOONER = ["qwen2_moe", "laguna", "mixtral"]


def build(name):
    full = next((known for known in families.decorated() if known.split(".")[0] == name), None)
    if full is None:
        pytest.skip(f"this release of transformers has no {name}")
    model = families.build(full)
    return model, families.inputs(full, model)


def count(monkeypatch):
    """What happens, in order: an early launch, a computation when called, the CPU's share."""
    happened = []
    launch, share = _Expert.launch, TorchExecutor._cpu_share
    forward = _Expert._called

    def launched(self, x):
        launch(self, x)
        if self._local.memo is not None:
            happened.append("early")

    def called(self, *args, **kwargs):
        memo = self._local.memo
        y = forward(self, *args, **kwargs)
        happened.append("reused" if memo is not None and y is memo.y else "computed")
        return y

    def shared(self, *args):
        happened.append("cpu")
        return share(self, *args)

    monkeypatch.setattr(_Expert, "launch", launched)
    monkeypatch.setattr(_Expert, "_called", called)
    monkeypatch.setattr(TorchExecutor, "_cpu_share", shared)
    return happened


def forwards(model):
    """How often the last layer's shared expert really computes."""
    expert = model.hybrimoe.layers[-1].early.experts[0]
    calls, original = [], expert._forward
    expert._forward = lambda *args: (calls.append(args), original(*args))[1]
    return calls


@pytest.mark.parametrize("name", LATER)
def test_outputs_are_the_same_bits_and_each_is_computed_once(name):
    model, given = build(name)
    hybrimoe.wrap(model, device="emulated", vram=1.0)
    expected = families.logits(model, given)
    keys = list(model.state_dict())
    model.hybrimoe.launch_early(model)
    first = families.logits(model, given)  # learns
    early = [layer.early.experts[0].early for layer in model.hybrimoe.layers]
    calls = forwards(model)
    second = families.logits(model, given)

    assert all(early)
    assert torch.equal(first, expected)
    assert torch.equal(second, expected)
    assert len(calls) == 1
    assert list(model.state_dict()) == keys


@pytest.mark.parametrize("name", SOONER)
def test_blocks_that_call_them_first_or_have_none_are_left_alone(name):
    model, given = build(name)
    hybrimoe.wrap(model, device="emulated", vram=1.0)
    expected = families.logits(model, given)
    model.hybrimoe.launch_early(model)
    found = [families.logits(model, given) for _ in range(2)]

    assert all(torch.equal(each, expected) for each in found)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert not any(layer.found.parent._forward_pre_hooks for layer in model.hybrimoe.layers)


def test_they_are_launched_before_the_cpu_has_its_share(monkeypatch):
    model, given = build("deepseek_v3")
    happened = count(monkeypatch)
    hybrimoe.wrap(model, device="emulated", preset="cpu", vram=1.0)
    model.hybrimoe.launch_early(model)
    layers = len(model.hybrimoe.layers)
    families.logits(model, given)
    assert happened == ["cpu", "computed"] * layers
    happened.clear()
    families.logits(model, given)

    assert happened == ["early", "cpu", "reused"] * layers


def test_unwrap_puts_their_forward_back():
    model, given = build("deepseek_v3")
    shared = model.model.layers[-1].mlp.shared_experts
    own, before = shared.forward, families.logits(model, given)

    def forward(x):  # as other libraries do, on the instance
        return own(x)

    shared.forward = forward
    hybrimoe.wrap(model, device="emulated", vram=1.0)
    model.hybrimoe.launch_early(model)
    assert shared.forward is not forward
    families.logits(model, given)
    hybrimoe.unwrap(model)

    assert shared.forward is forward
    assert [m for m in model.modules() if "forward" in m.__dict__] == [shared]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.equal(families.logits(model, given), before)


class Changing(torch.nn.Module):
    """Stands for routed experts, and changes the block's input on the way."""

    def __init__(self, experts, change):
        super().__init__()
        self.experts, self.change = experts, change

    def forward(self, hidden, ids, weights):
        out = self.experts(hidden, ids, weights).clone()
        self.change(hidden)
        return out


def test_a_block_that_changes_its_input_meanwhile_gets_the_new_result(monkeypatch):
    model, given = build("deepseek_v3")
    happened = count(monkeypatch)
    hybrimoe.wrap(model, device="emulated", vram=1.0)
    model.hybrimoe.launch_early(model)
    families.logits(model, given)
    block = model.model.layers[-1].mlp
    pooled = block.experts
    block.experts = Changing(pooled, lambda hidden: hidden.mul_(2))
    pooled.early.remove()
    expected = families.logits(model, given)
    pooled.early.attach()
    happened.clear()

    assert torch.equal(families.logits(model, given), expected)
    assert happened[-1] == "computed"
    assert "reused" in happened  # by the layers that change nothing
    block.experts = pooled


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.inference_mode])
def test_with_gradients_or_inference_tensors_they_run_when_called(monkeypatch, mode):
    model, given = build("deepseek_v3")
    happened = count(monkeypatch)
    hybrimoe.wrap(model, device="emulated", vram=1.0)
    model.hybrimoe.launch_early(model)
    expected = families.logits(model, given)
    happened.clear()
    with mode():
        found = model(**given).logits

    assert torch.equal(found, expected)
    assert "early" not in happened
    assert "computed" in happened


def test_a_gradient_reaches_what_is_before_them():
    model, given = build("deepseek_v3")
    hybrimoe.wrap(model, device="emulated", vram=1.0)
    embeddings = model.get_input_embeddings()(given["input_ids"])
    found = []
    for early in (False, True):
        if early:
            model.hybrimoe.launch_early(model)
            families.logits(model, given)  # learns
        x = embeddings.clone().requires_grad_()
        model(inputs_embeds=x).logits.square().sum().backward()
        found.append(x.grad)

    torch.testing.assert_close(found[1], found[0])


def test_a_pass_that_broke_off_leaves_no_stale_result(monkeypatch):
    model, given = build("deepseek_v3")
    hybrimoe.wrap(model, device="emulated", vram=1.0)
    model.hybrimoe.launch_early(model)
    expected = families.logits(model, given)
    other = {"input_ids": given["input_ids"].flip(1)}

    def fail(self, timeline):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(TorchExecutor, "join", fail)
        with pytest.raises(KeyboardInterrupt):
            families.logits(model, other)
    # Residents may be others now, so sums are rounded otherwise.
    torch.testing.assert_close(families.logits(model, given), expected, rtol=1e-4, atol=1e-4)


def test_the_emulated_accelerator_launches_nothing_early():
    model, _ = build("deepseek_v3")
    hybrimoe.wrap(model, device="emulated", vram=1.0)

    assert all(layer.early is None for layer in model.hybrimoe.layers)


def test_what_another_thread_computes_is_not_handed_out():
    model, given = build("deepseek_v3")
    hybrimoe.wrap(model, device="emulated", vram=1.0)
    model.hybrimoe.launch_early(model)
    families.logits(model, given)
    layer = model.hybrimoe.layers[-1]
    block, early = layer.found.parent, layer.early
    x, other = torch.randn(2, 1, 1, 64)
    with torch.no_grad(), ThreadPoolExecutor(1) as pool:
        early._enter(block, (x,), {})
        early.launch()
        pool.submit(early._enter, block, (other,), {}).result()
        memo = early.experts[0]._local.memo
        y = block.shared_experts(x)

    assert memo is not None
    assert y is memo.y
    assert early.now.x is x
