"""What PEFT puts around a module, known by its shape: PEFT itself is never imported.

LoRA on a parameter (`LoraConfig(target_parameters=[...])`) is a wrapper around the module that owns
the parameter, its `base_layer`; several parameters of a module nest their wrappers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from hybrimoe.errors import UnsupportedModelError
from hybrimoe.models import weights as formats
from hybrimoe.models.deltas import Delta

SIDES = ("lora_A", "lora_B")
SAMPLES = 16
"""Numbers of a factor that are compared besides its version, which `.data` does not count."""


class Seen:
    """What a wrapper added to its parameter at one time, to be compared with what it adds now.

    Every forward pass of every layer compares, so nothing is called that a dictionary can answer.
    """

    def __init__(self, wrapper: Any) -> None:
        said = wrapper.__dict__
        active, merged = said["_active_adapter"], said["merged_adapters"]
        self._wrapper = wrapper
        self._disabled, self._merged = said["_disable_adapters"], list(merged)
        self._active = active if isinstance(active, str) else list(active)
        self._scaling = dict(said["scaling"])
        self._factors = [
            (side, adapter, _Numbers(factor))
            for adapter in active_on(wrapper)
            for side, factor in zip(SIDES, factors_of(wrapper, adapter))
        ]

    def holds(self, wrapper: Any) -> bool:
        """Whether this wrapper adds the same now."""
        said, modules = wrapper.__dict__, wrapper._modules
        if (
            wrapper is not self._wrapper
            or said["_disable_adapters"] != self._disabled
            or said["_active_adapter"] != self._active
            or said["merged_adapters"] != self._merged
            or said["scaling"] != self._scaling
        ):
            return False
        for side, adapter, numbers in self._factors:
            if not numbers.are(modules[side]._modules[adapter]._parameters["weight"]):
                return False
        return True


class _Numbers:
    """Where a factor lies, how often it was changed, and some of its numbers."""

    def __init__(self, factor: Tensor) -> None:
        self._place, self._version = factor.data_ptr(), _version(factor)
        self._sample, self._bytes = None, b""
        if factor.device.type == "cpu" and factor.is_contiguous():
            numbers = formats.bits(factor.detach()).reshape(-1)
            self._sample = numbers[:: max(numbers.size // SAMPLES, 1)]
            self._bytes = self._sample.tobytes()

    def are(self, factor: Tensor) -> bool:
        """Whether a factor still is what it was."""
        if factor.data_ptr() != self._place or _version(factor) != self._version:
            return False
        return self._sample is None or self._sample.tobytes() == self._bytes


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def is_wrapper(module: nn.Module | None) -> bool:
    """Whether a module is LoRA around a parameter of another module."""
    if module is None or "base_layer" not in module._modules:
        return False
    return "parameter_name" in module.__dict__ or type(module).__name__ == "ParamWrapper"


def wrappers_of(module: nn.Module | None) -> list[Any]:
    """The wrappers that a module consists of, the outermost first."""
    found = []
    while module is not None and is_wrapper(module):
        found.append(module)
        module = module._modules["base_layer"]
    return found


def inside(module: nn.Module) -> nn.Module:
    """What is left of a module without wrappers around it."""
    wrappers = wrappers_of(module)
    return wrappers[-1].base_layer if wrappers else module


def home_of(model: Any) -> Any:
    """The model that a PEFT model was made from; any other model is its own."""
    is_tuned = "base_model" in model._modules and hasattr(type(model), "get_base_model")
    return model.get_base_model() if is_tuned else model


def active_on(wrapper: Any) -> list[str]:
    """The adapters whose delta a wrapper adds now; none if they are disabled or merged for good."""
    if wrapper.disable_adapters or wrapper.merged:
        return []
    return [name for name in wrapper.active_adapters if name in wrapper.lora_A]


def factors_of(wrapper: Any, adapter: str) -> tuple[Tensor, Tensor]:
    """The two parameters of an adapter: A [E * R, in] and B [out, R * E]."""
    a, b = (wrapper._modules[side]._modules[adapter]._parameters["weight"] for side in SIDES)
    return a, b


def delta_of(wrapper: Any, adapter: str) -> Delta:
    """A copy of what an adapter adds to its parameter, in the parameter's own order."""
    experts, scale = wrapper.num_experts, float(wrapper.scaling[adapter])
    a, b = (factor.detach().to("cpu", copy=True) for factor in factors_of(wrapper, adapter))
    a = a.view(experts, -1, a.shape[-1])  # [E, R, in]
    b = b.view(b.shape[0], -1, experts).permute(2, 0, 1)  # [E, out, R]
    # A parameter of two dimensions is stored [out, in]; of three, older releases say nothing.
    if experts == 1 or getattr(wrapper, "_did_swap_in_out_features", False):
        return Delta(b, a, scale)
    return Delta(a.transpose(1, 2), b.transpose(1, 2), scale)


def own_modules(model: nn.Module) -> Iterator[nn.Module]:
    """Every module that belongs to an adapter, not to the model it adapts."""
    for module in model.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            part = module._modules.get(name)
            if part is not None:
                yield from part.modules()


def check_around(model: nn.Module, name: str, module: nn.Module) -> None:
    """Raise UnsupportedModelError for experts that something else than low-rank deltas changes.

    name: where the experts, or their outermost wrapper, hang in the model.
    """
    parts = name.split(".")
    for depth in range(1, len(parts)):
        holder = model.get_submodule(".".join(parts[:depth]))
        if hasattr(holder, "original_module") and hasattr(holder, "modules_to_save"):
            raise UnsupportedModelError(
                f"{name} lies in a trainable copy that PEFT keeps (modules_to_save): experts that are "
                "trained in full cannot be wrapped; merge or delete that adapter first"
            )
        if depth == len(parts) - 1 and hasattr(holder, "adapter_layer_names"):
            raise UnsupportedModelError(
                f"a {type(holder).__module__}.{type(holder).__name__} stands around {name}: only LoRA "
                "on parameters (target_parameters) can be wrapped; merge or unload it first"
            )
    if is_parametrized(module):
        raise UnsupportedModelError(
            f"parameters of {name} are parametrized; "
            "torch.nn.utils.parametrize.remove_parametrizations makes them plain ones"
        )


def check_wrapper(wrapper: Any, name: str, parameters: tuple[str, ...]) -> None:
    """Raise UnsupportedModelError unless a wrapper adds low-rank deltas to one of the parameters."""
    target = wrapper.parameter_name
    if target not in parameters:
        raise UnsupportedModelError(
            f"LoRA targets {target!r} of {name}; of wrapped experts, these can be targeted: "
            f"{', '.join(parameters)}"
        )
    odd = {
        "DoRA": any(wrapper.use_dora.values()) or len(wrapper.lora_magnitude_vector),
        "a variant of LoRA": wrapper.lora_variant,
        "lora_bias": any(wrapper.lora_bias.values()),
    }
    for what, is_on in odd.items():
        if is_on:
            raise UnsupportedModelError(
                f"{what} on {target!r} of {name} is no low-rank delta and cannot be wrapped; merge or "
                "delete that adapter first"
            )
