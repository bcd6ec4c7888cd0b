"""Experts in the pool are frozen: who trains a wrapped model is told so."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator
from typing import NoReturn

from torch import nn

from hybrimoe.errors import WrappedModelError


class FrozenNotice:
    """Called in training with gradients, by every layer; warns once that experts do not take part.

    Only where the decoder layer around them is trained in full: who trains adapters, or a head,
    has frozen the experts on purpose.
    """

    def __init__(self, model: nn.Module, path: str, what: str) -> None:
        self._model = weakref.ref(model)
        self._path = path  # of the first layer's experts
        self._what = what  # is frozen
        self._said = False

    def __call__(self, layer: str, index: int, trains_adapters: bool) -> None:
        """layer, index: which runs. trains_adapters: whether LoRA on its experts wants gradients."""
        if trains_adapters:
            refuse_training(layer)
        if self._said or index:
            return
        if any(parameter.requires_grad for parameter in base_parameters(self._around())):
            self._said = True
            warnings.warn(
                f"the {self._what} of a wrapped model are frozen: they get no gradient and stay as they "
                "are while the rest is trained; call hybrimoe.unwrap(model) to train them too",
                stacklevel=2,
            )

    def _around(self) -> nn.Module:
        """The decoder layer, or what stands in its place."""
        model = self._model()
        assert model is not None
        return model.get_submodule(".".join(self._path.split(".")[:-2]))


def base_parameters(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of a model itself, not of adapters in it."""
    own = getattr(module, "adapter_layer_names", None)
    yield from (p for p in module._parameters.values() if own is None and p is not None)
    for name, child in module._modules.items():
        if child is not None and (own is None or name in ("base_layer", "original_module")):
            yield from base_parameters(child)


def refuse_training(name: str) -> NoReturn:
    """Raise for gradients of LoRA on experts, which would be none."""
    raise WrappedModelError(
        f"LoRA on the experts of {name} cannot be trained while they are wrapped: call "
        "hybrimoe.unwrap(model) before training and wrap again after it, or freeze this adapter"
    )
