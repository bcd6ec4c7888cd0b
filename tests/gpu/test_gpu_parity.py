"""On a GPU, wrapped models compute what the plain ones do, whatever the policies decide."""

import pytest
import torch
from tiny_gpu_models import make_model, nmse, on_gpu, outputs, wrapped

import hybrimoe
from hybrimoe.kernels.gpu import torch_experts, triton_experts
from hybrimoe.policy.presets import PRESETS
from hybrimoe.runtime.devices.cuda import TorchAccelerator

pytestmark = on_gpu
KERNELS = {"triton": triton_experts, "torch": torch_experts}


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def expected(model):
    return outputs(model)


def accelerator_with(name):
    if name == "triton" and not triton_experts.available():
        pytest.skip("triton is not installed")
    accelerator = TorchAccelerator()
    accelerator.kernels = KERNELS[name]
    return accelerator


@pytest.mark.parametrize("residency", [1 / 16, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_gives_the_plain_models_output(model, expected, preset, residency):
    with wrapped(model, preset=preset, vram=residency):
        logits, tokens = outputs(model)

    torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens, expected[1])


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("weights", ["native", "int8", "int4"])
def test_packed_formats_give_what_the_cpu_alone_gives(monkeypatch, weights, kernels):
    on_cpu = hybrimoe.wrap(make_model(), device="cpu", weights=weights)
    wanted = outputs(on_cpu)[0]
    with wrapped(make_model(), monkeypatch, accelerator_with(kernels), weights=weights) as model:
        found = outputs(model)[0]

    assert nmse(found, wanted) < 1e-3


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("weights", ["native", "int4"])
def test_models_in_halves_stay_close_to_float32(monkeypatch, dtype, weights, kernels):
    """The bound is wide, as a router's tie may fall the other way; logits of order one differ little."""
    plain = make_model(dtype)
    wanted = outputs(make_model(dtype).float(), steps=1)[0]
    with wrapped(plain, monkeypatch, accelerator_with(kernels), weights=weights, vram=0.5):
        found = outputs(plain, steps=1)[0]

    assert nmse(found, wanted) < 0.1


@pytest.mark.parametrize("weights", ["native", "int8", "int4"])
def test_verify_passes(weights):
    with wrapped(make_model(), weights=weights, vram=0.5) as model:
        assert hybrimoe.verify(model)


def test_long_prompts_take_the_tiles(model, expected):
    wanted = outputs(model, batch=2, length=300)
    with wrapped(model, vram=0.5, preset="ondemand"):
        logits, tokens = outputs(model, batch=2, length=300)

    torch.testing.assert_close(logits, wanted[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens, wanted[1])


def test_unwrapping_gives_the_same_bits_back(model, expected):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with wrapped(model):
        outputs(model, steps=1)
    after = model.state_dict()

    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
