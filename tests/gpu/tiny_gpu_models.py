"""A tiny random model, what it computes, and accelerators that misbehave on purpose."""

import contextlib

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

import hybrimoe
from hybrimoe import session
from hybrimoe.runtime.devices.cuda import TorchAccelerator

on_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def make_model(dtype=torch.float32, hidden=128, inner=96, layers=3):
    """Qwen3 MoE with 16 experts of which a token takes 4, its weights from a seed."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=inner, moe_intermediate_size=inner,
        num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts=16, num_experts_per_tok=4, norm_topk_prob=True,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def prompt(model, batch=4, length=12):
    """Token ids where the model reads them."""
    ids = torch.randint(3, 500, (batch, length), generator=torch.Generator().manual_seed(1))
    return ids.to(model.get_input_embeddings().weight.device)


@torch.no_grad()
def outputs(model, steps=6, **shape):
    """Logits of a prompt and greedy tokens, on the CPU."""
    ids = prompt(model, **shape)
    mask = torch.ones_like(ids)
    settings = {"max_new_tokens": steps, "do_sample": False, "pad_token_id": 0}
    tokens = model.generate(ids, attention_mask=mask, **settings)
    return model(ids, attention_mask=mask).logits.float().cpu(), tokens.cpu()


def nmse(found, wanted):
    """Squared error relative to the wanted squares; NaN if anything is."""
    return float((found - wanted).double().square().sum() / wanted.double().square().sum())


@contextlib.contextmanager
def wrapped(model, monkeypatch=None, accelerator=None, **settings):
    """The model wrapped on the GPU within the block, on an accelerator of ours if one is given."""
    if accelerator is not None:
        monkeypatch.setattr(session, "open_accelerator", lambda config: accelerator)
    hybrimoe.wrap(model, **{"device": "cuda", "vram": 0.25} | settings)
    try:
        yield model
    finally:
        hybrimoe.unwrap(model)


class Racing(TorchAccelerator):
    """Streams that run late, by delays drawn from a seed; may forget what operations wait for."""

    def __init__(self, seed, forgets=()):
        super().__init__()
        self.draw, self.forgets = torch.Generator().manual_seed(seed), forgets

    def copy(self, *arguments):
        self._delay(self.copies)
        return super().copy(*self._waits("copy", arguments))

    def experts(self, *arguments):
        self._delay(torch.cuda.current_stream(self.device))
        return super().experts(*self._waits("experts", arguments))

    def _waits(self, name, arguments):
        return (*arguments[:-1], ()) if name in self.forgets else arguments

    def _delay(self, stream):
        cycles = (0, 0, 20_000, 200_000, 2_000_000)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(cycles[int(torch.randint(len(cycles), (), generator=self.draw))])
