"""What wrapping adds to a model, each of which can be taken away again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from hybrimoe.attempts import Attempts


class Attachment(Protocol):
    """One thing that a wrapped model has and a plain one has not: hooks, a module in another's place."""

    def attach(self) -> None:
        """Put it there; an interruption may leave a part of it, which `detach` takes away too."""

    def detach(self, attempts: Attempts) -> None:
        """Take it away, whatever fails; where it is not attached, nothing changes."""


class Hooks:
    """Hooks that `register` makes on modules when they are attached."""

    def __init__(self, register: Callable[[], list[Any]]) -> None:
        self._register, self._handles = register, list[Any]()

    def attach(self) -> None:
        """Register them."""
        self._handles += self._register()

    def detach(self, attempts: Attempts) -> None:
        """Remove them."""
        while self._handles:
            attempts.take(self._handles.pop().remove)
