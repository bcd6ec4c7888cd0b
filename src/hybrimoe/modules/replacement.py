"""The base of all modules whose weights live in the pool, and what they refuse."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from hybrimoe.attempts import Attempts
from hybrimoe.errors import WrappedModelError
from hybrimoe.models.places import holder_of


class PackedModule(nn.Module):
    """A module whose weights live in memory of ours: it cannot be moved, loaded, copied or pickled.

    found: the original, and where it hangs. native_bytes: of its weights, unpacked. packed_bytes: of
    its own memory for them.
    packed_numbers: how many of the model's parameters are not its parameters now, but packed.
    packed_names: what its state dict calls them.
    """

    found: Any
    dtype: torch.dtype
    native_bytes: int
    packed_bytes: int
    packed_numbers: int
    packed_names: tuple[str, ...]

    @abstractmethod
    def attach(self) -> None:
        """Take the original's place in its parent."""

    @abstractmethod
    def restore(self) -> None:
        """Undo `attach`: the original's weights back into it, and itself into the model."""

    def detach(self, attempts: Attempts) -> None:
        """`restore`, where it stands in the model."""
        if holder_of(self.found, self):
            attempts.take(self.restore)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedModule:
        refuse_move(fn, self.dtype)
        return super()._apply(fn, recurse)  # type: ignore[no-any-return,no-untyped-call]

    def _load_from_state_dict(
        self, state: Any, prefix: str, local: Any, strict: bool, missing: list[str], *args: Any
    ) -> None:
        refuse_load([prefix + name for name in self.packed_names if prefix + name in state])
        absent: list[str] = []
        super()._load_from_state_dict(state, prefix, local, strict, absent, *args)
        missing += [*absent, *(prefix + name for name in self.packed_names)]

    def __deepcopy__(self, memo: Any) -> NoReturn:
        refuse_copy()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickle()


def refuse_move(fn: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    """Raise if `fn`, given by `.to()`, `.half()` or `.cuda()`, would leave the experts behind."""
    probe = torch.empty(0, dtype=dtype)
    moved = fn(probe)
    if moved.dtype != probe.dtype or moved.device != probe.device:
        raise WrappedModelError(
            f"a wrapped model cannot be moved to {moved.device} or cast to {moved.dtype}: its experts "
            "live in the pool; call hybrimoe.unwrap(model), move or cast, and wrap again"
        )


def refuse_load(names: list[str]) -> None:
    """Raise if a state dict has weights of these names, which are packed."""
    if names:
        raise WrappedModelError(
            "a wrapped model cannot load a state dict; call hybrimoe.unwrap(model) first: "
            f"{len(names)} of its tensors are packed here, such as {names[0]}; what is left without "
            "them can be loaded"
        )


def refuse_copy() -> NoReturn:
    """Raise on deepcopy."""
    raise WrappedModelError(
        "a wrapped model cannot be copied: its experts live once, in the pool; "
        "call hybrimoe.unwrap(model) first"
    )


def refuse_pickle() -> NoReturn:
    """Raise on pickle.dump and torch.save."""
    raise WrappedModelError(
        "a wrapped model cannot be pickled; use model.save_pretrained, or hybrimoe.unwrap first"
    )
