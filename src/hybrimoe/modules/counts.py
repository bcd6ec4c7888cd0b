"""What a wrapped model says of its size: packed weights are part of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from hybrimoe.attempts import Attempts
from hybrimoe.modules.pooled_experts import PooledExperts
from hybrimoe.modules.protection import modules_around
from hybrimoe.modules.replacement import PackedModule

COUNTED = ("num_parameters", "get_memory_footprint")


class Counts:
    """transformers' counting methods, on every model around pooled experts, with these added."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        """names: of the experts; all models on the paths to them count their packed parts."""
        self._modules = [
            module
            for module in modules_around(model, names)
            if all(callable(getattr(type(module), name, None)) for name in COUNTED)
        ]

    def attach(self) -> None:
        """Count packed parts from now on."""
        for module in self._modules:
            module.__dict__["num_parameters"] = _number_of(module)
            module.__dict__["get_memory_footprint"] = _footprint_of(module)

    def detach(self, attempts: Attempts) -> None:
        """Leave no trace on the modules."""
        for module in self._modules:
            for name in COUNTED:
                module.__dict__.pop(name, None)


def packed_bytes(module: nn.Module) -> int:
    """The memory of all packed weights below a module, and of what goes with them."""
    parts = list(packed_parts(module))
    layers = [part for part in parts if isinstance(part, PooledExperts)]
    tiers = {id(layer.pool): layer.pool.tier for layer in layers}
    slots = sum(tier.slab.nbytes for tier in tiers.values() if tier is not None)
    folded = sum(layer.adapters.folded.nbytes for layer in layers)
    return sum(part.packed_bytes for part in parts) + slots + folded


def packed_parts(module: nn.Module) -> Iterator[PackedModule]:
    """What of a module, or below it, has its weights packed."""
    return (part for part in module.modules() if isinstance(part, PackedModule))


def _number_of(module: Any) -> Callable[..., int]:
    def num_parameters(only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """As of the unwrapped model; packed weights cannot be trained."""
        plain: int = type(module).num_parameters(module, only_trainable, exclude_embeddings)
        if only_trainable:
            return plain
        return plain + sum(part.packed_numbers for part in packed_parts(module))

    return num_parameters


def _footprint_of(module: Any) -> Callable[..., int]:
    def get_memory_footprint(*args: Any, **kwargs: Any) -> int:
        """Bytes of parameters, buffers, and packed weights in host memory."""
        plain: int = type(module).get_memory_footprint(module, *args, **kwargs)
        return plain + packed_bytes(module)

    return get_memory_footprint
