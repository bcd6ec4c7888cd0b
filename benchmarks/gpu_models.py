"""Random-weight models of real shapes, made in seconds, and the same passes for every rival.

Routers of random weights ask for all experts about equally often: the worst case for a cache. A
trained model's hits are higher (see SIMULATOR.md).
"""

import contextlib
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, DeepseekV2Config, Qwen3MoeConfig

import hybrimoe
from hybrimoe import session
from hybrimoe.attempts import Attempts
from hybrimoe.models.releases import cache_argument, cache_in

TEMPLATE = 16_777_213  # a prime: no two rows begin at the same place
RANDOM_FILLS = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_")
QWEN3 = {
    "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 151936,
}  # fmt: skip
DEEPSEEK = {
    "hidden_size": 2048, "intermediate_size": 10944, "moe_intermediate_size": 1408,
    "n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2,
    "first_k_dense_replace": 1, "num_attention_heads": 16, "num_key_value_heads": 16,
    "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "head_dim": 64, "vocab_size": 102400,
}  # fmt: skip
TINY = {"hidden_size": 128, "intermediate_size": 96, "moe_intermediate_size": 96, "vocab_size": 512}
TINY_QWEN3 = TINY | {"num_experts": 16, "num_experts_per_tok": 4, "head_dim": 32,
                     "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
TINY_DEEPSEEK = TINY | {"n_routed_experts": 16, "num_attention_heads": 4, "num_key_value_heads": 4,
                        "kv_lora_rank": 32, "qk_nope_head_dim": 32, "qk_rope_head_dim": 16,
                        "v_head_dim": 32, "head_dim": 16}  # fmt: skip


class Shape(NamedTuple):
    """A model to build: its configuration class, the real numbers, the tiny ones; layers of each.

    whole: layers of the real model, of which `layers` are measured.
    """

    config: type
    real: dict[str, Any]
    tiny: dict[str, Any]
    layers: int
    whole: int


SHAPES = {
    "qwen3-30b-a3b": Shape(Qwen3MoeConfig, QWEN3, QWEN3 | TINY_QWEN3, 12, 48),
    "deepseek-v2-lite": Shape(DeepseekV2Config, DEEPSEEK, DEEPSEEK | TINY_DEEPSEEK, 11, 27),
}


class _NoInit(TorchFunctionMode):
    """Initialisers do nothing: drawing 15 billion normal numbers would take a minute."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__name__", "") in RANDOM_FILLS:
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def build(name: str, tiny: bool, dtype: torch.dtype = torch.bfloat16, layers: int = 0) -> nn.Module:
    """A model of a named shape on the CPU with random weights, outputs of order one."""
    shape = SHAPES[name]
    numbers = shape.tiny if tiny else shape.real
    count = layers or (3 if tiny else shape.layers)
    config = shape.config(**numbers, num_hidden_layers=count, max_position_embeddings=4096)
    with _NoInit():
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    fill(model, 1 << 16 if tiny else TEMPLATE)
    return model.eval()


@torch.no_grad()
def fill(model: nn.Module, size: int = TEMPLATE) -> None:
    """Random weights by copying one template about, at the speed of memory."""
    generator = torch.Generator().manual_seed(0)
    template = torch.randn(size, generator=generator)
    scaled: dict[tuple[float, torch.dtype], torch.Tensor] = {}
    at = 0
    for parameter in model.parameters():
        if parameter.dim() < 2:
            parameter.fill_(1)
            continue
        embedding = parameter is model.get_input_embeddings().weight
        scale = 1.0 if embedding else parameter.shape[-1] ** -0.5
        key = (scale, parameter.dtype)
        if key not in scaled:
            scaled[key] = (template * scale).to(parameter.dtype)
        at = _tile(parameter.view(-1), scaled[key], at)


def _tile(target: torch.Tensor, source: torch.Tensor, at: int) -> int:
    """Fill a flat tensor from `source`, going round from place `at`; where the next one goes on."""
    start = 0
    while start < target.numel():
        count = min(source.numel() - at, target.numel() - start)
        target[start : start + count].copy_(source[at : at + count])
        start, at = start + count, (at + count) % source.numel()
    return at


def reshare(model: nn.Module, **settings: Any) -> None:
    """Other policies or slots for a wrapped model, without packing its experts again."""
    runtime = model.hybrimoe
    runtime.hybrid.detach(Attempts())
    for layer in runtime.layers:
        if layer.early is not None:
            layer.early.remove()
    runtime.config = runtime.config.replace(**settings)
    runtime.share(model, session.open_accelerator(runtime.config))


@contextlib.contextmanager
def wrapped(model: nn.Module, **settings: Any):
    """The model wrapped within the block, and unwrapped behind it whatever happens."""
    hybrimoe.wrap(model, **settings)
    try:
        yield model
    finally:
        hybrimoe.unwrap(model)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


class Passes:
    """Forward passes on random tokens, the same for all models of one vocabulary.

    Not the model's own tokens: random weights soon repeat one token, and routing with it.
    """

    def __init__(self, model: nn.Module, seed: int = 0) -> None:
        self.model, self.rng = model, np.random.default_rng(seed)
        self.vocabulary = model.config.get_text_config().vocab_size

    def tokens(self, batch: int, length: int) -> torch.Tensor:
        """Random token ids [B, T] where the model reads them."""
        ids = self.rng.integers(3, self.vocabulary, (batch, length))
        return torch.from_numpy(ids).to(self.model.get_input_embeddings().weight.device)

    @torch.no_grad()
    def prefill(self, length: int, repeats: int = 3) -> float:
        """Median seconds of a prompt of one sequence; the first pass is not counted."""
        seconds = []
        for _ in range(repeats + 1):
            ids = self.tokens(1, length)
            synchronize()
            start = time.perf_counter()
            self.model(ids, use_cache=False, logits_to_keep=1)
            synchronize()
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds[1:]))

    @torch.no_grad()
    def decode(self, batch: int, steps: int, warm: int, prompt: int = 32) -> float:
        """Median seconds of a step with one token per sequence, behind `warm` steps and a prompt."""
        filled = self.model(self.tokens(batch, prompt), use_cache=True, logits_to_keep=1)
        cache, seconds = cache_argument(self.model, cache_in(filled)), []
        for step in range(warm + steps):
            if step == warm and hasattr(self.model, "hybrimoe"):
                self.model.hybrimoe.reset_stats()
            ids = self.tokens(batch, 1)
            synchronize()
            start = time.perf_counter()
            self.model(ids, **cache, use_cache=True, logits_to_keep=1)
            synchronize()
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds[warm:]))
