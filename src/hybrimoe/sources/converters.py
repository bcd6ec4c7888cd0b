"""Weight converters for transformers' loader whose results go into the pool."""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import (
    Concatenate,
    ConversionOps,
    MergeModulelist,
    SkipParameters,
    WeightConverter,
)

from hybrimoe.errors import CheckpointError
from hybrimoe.models.releases import CONVERTER_STATE
from hybrimoe.sources.quantized import PLAIN
from hybrimoe.sources.safetensors import Reader
from hybrimoe.sources.sink import ExpertSink
from hybrimoe.sources.stored_numbers import quantized_tensor


class Unchanged(ConversionOps):  # type: ignore[misc]
    """A parameter that is stored as the model has it."""

    def convert(self, input_dict: Any, source_patterns: Any, target_patterns: Any, **_: Any) -> Any:
        """The one tensor under the target's name."""
        (tensors,) = input_dict.values()
        return {target_patterns[0]: tensors}


class PackingConverter(WeightConverter):  # type: ignore[misc]
    """A converter whose results go into the pool if they are experts.

    Where it knows how the parameter is put together, it reads the file itself, a few experts at a
    time, and nothing is ever merged; else it lets transformers convert and packs what comes out.
    """

    __slots__ = ("arrivals", "keys", "promised", "reader")

    @classmethod
    def of_merged(cls, tail: str, *share: Any) -> PackingConverter:
        """For parameters that are stored as the model has them."""
        return cls([tail], [tail], [Unchanged()])._sharing(*share)

    @classmethod
    def instead_of(cls, other: Any, *share: Any) -> PackingConverter:
        """With the patterns and operations of another converter."""
        patterns = other._original_source_patterns, other._original_target_patterns
        new = cls(*(list(pattern) for pattern in patterns), other.operations)._sharing(*share)
        for name in CONVERTER_STATE:
            if hasattr(other, name):
                setattr(new, name, getattr(other, name))
        return new

    def _sharing(self, arrivals: ExpertSink, reader: Reader | None, promised: set[str]) -> Any:
        self.arrivals, self.reader, self.promised = arrivals, reader, promised
        self.keys: dict[str, list[str]] = {}
        return self

    def __deepcopy__(self, memo: Any) -> PackingConverter:
        # The loader copies a converter for each parameter; the pool must not be copied with it.
        return self.instead_of(self, self.arrivals, self.reader, self.promised)

    def add_tensor(
        self, target_key: str, source_key: str, source_pattern: str, future: Any
    ) -> None:
        """Remember which stored tensor it is, besides what the loader would do with it."""
        stored = None if self.reader is None else self.reader.catalogue.get(source_key)
        if stored is not None and stored.dtype not in PLAIN:
            raise quantized_tensor(f"is stored as {stored.dtype}", source_key, stored)
        super().add_tensor(target_key, source_key, source_pattern, future)
        self.keys.setdefault(source_pattern, []).append(source_key)
        first, *others = self.target_patterns
        self.promised.update(target_key.replace(first, other) for other in (first, *others))

    def convert(
        self,
        layer_name: str,
        model: Any = None,
        config: Any = None,
        hf_quantizer: Any = None,
        loading_info: Any = None,
    ) -> dict[str, Any]:
        """The results that are no experts; those that are have gone into the pool."""
        self.arrivals.check_promised(self.promised)  # before transformers makes up what is missing
        if self._streams(layer_name):
            self.collected_tensors.clear()
            self.arrivals.stream(layer_name, self._fill)
            loading_info.missing_keys.discard(layer_name)
            return {}
        try:
            results = super().convert(layer_name, model, config, hf_quantizer, loading_info)
        except SkipParameters:
            error = str(loading_info.conversion_errors.get(layer_name, "")).splitlines()
            raise CheckpointError(
                f"cannot be put together from what is stored: {error[-2:][:1]}", tensor=layer_name
            ) from None
        for name in [name for name in results if name in self.arrivals.targets]:
            value = results.pop(name)
            self.arrivals.accept(name, value[0] if isinstance(value, list) else value)
            loading_info.missing_keys.discard(name)
        return results

    def _streams(self, layer_name: str) -> bool:
        """Whether the stored tensors can be read in place of the parameter, expert by expert."""
        if self.reader is None or not self.arrivals.can_stream(layer_name):
            return False
        if not all(self.reader.can_read(key) for keys in self.keys.values() for key in keys):
            return False
        layer, name, _ = self.arrivals.targets[layer_name]
        experts, rows, columns = layer.shapes[name]
        shapes = {
            pattern: {self.reader.catalogue[key].shape for key in keys}
            for pattern, keys in self.keys.items()
        }
        if any(len(found) != 1 for found in shapes.values()):
            return False
        if self._is_merged:
            return [*shapes.values()] == [{(experts, rows, columns)}]
        parts = [next(iter(found)) for found in shapes.values()]
        return (
            self._merges
            and len(self.keys) == len(self.source_patterns)
            and all(len(keys) == experts for keys in self.keys.values())
            and all(len(part) == 2 and part[1] == columns for part in parts)
            and sum(part[0] for part in parts) == rows
        )

    @property
    def _is_merged(self) -> bool:
        return [type(op) for op in self.operations] == [Unchanged]

    @property
    def _merges(self) -> bool:
        """Whether each expert has tensors of its own, stacked and then concatenated by rows."""
        kinds = [(type(op), getattr(op, "dim", None)) for op in self.operations]
        stack, join = (MergeModulelist, 0), (Concatenate, 1)
        return kinds == [stack, join] or (kinds == [stack] and len(self.source_patterns) == 1)

    def _fill(self, out: torch.Tensor, first: int) -> None:
        assert self.reader is not None
        if self._is_merged:
            self.reader.rows(next(iter(self.keys.values()))[0], out, first)
            return
        for expert, merged in enumerate(out, first):
            at = 0
            for pattern in self.source_patterns:
                key = self.keys[pattern][expert]
                rows = self.reader.catalogue[key].shape[0]
                self.reader.rows(key, merged[at : at + rows])
                at += rows
