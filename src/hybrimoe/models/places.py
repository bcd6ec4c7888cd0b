"""Where in a model a module hangs: at its attribute, or below wrappers that PEFT put around it there."""

from __future__ import annotations

from typing import Protocol

from torch import nn


class Found(Protocol):
    """Where a module was found."""

    @property
    def parent(self) -> nn.Module:
        """The module that had it."""

    @property
    def attribute(self) -> str:
        """By which name."""


def holder_of(found: Found, module: nn.Module) -> tuple[nn.Module, str] | None:
    """Which module has `module` as a child now, and by which name; None if it is not there."""
    there = found.parent._modules.get(found.attribute)
    if there is module:
        return found.parent, found.attribute
    for holder in () if there is None else there.modules():
        for name, child in holder._modules.items():
            if child is module:
                return holder, name
    return None


def exchange(found: Found, old: nn.Module, new: nn.Module) -> None:
    """Hang a module where another one hangs; at the attribute itself if that one is gone."""
    holder, name = holder_of(found, old) or (found.parent, found.attribute)
    setattr(holder, name, new)
