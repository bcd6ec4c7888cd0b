"""What takes the place of packed parameters: for who only asks for shape and type, and for a loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hybrimoe.errors import WrappedModelError

ATTRIBUTES = (
    *("shape", "dtype", "device", "ndim", "layout", "requires_grad", "is_leaf", "grad", "grad_fn"),
    *("is_meta", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "nbytes", "itemsize"),
)
METHODS = (
    *("size", "dim", "numel", "nelement", "element_size", "stride", "is_contiguous", "get_device"),
    *("is_floating_point", "is_complex", "requires_grad_", "data_ptr", "__hash__"),
)
READABLE = {
    *(getattr(Tensor, name).__get__ for name in ATTRIBUTES),
    *(getattr(Tensor, name) for name in METHODS),
    Tensor.requires_grad.__set__,  # type: ignore[attr-defined]
}
"""What of a tensor can be asked for without reading its numbers."""


class StandIn(nn.Parameter):
    """A parameter with the shape and the type of packed weights, and no numbers of its own."""

    label: str

    @classmethod
    def of(cls, name: str, shape: torch.Size, dtype: torch.dtype) -> StandIn:
        """The stand-in of a parameter; it takes the memory of one number."""
        made = cls(torch.zeros((), dtype=dtype, device="cpu").expand(shape), requires_grad=False)
        made.label = name
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Answer questions, refuse everything that would compute with the numbers."""
        if func not in READABLE:
            name = next((x.label for x in args if isinstance(x, StandIn)), "a parameter")
            raise WrappedModelError(
                f"{name} is packed in model.hybrimoe.pool; hybrimoe.unwrap(model) restores it"
            )
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"StandIn({self.label}, {tuple(self.shape)}, {self.dtype})"


def leave_out(module: nn.Module, name: str) -> None:
    """Have a loader neither look for a parameter nor make one up, until another takes its place.

    Some families initialize the weights of a module's children. What they find instead of the parameter
    says that it is initialized.
    """
    module.register_parameter(name, None)
    nothing = torch.empty(0, device="cpu")
    nothing._is_hf_initialized = True  # type: ignore[attr-defined]
    module.__dict__[name] = nothing
