"""The memory of a load: whether it fits, and that it is ours when the load is over."""

from __future__ import annotations

import torch
from torch import nn

from hybrimoe.kernels.layout import expert_layout
from hybrimoe.runtime import formats
from hybrimoe.runtime.adapters import FoundExperts, top_k_of
from hybrimoe.runtime.host import MARGIN, ensure_host_fits, host_memory
from hybrimoe.runtime.tier_sizes import tier_sizes
from hybrimoe.runtime.tiers import shape_of


def ensure_fits(
    model: nn.Module,
    found: list[FoundExperts],
    weights: str,
    ram: int | float | str | None = None,
) -> None:
    """Raise InsufficientMemoryError, before any is taken, if the load cannot fit into host memory.

    The peak is all packed experts, the dense weights, and what is read of one layer. Of experts with
    a budget `ram`, the peak is what that holds and one packed layer.
    """
    need, native = {"native": 0, "int8": 0, "int4": 0}, 0
    experts: set[int] = set()
    if ram is not None:
        need = {choice: _within(ram, model, found, choice) for choice in need}
    for item in found:
        described = item.describe(item.module)
        tensors = [getattr(item.module, name) for name in described.parameters]
        experts.update(map(id, tensors))
        native = max(native, sum(tensor.nbytes for tensor in tensors))
        count, matrices, inner, hidden = described.up.shape
        for choice in need:
            fmt = formats.format_of(choice, described.up.dtype)
            biased = described.up_bias is not None
            layout = expert_layout(fmt, hidden, inner, matrices == 2, biased)
            need[choice] += count * layout.expert_bytes if ram is None else 0
    dense = sum(
        parameter.nbytes for parameter in model.parameters() if id(parameter) not in experts
    )
    have, rest = host_memory(), dense + native
    fitting = [choice for choice in need if need[choice] + rest <= have.free - MARGIN]
    ensure_host_fits(
        need[weights] + rest,
        f"loading {type(model).__name__} with weights={weights!r}",
        f"weights={fitting[0]!r} fits" if fitting else "no format of the experts fits; `ram` keeps a "
        "part of them on disk",
        have,
    )


def _within(
    ram: int | float | str, model: nn.Module, found: list[FoundExperts], weights: str
) -> int:
    """Bytes of packed experts at the peak of a load that keeps no more than `ram` of them."""
    layers = [shape_of(item, weights) for item in found]
    sizes = tier_sizes(ram, layers, top_k_of(model))
    if sizes is None:
        return sum(count * size for count, size in layers)
    return sizes.slots * sizes.slot_bytes + max(count * size for count, size in layers)


def own_memory(model: nn.Module) -> None:
    """Copy what the loader left in a map of the file: such memory dies with the file (SIGBUS)."""
    moved: dict[int, torch.Tensor] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        place = tensor.data_ptr()
        if tensor.numel():
            if place not in moved:
                moved[place] = tensor.data.clone()
            tensor.data = moved[place]
