"""Fused norms: which modules are recognised, that they compute the same, and the way back."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

import hybrimoe
from hybrimoe.errors import WrappedModelError
from hybrimoe.modules import fused_norm as rms_norms
from hybrimoe.modules.fused_norm import CLOSE, Formula, FoundNorm, FusedNorm, formula_of
from paths import TINY_MOE

KINDS = [Qwen3MoeRMSNorm, GptOssRMSNorm, Gemma3RMSNorm, nn.RMSNorm]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make(kind, size, dtype, eps=1e-6):
    norm = kind(size, eps=eps).to(dtype)
    norm.weight.data = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(dtype)
    return norm


def fuse(norm):
    parent = nn.Module()
    parent.norm = norm
    fused = FusedNorm(FoundNorm("norm", parent, "norm", norm, formula_of(norm)))
    fused.attach()
    return fused


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel has run."""
    seen = []
    run = rms_norms.run_norm
    monkeypatch.setattr(rms_norms, "run_norm", lambda *args: (seen.append(args), run(*args)))
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 48), (1, 4, 3, 128), (7, 33)])
def test_a_fused_norm_returns_what_the_original_returns(calls, kind, dtype, shape):
    fused = fuse(make(kind, shape[-1], dtype, eps=1e-5))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2)).mul(3).to(dtype)
    calls.clear()
    with torch.no_grad():
        got, expected = fused(x), fused.found.module(x)
    assert len(calls) == 1
    assert got.dtype == dtype
    torch.testing.assert_close(got, expected, rtol=CLOSE[dtype], atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "offset", "early"),
    [(Qwen3MoeRMSNorm, 0, True), (GptOssRMSNorm, 0, False), (Gemma3RMSNorm, 1, False)],
)
def test_where_a_norm_rounds_is_recognised_in_half_precision(kind, offset, early):
    for dtype in DTYPES[1:]:
        assert formula_of(make(kind, 256, dtype)) == Formula(1e-6, offset, early)


class Twice(Qwen3MoeRMSNorm):
    """Returns something else."""

    def forward(self, x):
        return 2 * super().forward(x)


class Other(Qwen3MoeRMSNorm):
    """Adds another eps than the one it shows."""

    def forward(self, x):
        squares = x.float().pow(2).mean(-1, keepdim=True)
        return self.weight * (x.float() * torch.rsqrt(squares + 10 * self.variance_epsilon)).to(x)


class Gated(Qwen3MoeRMSNorm):
    """Needs a second input."""

    def forward(self, x, gate):
        return super().forward(x) * gate


class Picky(Qwen3MoeRMSNorm):
    """Takes images only."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1))


@pytest.mark.parametrize("kind", [Twice, Other, Gated, Picky, nn.LayerNorm, nn.PReLU])
def test_what_computes_anything_else_is_left_alone(kind):
    module = kind(64) if kind is nn.PReLU else make(kind, 64, torch.float32)
    assert formula_of(module) is None


def test_a_norm_with_hooks_is_left_alone():
    norm = make(Qwen3MoeRMSNorm, 64, torch.float32)
    norm.register_forward_hook(lambda *_: None)
    assert formula_of(norm) is None


def test_the_original_serves_what_the_kernel_cannot(calls):
    fused = fuse(make(Qwen3MoeRMSNorm, 64, torch.float32))
    x = torch.randn(2, 64)
    calls.clear()
    fused(x.requires_grad_()).sum().backward()  # gradients
    assert x.grad is not None
    assert fused.weight.grad is not None
    with torch.no_grad():
        for odd in (x.half(), torch.randn(64, 2).T, torch.randn(4096, 64), torch.empty(0, 64)):
            assert torch.equal(fused(odd), fused.found.module(odd))
    assert not calls


def test_a_changed_weight_is_seen(calls):
    fused = fuse(make(Qwen3MoeRMSNorm, 64, torch.float32))
    x = torch.randn(1, 64)
    with torch.no_grad():
        fused.weight.mul_(2)
        torch.testing.assert_close(fused(x), fused.found.module(x), rtol=1e-6, atol=1e-6)
        fused.weight.data = torch.ones(64)
        calls.clear()
        assert torch.equal(fused(x), fused.found.module(x))
        assert not calls
        fused.weight = nn.Parameter(torch.full((64,), 3.0))
        assert torch.equal(fused(x), fused.found.module(x))
        torch.testing.assert_close(fused(x).norm(), torch.tensor(24.0))


def test_nan_and_infinity_survive():
    fused = fuse(make(Qwen3MoeRMSNorm, 64, torch.float32))
    x = torch.ones(3, 64)
    x[1, 3], x[2, 3] = torch.nan, torch.inf
    with torch.no_grad():
        got, expected = fused(x), fused.found.module(x)
    assert torch.equal(got.isnan(), expected.isnan())
    assert got[0].isfinite().all()


def test_it_can_neither_be_moved_nor_copied_nor_pickled():
    fused = fuse(make(Qwen3MoeRMSNorm, 64, torch.float32))
    for attempt in (fused.half, lambda: copy.deepcopy(fused), lambda: pickle.dumps(fused)):
        with pytest.raises(WrappedModelError):
            attempt()


def test_wrap_replaces_all_norms_and_unwrap_brings_them_back():
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()
    before = {name: m for name, m in model.named_modules() if "norm" in name}
    names = [name for name, _ in model.named_parameters() if "norm" in name]
    hybrimoe.wrap(model, device="cpu", linear="int8")
    assert before
    assert all(isinstance(model.get_submodule(name), FusedNorm) for name in before)
    assert [name for name, _ in model.named_parameters() if "norm" in name] == names
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        hybrimoe.unwrap(model)
    assert {name: m for name, m in model.named_modules() if "norm" in name} == before


def test_without_packed_dense_layers_norms_stay_as_they_are():
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()
    hybrimoe.wrap(model, device="cpu")
    assert not any(isinstance(module, FusedNorm) for module in model.modules())
