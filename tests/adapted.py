"""A tiny model with LoRA on its experts, and what its outputs must be."""

import functools

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
BOTH = (GATE_UP, DOWN)
IDS = torch.randint(0, 128, (2, 9), generator=torch.Generator().manual_seed(2))


def bare(dtype: torch.dtype = torch.float32) -> Qwen3MoeForCausalLM:
    """Two layers of eight experts, always the same."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    counts = {"num_hidden_layers": 2, "num_experts": 8, "num_experts_per_tok": 2}
    config = Qwen3MoeConfig(vocab_size=128, **sizes, **heads, **counts)
    return Qwen3MoeForCausalLM(config).to(dtype).eval()


def adapted(model: nn.Module, targets=BOTH, seed: int | None = 1, **settings) -> nn.Module:
    """A PEFT model around it with LoRA on expert parameters; seed None leaves PEFT's own zeros."""
    settings = {"r": 4, "lora_alpha": 8, "target_modules": []} | settings
    made = get_peft_model(model, LoraConfig(target_parameters=list(targets), **settings))
    return made.eval() if seed is None else filled(made, seed)


def filled(model: nn.Module, seed: int, adapter: str = "default", scale: float = 0.05) -> nn.Module:
    """Give an adapter random numbers."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name and f".{adapter}." in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    return model.eval()


def two_adapters(model: nn.Module) -> nn.Module:
    """`adapted`, with another adapter "second" that is not active."""
    made = adapted(model)
    config = LoraConfig(r=2, lora_alpha=8, target_modules=[], target_parameters=list(BOTH))
    made.add_adapter("second", config)
    return filled(made, 5, "second")


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(IDS).logits


@functools.cache
def expected(*active: str, targets=BOTH, dtype=torch.float32) -> Tensor:
    """Logits of the unwrapped model with these adapters."""
    if not active:
        return logits(bare(dtype))
    if "second" not in active:
        return logits(adapted(bare(dtype), targets))
    model = two_adapters(bare(dtype))
    model.base_model.set_adapter(list(active))
    return logits(model)


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all of a model's tensors."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether two models have the very same tensors, by the same names in the same order."""
    return list(first) == list(second) and all(torch.equal(first[n], second[n]) for n in first)
