"""Whether what a checkpoint stores are the numbers that its model computes with.

Asked of the model's own parameters, through the renaming of transformers' loader, and not of names
alone: a `scale` that the model has is a weight like any other, one beside a weight says that the
weight cannot be read without it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hybrimoe.errors import CheckpointError
from hybrimoe.sources.quantized import COUNTS, PLAIN, UNDECLARED, hint_of, owners
from hybrimoe.sources.safetensors import Catalogue, StoredTensor

MODELOPT = "hf_quant_config.json"
"""Where modelopt writes its method, in older exports only there."""


def ensure_plain(model: Any, stored: Catalogue, rules: list[Any] | None = None) -> None:
    """Raise CheckpointError for a tensor that stands for a weight but does not hold its numbers.

    model: as it is before any weight arrives, such as on the meta device. rules: of renaming; None
    takes those that transformers has for the model.
    """
    suspects = [n for n, tensor in stored.items() if tensor.dtype not in PLAIN or owners(n)]
    if not suspects:
        return
    suspects.sort(key=lambda name: stored[name].dtype in PLAIN)  # what is plainly wrong comes first
    names = _Names(model, rules)
    for name in suspects:
        target = names.target(name)
        tensor = stored[name]
        if target is not None:
            kind = names.state[target].dtype
            if tensor.dtype not in PLAIN and (kind.is_floating_point or kind.is_complex):
                raise quantized_tensor(f"is stored as {tensor.dtype}", name, tensor)
            continue
        owner = names.owner(name, is_plain=tensor.dtype in PLAIN | COUNTS)
        if owner is not None:
            raise quantized_tensor(
                f"lies beside the weight {owner}, which it scales or holds", name, tensor
            )


class _Names:
    """From names in a checkpoint to those of a model's parameters and buffers."""

    def __init__(self, model: Any, rules: list[Any] | None) -> None:
        # Half of transformers comes with these, and few checkpoints have suspects.
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, rename_source_key

        self.rename = rename_source_key
        self.state = model.state_dict()
        self.prefix = model.base_model_prefix
        known = get_model_conversion_mapping(model) if rules is None else rules
        converters = [rule for rule in known if isinstance(rule, WeightConverter)]
        renamings = [rule for rule in known if not isinstance(rule, WeightConverter)]
        self.rules: tuple[tuple[list[Any], list[Any]], ...] = ((renamings, converters), ([], []))

    def target(self, name: str) -> str | None:
        """The parameter that a stored tensor goes into, the first one if several; None if none."""
        for rules in self.rules:  # as the loader does: renamed, or else as it is
            renamed, _ = self.rename(name, *rules, self.prefix, self.state)
            if renamed in self.state:
                return str(renamed)
        return None

    def owner(self, name: str, is_plain: bool) -> str | None:
        """The weight of the model that a tensor which is no parameter belongs to; None if none.

        is_plain: its own dtype is no packed one, so that only its name can tell.
        """
        beside = owners(name)
        if not is_plain and "." in name:
            beside += (f"{name.rpartition('.')[0]}.weight",)
        return next((found for found in map(self.target, beside) if found is not None), None)


def quantized_tensor(what: str, name: str, tensor: StoredTensor) -> CheckpointError:
    """What to raise for a tensor that cannot be read without its scales."""
    is_modelopt = (Path(tensor.path).parent / MODELOPT).is_file()
    advice = f"{MODELOPT} says modelopt: {hint_of('modelopt')}" if is_modelopt else UNDECLARED
    return CheckpointError(f"{what}: the checkpoint is quantized; {advice}", tensor.path, name)
