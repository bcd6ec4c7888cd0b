"""Which accelerator a configuration asks for, and the way there of what is no expert."""

from __future__ import annotations

import torch
from torch import nn

from hybrimoe.config import Config
from hybrimoe.errors import ConfigError, DeviceLostError, InsufficientMemoryError
from hybrimoe.models.adapters import FoundExperts
from hybrimoe.runtime.devices.base import Accelerator
from hybrimoe.runtime.devices.cuda import TorchAccelerator
from hybrimoe.runtime.devices.emulated import EmulatedAccelerator
from hybrimoe.runtime.disk.sizes import packed_sizes
from hybrimoe.runtime.slot_budget import Experts, Reserve, slot_count


def check_device(config: Config) -> None:
    """Raise ConfigError if this machine cannot do what is asked of a device."""
    found = torch.cuda.is_available()
    if config.device == "cuda" and not found:
        raise ConfigError("device='cuda' needs a CUDA device, torch finds none; try 'emulated'")
    if config.device == "auto" and found and config.linear is not None:
        raise ConfigError(
            f"linear={config.linear!r} packs dense layers for the CPU, but here they run on the "
            "GPU; leave it out, or choose device='cpu'"
        )


def check_room(found: list[FoundExperts], config: Config) -> None:
    """Raise ConfigError for a `vram` that does not hold one expert per layer."""
    if config.vram is None or not has_accelerator(config):
        return
    shapes = [packed_sizes(experts.spec, config.weights) for experts in found]
    number, largest = sum(n for n, _ in shapes), max(size for _, size in shapes)
    slot_count(config.vram, Experts(number, len(shapes), largest), None, Reserve(0, 0))


def has_accelerator(config: Config) -> bool:
    """Whether a configuration asks for one, and the machine has it."""
    found = config.device != "cpu" and torch.cuda.is_available()
    return config.device == "emulated" or found


def open_accelerator(config: Config) -> Accelerator | None:
    """The accelerator a configuration asks for, or None for the CPU alone."""
    if not has_accelerator(config):
        return None
    return EmulatedAccelerator() if config.device == "emulated" else TorchAccelerator()


def move_dense(model: nn.Module, device: str) -> None:
    """Put everything that is not a pooled expert on a device: attention, norms, routers, heads.

    Raises InsufficientMemoryError where it does not fit, having moved a part of it.
    """
    try:
        for parameter in model.parameters():
            parameter.data = parameter.data.to(device)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else buffer.to(device)
    except torch.OutOfMemoryError as error:
        size = sum(parameter.nbytes for parameter in model.parameters())
        raise InsufficientMemoryError(
            f"the model without its experts takes {size} bytes and does not fit on {device}; free "
            "some memory there, or use device='cpu'",
            size,
        ) from error


def bring_back_dense(model: nn.Module) -> None:
    """Put it back on the CPU; raises DeviceLostError where it cannot be read any more."""
    try:
        move_dense(model, "cpu")
    except RuntimeError as error:
        raise DeviceLostError(
            "the experts are restored, but the rest of the model was on an accelerator that failed "
            "and cannot be read: load the model again in a new process"
        ) from error
