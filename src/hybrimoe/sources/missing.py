"""Weights that a checkpoint lacks: transformers makes up random ones, which no user would want."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from hybrimoe.errors import CheckpointError

ADJUST = "_adjust_missing_and_unexpected_keys"
"""Where transformers settles what is missing: tied weights, and those that a family does without, are
none of it."""
NAMED = 4


class Missing:
    """Remembers what the loader of transformers found no values for in one model."""

    def __init__(self, model: Any) -> None:
        self.names: set[str] = set()
        self._model = model
        adjust = getattr(model, ADJUST)

        def adjust_and_remember(found: Any) -> None:
            adjust(found)
            self.names = set(found.missing_keys)

        setattr(model, ADJUST, adjust_and_remember)

    def check(self, may_add_head: bool) -> None:
        """Raise CheckpointError if the model was left with random weights.

        may_add_head: a head of another task than the checkpoint's is new, which is what was asked
        for, and transformers says so.
        """
        model = self._model
        model.__dict__.pop(ADJUST)
        if self.names and not (may_add_head and _are_a_new_head(self.names, model)):
            refuse_missing(self.names)


def refuse_missing(names: Iterable[str]) -> None:
    """Raise CheckpointError if there are any names of parameters that nothing was stored for."""
    missing = sorted(names)
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        raise CheckpointError(
            f"the checkpoint has no weights for {', '.join(missing[:NAMED])}{more}: it is incomplete, "
            "or of another model than config.json says"
        )


def _are_a_new_head(names: set[str], model: Any) -> bool:
    """Whether all of it lies around the base model, in a class that the checkpoint is not of."""
    base = model.base_model_prefix
    if not base or not hasattr(model, base):
        return False
    is_other_class = type(model).__name__ not in (
        model.config.architectures or [type(model).__name__]
    )
    return is_other_class and not any(name.startswith(f"{base}.") for name in names)
