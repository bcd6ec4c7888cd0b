"""The transformers seam: find the routed experts of a model and describe their weights as views.

transformers 5.7+ decorates every routed-experts class with `use_experts_implementation`, so one
adapter driven by its flags covers them all. What a gate computes is not guessed from its name: it is
evaluated on a grid and compared with the formulas the kernels have.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from hybrimoe.errors import UnsupportedModelError
from hybrimoe.formats.gate import Gate
from hybrimoe.models.gates import find_gate
from hybrimoe.models.spec import ExpertSpec
from hybrimoe.models.tuners import inside, is_wrapper
from hybrimoe.models.weights import ExpertWeights

FLAGS = ("has_gate", "has_bias", "is_transposed", "is_concatenated")
TOP_K_NAMES = (
    "num_experts_per_tok",
    "top_k_experts",
    "moe_topk",
    "moe_num_experts_per_tok",
    "moe_k",
)


Describe = Callable[[nn.Module], ExpertWeights]
_ADAPTERS: dict[type[nn.Module], Describe] = {}


def register_adapter(experts_class: type[nn.Module], describe: Describe) -> None:
    """Teach hybrimoe a class of routed experts that transformers does not decorate.

    The class must be called as `experts(hidden_states [T, D], ids [T, K], weights [T, K])` and keep
    its weights in parameters of its own; `describe(module)` returns them as `ExpertWeights`.
    """
    if not (isinstance(experts_class, type) and issubclass(experts_class, nn.Module)):
        raise TypeError(f"experts_class must be a subclass of nn.Module, got {experts_class!r}")
    if not callable(describe):
        raise TypeError(f"describe must be callable, got {describe!r}")
    _ADAPTERS[experts_class] = describe


@dataclass(frozen=True)
class FoundExperts:
    """One experts module in a model: where it hangs and how to see its weights.

    Wrappers that PEFT has put around it hang in its place; the name does not tell of them.
    """

    name: str
    parent: nn.Module
    attribute: str
    module: nn.Module
    describe: Describe

    @property
    def is_decorated(self) -> bool:
        """Whether its parameters are those that transformers' experts interface prescribes."""
        return self.describe is _describe

    @functools.cached_property
    def spec(self) -> ExpertSpec:
        """What is known of the experts besides their numbers, found when it is first asked for.

        Raises UnsupportedModelError for a gate that is none of the formulas.
        """
        views = self.describe(self.module)
        count, matrices, inner, hidden = views.up.shape
        tensors = [getattr(self.module, name) for name in views.parameters]
        native = sum(tensor.numel() * tensor.dtype.itemsize for tensor in tensors)
        shape = count, hidden, inner, matrices == 2, views.up_bias is not None
        return ExpertSpec(self.name, *shape, views.up.dtype, views.gate, views.parameters, native)

    def views(self) -> ExpertWeights:
        """Views on what the module's parameters hold now."""
        return (
            _views(self.module, self.spec.gate) if self.is_decorated else self.describe(self.module)
        )

    def parameters(self) -> list[nn.Parameter]:
        """The module's own parameters behind the views, in the order up, down, biases."""
        return [getattr(self.module, name) for name in self.spec.parameters]


def find_experts(model: nn.Module) -> list[FoundExperts]:
    """All routed experts of a model, in module order; raises UnsupportedModelError if there are none."""
    found = list(_walk(model))
    if not found:
        suspects = sorted({type(m).__name__ for m in model.modules() if _looks_like_experts(m)})
        why = (
            f"its experts ({', '.join(suspects)}) do not carry transformers' experts interface; "
            "hybrimoe.register_adapter can teach them"
            if suspects
            else "it has no routed experts (a dense model?)"
        )
        raise UnsupportedModelError(f"cannot wrap {type(model).__name__}: {why}")
    return found


def _walk(model: nn.Module) -> Iterator[FoundExperts]:
    for name, parent in model.named_modules():
        if is_wrapper(parent):
            continue  # what it wraps was met where the wrapper hangs
        for attribute, outermost in parent.named_children():
            child = inside(outermost)
            describe = _ADAPTERS.get(type(child)) or (_describe if _is_decorated(child) else None)
            if describe:
                path = f"{name}.{attribute}" if name else attribute
                yield FoundExperts(path, parent, attribute, child, describe)


def _is_decorated(module: nn.Module) -> bool:
    return all(hasattr(module, flag) for flag in FLAGS) and hasattr(module, "down_proj")


def _looks_like_experts(module: nn.Module) -> bool:
    return "expert" in type(module).__name__.lower() and any(True for _ in module.parameters())


def _describe(module: Any) -> ExpertWeights:
    """Views on the parameters of a decorated module, and its gate."""
    return _views(module, find_gate(module))


def _views(module: Any, gate: Gate) -> ExpertWeights:
    """The views alone, from the module's flags."""
    if getattr(module, "_is_expert_parallel", False):
        raise UnsupportedModelError(f"{type(module).__name__} is expert-parallel; load it without")
    names = ["gate_up_proj" if module.has_gate else "up_proj", "down_proj"]
    up, down = (getattr(module, name) for name in names)
    matrices = 2 if module.has_gate else 1
    if module.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    up_bias = down_bias = None
    if module.has_bias:
        up_bias = _split(getattr(module, f"{names[0]}_bias"), matrices, module.is_concatenated)
        down_bias = module.down_proj_bias.detach()
        names += [f"{names[0]}_bias", "down_proj_bias"]
    return ExpertWeights(
        _split(up, matrices, module.is_concatenated),
        down.detach(),
        gate,
        up_bias,
        down_bias,
        module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None,
        tuple(names),
    )


def _split(tensor: Tensor, matrices: int, concatenated: bool) -> Tensor:
    """[E, M * F, ...] as [E, M, F, ...], whether gate and up follow each other or interleave."""
    size = tensor.shape[1] // matrices
    if concatenated:
        return tensor.detach().unflatten(1, (matrices, size))
    return tensor.detach().unflatten(1, (size, matrices)).transpose(1, 2)


def top_k_of(model: Any) -> int:
    """Experts per token by the model's configuration, 2 where it has none or no known name says it."""
    config = text_config(model)
    for name in TOP_K_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return 2


def text_config(model: Any) -> Any:
    """What a model says of its text layers: any object, None where it says nothing."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config
