"""What would break wrapped experts is refused before any part of the model has changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybrimoe.attachments import Hooks
from hybrimoe.attempts import Attempts
from hybrimoe.limits import ensure_host_fits
from hybrimoe.modules.replacement import PackedModule, refuse_load, refuse_move

SAVE_PACKED = "hybrimoe.save_packed writes the model as it is, without unpacking"


class Protection:
    """Stand on every module around pooled experts, so that `model.model.half()` is met as well.

    A move or a state dict reaches children one after the other: refused at the experts it would be
    refused too late.
    """

    def __init__(self, model: nn.Module, names: list[str], dtypes: set[torch.dtype]) -> None:
        """names: of the experts; all modules on the paths to them are guarded."""
        self._modules, self._dtypes = modules_around(model, names), dtypes
        self._hooks = Hooks(self._register)

    def attach(self) -> None:
        """Refuse from now on."""
        self._hooks.attach()
        for module in self._modules:
            module.__dict__["_apply"] = _guarded_apply(module, self._dtypes)

    def detach(self, attempts: Attempts) -> None:
        """Leave no trace on the modules."""
        for module in self._modules:
            module.__dict__.pop("_apply", None)
        self._hooks.detach(attempts)

    def _register(self) -> list[Any]:
        hooks = []
        for module in self._modules:
            hooks += [
                module.register_load_state_dict_pre_hook(refuse_experts),  # type: ignore[no-untyped-call]
                module.register_state_dict_pre_hook(ensure_state_fits),  # type: ignore[no-untyped-call]
            ]
        return hooks


def modules_around(model: nn.Module, names: list[str]) -> list[nn.Module]:
    """All modules on the paths to the experts called `names`, from the model itself on."""
    parts = [name.split(".") for name in names]
    paths = {".".join(path[:depth]) for path in parts for depth in range(len(path))}
    return [model.get_submodule(path) for path in sorted(paths)]


def refuse_experts(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Raise, before any part is loaded, if a state dict has weights for what is packed."""
    packed = [
        (name, part) for name, part in module.named_modules() if isinstance(part, PackedModule)
    ]
    names = [f"{prefix}{at}.{name}" for at, part in packed for name in part.packed_names]
    refuse_load([name for name in names if name in state])


def ensure_state_fits(module: nn.Module, *_: Any) -> None:
    """Raise InsufficientMemoryError unless all of a module's weights can exist unpacked at once."""
    packed = [part for part in module.modules() if isinstance(part, PackedModule)]
    what = f"the state dict of {type(module).__name__}, with all weights unpacked,"
    ensure_host_fits(sum(part.native_bytes for part in packed), what, SAVE_PACKED)


def ensure_unwrap_fits(model: nn.Module, layers: Sequence[tuple[int, int]]) -> None:
    """Raise InsufficientMemoryError, before anything changes, if the restored weights cannot fit.

    layers: bytes of each unpacked, and packed in memory: it gives these back when it is restored.
    """
    most = grown = 0
    for native, packed in layers:
        grown += native
        most = max(most, grown)
        grown -= packed
    what = f"unwrapping {type(model).__name__}"
    ensure_host_fits(most, what, f"the model stays wrapped; {SAVE_PACKED}")


def _guarded_apply(module: nn.Module, dtypes: set[torch.dtype]) -> Callable[..., nn.Module]:
    def apply(fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        for dtype in dtypes:
            refuse_move(fn, dtype)
        return type(module)._apply(module, fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    return apply
