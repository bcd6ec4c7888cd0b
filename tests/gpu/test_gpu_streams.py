"""On a GPU, no timing of the streams changes a result, and no layer stalls but at its one sync."""

import pytest
import torch
from tiny_gpu_models import Racing, make_model, on_gpu, outputs, wrapped

from hybrimoe.kernels.gpu import triton_experts
from hybrimoe.runtime.devices.cuda import TorchAccelerator

pytestmark = on_gpu


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.mark.parametrize("preset", ["hybrimoe", "ondemand", "adapmoe"])
def test_delays_on_either_stream_change_no_bit(monkeypatch, model, preset):
    results = []
    for seed in range(10):
        racing = Racing(seed)
        with wrapped(model, monkeypatch, racing, preset=preset, deterministic=True):
            results.append(outputs(model))

    for logits, tokens in results[1:]:
        assert torch.equal(logits, results[0][0])
        assert torch.equal(tokens, results[0][1])


@pytest.mark.parametrize("operation", ["copy", "experts"])
def test_forgetting_what_an_operation_waits_for_corrupts_the_output(monkeypatch, model, operation):
    settings = {"preset": "ondemand", "deterministic": True}
    with wrapped(model, **settings):
        wanted = outputs(model)[0]
    wrong = 0
    for seed in range(8):
        racing = Racing(seed, forgets=(operation,))
        with wrapped(model, monkeypatch, racing, **settings):
            wrong += not torch.equal(outputs(model)[0], wanted)

    assert wrong


def test_forecasts_come_in_the_layers_one_transfer(monkeypatch, model):
    accelerator, fetched = TorchAccelerator(), []
    fetch = accelerator.fetch
    monkeypatch.setattr(accelerator, "fetch", lambda tensors: fetched.append(1) or fetch(tensors))
    with wrapped(model, monkeypatch, accelerator, preset="adapmoe"):
        ids = torch.arange(3, 11, device="cuda")[None]
        with torch.no_grad():
            for _ in range(3):
                model(ids, use_cache=False)
        shared = model.hybrimoe.stats()["hybrid"]
        assert len(fetched) == 3 * len(model.hybrimoe.layers)
        assert shared["uploads"] > 0


@pytest.mark.skipif(not triton_experts.available(), reason="triton is not installed")
def test_a_layer_stalls_nowhere_but_at_its_sync(model):
    """torch raises at every operation of its own that would wait for the device."""
    with wrapped(model, vram=0.5, preset="ktransformers"), torch.no_grad():
        outputs(model, steps=2)  # compiles, and grows all buffers
        layer = model.hybrimoe.layers[0]
        hidden = torch.randn(4, 128, device="cuda")
        ids = torch.arange(16, device="cuda").reshape(4, 4)
        weights = torch.full((4, 4), 0.25, device="cuda")
        layer(hidden, ids, weights)
        torch.cuda.set_sync_debug_mode("error")
        try:
            layer(hidden, ids, weights)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_measured_spans_lie_within_their_passes(model):
    with wrapped(model, vram=0.5, preset="ondemand", trace=True):
        outputs(model)
        torch.cuda.synchronize()
        outputs(model, steps=1)  # spans are read by the layers that follow
        spans = model.hybrimoe.hybrid.spans()["measured"]
        end = model.hybrimoe.hybrid.meter.now()

    assert {span.lane.name for span in spans} >= {"GPU", "LINK"}
    assert all(span.seconds >= 0 for span in spans)
    assert all(-0.05 < span.start <= end + 0.05 for span in spans)
