"""What routers say reaches the policies: scores, forecasts, and all of it in one transfer."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

import fake_cuda
import families
import hybrimoe
from hybrimoe import session
from hybrimoe.models import input_norm as norms
from hybrimoe.models.releases import cache_argument, cache_in
from hybrimoe.modules.pooled_experts import PooledExperts
from hybrimoe.policy.engine import Engine
from hybrimoe.policy.prefetchers import Never, NextLayer
from hybrimoe.runtime import inputs as inputs
from hybrimoe.runtime.devices.cuda import TorchAccelerator
from hybrimoe.runtime.devices.emulated import EmulatedAccelerator
from hybrimoe.runtime.devices.staging import Staging
from paths import TINY_MOE

LEAST = {1: 0.7, 2: 0.6, 3: 0.5}
"""Recall of the experts of one token, d layers ahead."""


@pytest.fixture(scope="module")
def plain():
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()


@pytest.fixture
def tiny(plain):
    """Wrapped by the test, unwrapped here."""
    yield plain
    hybrimoe.unwrap(plain)


@pytest.fixture(scope="module")
def held_out():
    """[1, 96] tokens of text that tiny-moe was not trained on, of each domain."""
    texts = json.loads((Path(TINY_MOE) / "held_out.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    return [tokenizer(text[:600], return_tensors="pt").input_ids[:, :96] for text in texts.values()]


@torch.no_grad()
def feed(model, ids, prompt=64):
    """A prefill of the first tokens, then the others one by one."""
    out = model(ids[:, :prompt], use_cache=True)
    for token in ids[0, prompt:]:
        out = model(token.view(1, 1), **cache_argument(model, cache_in(out)))
    return out.logits


def observe(monkeypatch):
    """All (load, forecasts) that reach the engine from now on."""
    seen, original = [], Engine.step

    def step(self, load, forecasts=()):
        seen.append((load, list(forecasts)))
        return original(self, load, forecasts)

    monkeypatch.setattr(Engine, "step", step)
    return seen


def recall(seen):
    """Share of the experts of a token that were forecast, by layers ahead; of decode alone."""
    hits = {}
    for i, (load, forecasts) in enumerate(seen):
        for forecast in forecasts:
            ahead = forecast.layer - load.layer
            real = seen[i + ahead][0]
            assert real.layer == forecast.layer
            if real.tokens.sum() == 4:
                hits.setdefault(ahead, []).append(np.isin(real.experts, forecast.experts).mean())
    return {ahead: float(np.mean(found)) for ahead, found in sorted(hits.items())}


def test_forecasts_of_the_real_routers_reach_the_engine_and_come_true(monkeypatch, tiny, held_out):
    seen = observe(monkeypatch)
    hybrimoe.wrap(tiny, device="emulated", vram=0.25, prefetcher=NextLayer(depth=3))
    for ids in held_out:
        feed(tiny, ids, prompt=76)

    found = recall(seen)
    print("recall", found)
    assert all(found[ahead] > least for ahead, least in LEAST.items())
    depths = [len(forecasts) for load, forecasts in seen if load.layer == 4]
    assert set(depths) <= {0, 3}
    assert np.mean(depths) > 1.5


def test_a_forecast_of_a_prompt_says_how_many_tokens_come(monkeypatch, tiny, held_out):
    seen = observe(monkeypatch)
    hybrimoe.wrap(tiny, device="emulated", vram=0.25, prefetcher=NextLayer(depth=1))
    with torch.no_grad():
        tiny(held_out[0])

    errors = []
    for (_, forecasts), (real, _) in zip(seen, seen[1:]):
        for forecast in forecasts:
            tokens, expected = np.zeros(32), np.zeros(32)
            tokens[real.experts] = real.tokens
            expected[forecast.experts] = forecast.tokens * forecast.probability
            errors.append(np.abs(tokens - expected).sum() / tokens.sum())
            assert (forecast.tokens >= 1).all()
            assert (forecast.probability <= 1).all()
    assert len(errors) > 5
    print("tokens misplaced in a prompt's forecast", np.mean(errors))
    assert np.mean(errors) < 0.6


def test_the_target_layers_norm_recalls_more(monkeypatch, tiny, held_out):
    found = []
    for apply in (True, False):
        with monkeypatch.context() as patch:
            if not apply:
                patch.setattr(norms.InputNorm, "to", lambda *_: None)
            with hybrimoe.record(tiny, depth=3) as trace, torch.no_grad():
                for ids in held_out:
                    tiny(ids)
        rows = []
        for step in range(trace.steps):
            for layer in range(9):
                for forecast in trace.forecasts(step, layer):
                    load = trace.loads(step)[forecast.layer]
                    expected = np.zeros(32)
                    expected[forecast.experts] = forecast.tokens * forecast.probability
                    real = np.zeros(32)
                    real[load.experts] = load.tokens
                    rows.append(np.minimum(expected, real).sum() / real.sum())
        found.append(float(np.mean(rows)))
    print("tokens foreseen with and without the target's norm", found)
    assert found[0] > found[1]


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "gpt_oss", "lfm2_moe"])
def test_the_norm_before_the_router_is_found_and_scales_exactly(name):
    full = next((known for known in families.decorated() if known.split(".")[0] == name), None)
    if full is None:
        pytest.skip(f"this release of transformers has no {name}")
    model = families.build(full)
    hybrimoe.wrap(model, device="emulated", vram=1.0)
    families.logits(model, families.inputs(full, model))
    probes = model.hybrimoe.hybrid.inputs.probes
    first, last = probes[0].norm, probes[-1].norm
    assert first.module is not None
    assert not first.searching
    x = torch.randn(5, 64)

    scaled = first.module(x) * first.to(last, x)
    torch.testing.assert_close(scaled, last.module(x), rtol=1e-4, atol=1e-5)


def test_norms_that_do_more_than_scale_are_left_alone():
    layer, bias = torch.nn.LayerNorm(8), torch.nn.LayerNorm(8)
    torch.nn.init.normal_(bias.bias)
    x = torch.randn(3, 8)

    assert norms.channel_scale(layer, x) is None
    assert norms.channel_scale(bias, x) is None
    assert norms.channel_scale(torch.nn.RMSNorm(8), x) is not None


def test_scores_are_the_routers_over_all_experts(monkeypatch, tiny, held_out):
    seen, logits = observe(monkeypatch), []
    hook = tiny.model.layers[2].mlp.gate.register_forward_hook(
        lambda *args: logits.append(args[2][0])
    )
    hybrimoe.wrap(tiny, device="emulated", vram=0.25)
    with torch.no_grad():
        tiny(held_out[0][:, :5])
    hook.remove()

    chance = logits[0].softmax(1)
    kept = chance.topk(4, dim=1).values.sum(1, keepdim=True)
    load = next(load for load, _ in seen if load.layer == 2)
    np.testing.assert_allclose(load.scores, (chance / kept).sum(0).numpy(), rtol=1e-3)


def test_asking_early_is_no_call_of_a_router(tiny, held_out):
    calls = []
    hooks = [
        layer.mlp.gate.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, layer in enumerate(tiny.model.layers)
    ]
    hybrimoe.wrap(tiny, device="emulated", vram=0.25, prefetcher=NextLayer(depth=3))
    modes = [module.training for module in tiny.modules()]
    with torch.no_grad(), hybrimoe.record(tiny) as trace:
        tiny(held_out[0])
    for hook in hooks:
        hook.remove()

    assert calls == list(range(12))
    assert trace.steps == 1
    assert [module.training for module in tiny.modules()] == modes
    assert [layer.launches for layer in tiny.hybrimoe._counters.layers] == [1] * 12


def test_unwrap_leaves_no_hook(tiny, held_out):
    hybrimoe.wrap(tiny, device="emulated", vram=0.25)
    hybrimoe.unwrap(tiny)

    assert not any(m._forward_hooks or m._forward_pre_hooks for m in tiny.modules())


def test_nothing_of_a_call_is_kept_alive(tiny, held_out):
    hybrimoe.wrap(tiny, device="emulated", vram=0.25)
    with torch.no_grad():
        tiny(held_out[0])

    hybrid = tiny.hybrimoe.hybrid
    for probe in hybrid.inputs.probes:
        assert (probe._seen.args, probe._seen.output, probe.norm._outputs) == ((), None, [])
    assert (hybrid.executor.call, hybrid.executor.out) == (None, None)


@pytest.mark.parametrize("settings", [{"prefetcher": Never(), "vram": 0.25}, {"vram": 1.0}])
def test_nobody_is_asked_for_what_could_not_be_used(monkeypatch, tiny, held_out, settings):
    asked = []
    monkeypatch.setattr(inputs, "look_ahead", lambda *args: asked.append(args) or [])
    hybrimoe.wrap(tiny, device="emulated", **settings)
    with torch.no_grad():
        tiny(held_out[0])

    assert not asked


def test_nobody_is_asked_while_the_link_is_busy(monkeypatch, tiny, held_out):
    hybrimoe.wrap(tiny, device="emulated", vram=0.25)
    feed(tiny, held_out[0], prompt=90)
    hybrid = tiny.hybrimoe.hybrid
    timeline = hybrid.engine.timeline
    timeline.free[:] = timeline.now
    assert hybrid._depth(3) == hybrid.engine.policies.prefetcher.depth > 0
    timeline.free[2] = timeline.now + 2 * hybrid._took

    assert hybrid._depth(3) == 0


def test_where_no_router_shows_itself_the_tables_of_ids_forecast(monkeypatch, held_out):
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()
    expected = feed(model, held_out[0], prompt=84)
    for layer in model.model.layers:
        layer.mlp._modules["chooser"] = layer.mlp._modules.pop("gate")
        layer.mlp.__dict__["gate"] = layer.mlp._modules["chooser"]
    seen = observe(monkeypatch)
    hybrimoe.wrap(model, device="emulated", vram=0.25)
    trusted, expect = [], model.hybrimoe.hybrid.engine.trust.expect
    monkeypatch.setattr(
        model.hybrimoe.hybrid.engine.trust,
        "expect",
        lambda layer, forecasts: (trusted.append(forecasts), expect(layer, forecasts)),
    )
    logits = feed(model, held_out[0], prompt=84)

    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert not any(forecasts for _, forecasts in seen)
    assert any(trusted)
    load = seen[-1][0]
    assert (load.scores > 0).sum() == load.experts.size


def test_a_router_called_by_another_thread_is_not_this_ones(tiny):
    hybrimoe.wrap(tiny, device="emulated", vram=0.25)
    router, probe = tiny.model.layers[0].mlp.gate, tiny.hybrimoe.hybrid.inputs.probes[0]
    with torch.no_grad():
        logits, _, ids = router(torch.randn(3, 192))
        with ThreadPoolExecutor(1) as pool:
            pool.submit(router, torch.randn(3, 192)).result()

    assert torch.equal(probe.take(ids, 32)[1], logits)


def test_results_that_nobody_followed_are_not_there_yet(monkeypatch, tiny, held_out):
    with torch.no_grad():
        expected = tiny(held_out[0]).logits
    monkeypatch.setattr(EmulatedAccelerator, "make_current_stream_wait", lambda *_: None)
    hybrimoe.wrap(tiny, device="emulated", vram=1.0)
    with torch.no_grad():
        logits = tiny(held_out[0]).logits

    assert not torch.allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_memory_taken_in_inference_mode_serves_outside(monkeypatch, held_out):
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE).eval()
    wrap_on_fake_cuda(monkeypatch, model)
    ids = held_out[0][:, :8]
    with torch.inference_mode():
        first = model(ids).logits.clone()
    with torch.no_grad():
        second = model(ids).logits

    assert (first - second).abs().max() < 0.1 * second.abs().max()


def test_threads_do_not_read_each_others_routers(tiny, held_out):
    prompts = [ids[:, :n] for ids in held_out for n in (7, 20)]
    with torch.no_grad():
        expected = [tiny(ids).logits for ids in prompts]
    hybrimoe.wrap(tiny, device="emulated", vram=0.25)

    def run(ids):
        with torch.no_grad():
            return tiny(ids).logits

    with ThreadPoolExecutor(3) as pool:
        for got, wanted in zip(pool.map(run, prompts), expected):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


# On a device


class Strict(TorchDispatchMode):
    """Fails where torch would have to wait for a device."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket not in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.equal,
            torch.ops.aten.nonzero,
        ), f"{function} waits for the device"
        return function(*args, **kwargs or {})


def wrap_on_fake_cuda(monkeypatch, model, **settings):
    """The model on a device that is this CPU, seen as one with memory of its own."""
    fake_cuda.install(monkeypatch)
    monkeypatch.setattr(session, "open_accelerator", lambda config: TorchAccelerator("cpu"))
    return hybrimoe.wrap(
        model, **{"device": "emulated", "vram": 0.25, "deterministic": True} | settings
    )


@pytest.mark.parametrize("preset", ["hybrimoe", "hybrimoe-paper", "ondemand", "cpu"])
def test_a_layer_waits_for_the_device_once(monkeypatch, tiny, held_out, preset):
    ids = held_out[0][:, :24]
    expected = feed(tiny, ids, prompt=16)
    wrap_on_fake_cuda(monkeypatch, tiny, preset=preset)
    feed(tiny, ids, prompt=23)  # learns where routers keep ids, and which norms they read
    layers, original = [], PooledExperts.compute

    def compute(self, *args):
        before = fake_cuda.Event.syncs
        with Strict():
            out = original(self, *args)
        layers.append(fake_cuda.Event.syncs - before)
        return out

    monkeypatch.setattr(PooledExperts, "compute", compute)
    logits = feed(tiny, ids, prompt=16)

    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    assert len(layers) == 12 * 9
    assert set(layers) == {1}


def test_at_rest_staging_takes_no_new_memory(monkeypatch, tiny, held_out):
    wrap_on_fake_cuda(monkeypatch, tiny)
    feed(tiny, held_out[0], prompt=92)
    staging = tiny.hybrimoe.hybrid.accelerator.staging
    slabs = [staging._packed, staging._down, staging._up]
    before = [slab.memory.data_ptr() for slab in slabs]
    feed(tiny, held_out[1], prompt=92)

    assert [slab.memory.data_ptr() for slab in slabs] == before
    assert not staging._outgrown


def staging():
    return Staging(torch.device("cpu"), fake_cuda.Event, pinned=False)


def test_one_copy_brings_everything_whatever_its_type():
    copies = []

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            copies.append(function.overloadpacket is torch.ops.aten.copy_)
            return function(*args, **kwargs or {})

    tensors = [
        torch.randn(3, 5).bfloat16(),
        torch.arange(7),
        torch.randn(2, 3)[:, 1:],
        torch.empty(0, 4),
        torch.arange(3, dtype=torch.int32),
        torch.randn(1, requires_grad=True),
    ]
    with Count():
        found = staging().fetch(tensors)

    assert sum(copies) == 1
    for got, wanted in zip(found, tensors, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
        assert got.data_ptr() % got.dtype.itemsize == 0


def test_tables_arrive_by_one_copy_as_they_were():
    arrays = [np.arange(5, dtype=np.int32), np.ones((2, 3), np.float32), np.zeros(0, np.int32)]
    found = staging().put(arrays)

    for got, wanted in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(got.numpy(), wanted)
        assert got.numpy().dtype == wanted.dtype


def test_memory_from_which_copies_run_is_not_given_out_twice():
    """A real device reads it later; only a fetch waits for that."""
    stage = staging()
    first = stage.buffer((4, 8))
    second = stage.buffer((1000, 100))  # outgrows the slab: the first one must stay alive
    third = stage.buffer((4, 8))
    assert not any(np.shares_memory(first, other) for other in (second, third))
    assert not np.shares_memory(second, third)
    assert len(stage._outgrown) == 1
    stage.fetch([torch.zeros(1)])

    assert not stage._outgrown
    assert np.shares_memory(stage.buffer((1000, 100)), second)


def test_a_fetch_waits_for_uploads_of_another_stream():
    stage, waited = staging(), []
    stage._up_done.query = lambda: False
    stage._up_done.synchronize = lambda: waited.append(stage._used)
    stage.buffer((4, 8))
    stage.fetch([torch.zeros(1)])

    assert waited == [128]
    assert stage._used == 0
