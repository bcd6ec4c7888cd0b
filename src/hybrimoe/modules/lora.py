"""LoRA on routed experts: its deltas are part of the packed weights, and follow what PEFT says.

PEFT adds a delta to a parameter while its module runs. Packed experts have no such parameter, so the
pool holds the sum instead and runs at its full speed. What was added is remembered: a forward that
finds other adapters active, or other numbers in them, packs the layers anew, and `hybrimoe.unwrap`
gives back the weights without any delta. In memory that takes the adapters' own size, and what
`deltas.keep` keeps of lossless weights; on disk both versions lie side by side.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from hybrimoe.attempts import Attempts
from hybrimoe.errors import FormatError
from hybrimoe.formats.layout import only_files_bring, split
from hybrimoe.formats.registry import rounded
from hybrimoe.kernels.cpu.run_layer import PackedLayer
from hybrimoe.models import deltas, tuners
from hybrimoe.models import weights as formats
from hybrimoe.models.adapters import FoundExperts
from hybrimoe.models.deltas import Delta, Kept
from hybrimoe.models.tuners import Seen
from hybrimoe.models.weights import ExpertWeights
from hybrimoe.runtime.coordinator import Hybrid
from hybrimoe.runtime.pages import checksum
from hybrimoe.runtime.pool import ExpertPool


class LayerAdapters:
    """The wrappers around one layer's experts, and what of them the pool holds.

    They are looked for where the experts hang, so that whoever adds or removes one need not tell.
    """

    def __init__(self, layer: AdaptedLayer, found: FoundExperts) -> None:
        self.layer, self.found = layer, found
        self.folded = NOTHING
        self._seen: list[Seen] | None = []  # None: something failed half way
        self._top: nn.Module | None = None
        self._wrappers: list[Any] = []
        self._checksum = 0  # of what lies on disk without any delta

    def wrappers(self) -> list[Any]:
        """The wrappers around the experts now, the outermost first."""
        top = self.found.parent._modules.get(self.found.attribute)
        if top is not self._top or top is None:
            self._top = top
            self._wrappers = [] if top is None else [*filter(tuners.is_wrapper, top.modules())]
        return self._wrappers

    def rescan(self) -> None:
        """A wrapper came or went."""
        self._top = None

    def is_stale(self) -> bool:
        """Whether the pool holds other deltas than are active now; each forward asks."""
        wrappers, seen = self.wrappers(), self._seen
        if seen is None or len(wrappers) != len(seen):
            return True
        return any(not then.holds(now) for then, now in zip(seen, wrappers)) if seen else False

    def trained(self) -> tuple[Tensor, ...]:
        """The factors of active adapters that want gradients."""
        return tuple(
            factor
            for wrapper in self.wrappers()
            for adapter in tuners.active_on(wrapper)
            for factor in tuners.factors_of(wrapper, adapter)
            if factor.requires_grad
        )

    def at_first(self) -> dict[str, Tensor]:
        """The original's weights with active deltas, before they are packed; empty without any.

        Experts that will lie on disk are packed without: both versions have room there.
        """
        if self.layer.pool.tier is not None:
            return {}
        self._seen = self._look()
        wanted = wanted_by(self.wrappers())
        if not wanted:
            return {}
        plain = {name: getattr(self.found.module, name).data for name in self.layer.shapes}
        weights, self.folded = self._fold(plain, wanted)
        return weights

    def plain(self) -> dict[str, Tensor]:
        """The weights without any delta: the original's where the format is lossless."""
        layer, tier = self.layer, self.layer.pool.tier
        if tier is not None:
            return layer.unpacked(tier.blobs(layer.index, below=True))
        plain, (added, kept) = layer.unpacked(), self.folded
        for name in added:
            plain[name] = deltas.subtract(plain[name], added[name], kept.get(name, ()))
        return plain

    def as_in(self, folded: Folded) -> dict[str, Tensor]:
        """The weights with the deltas of a forward pass, whose adapters may not be active any more."""
        if folded is self.folded:
            return self.layer.unpacked()
        plain = self.plain()
        return plain | {
            name: deltas.add(plain[name], folded.deltas[name]) for name in folded.deltas
        }

    @torch.no_grad()
    def follow(self) -> None:
        """Pack the layer anew with the deltas that are active now."""
        seen, wanted = self._look(), wanted_by(self.wrappers())
        self._seen = None  # stale, should anything fail
        if self.folded is not NOTHING and not wanted and self.layer.pool.tier is not None:
            self.layer.rewritten(None, self._checksum)
            self.folded = NOTHING
        elif self.folded is not NOTHING or wanted:
            self._warn_of_rounding()
            self._pack(self.plain(), wanted)
        self._seen = seen

    @torch.no_grad()
    def change(self, name: str, found: list[Delta], safe: bool = False) -> None:
        """Add deltas to a parameter for good, as PEFT's `merge` and `unmerge` do.

        safe: raise ValueError, with nothing changed, if the sum is not finite.
        """
        plain, tier = self.plain(), self.layer.pool.tier
        plain[name] = deltas.add(plain[name], found)
        if safe and not torch.isfinite(plain[name]).all():
            raise ValueError(f"NaNs detected in the merged {name} of {self.layer.name}")
        self._seen = None  # what is still active is folded in by the next forward
        self._pack(plain, {})
        if tier is not None:
            tier.backing.keep_cover(self.layer.index)

    def adopt(self) -> None:
        """Have all wrappers around the experts pass their calls on."""
        for wrapper in self.wrappers():
            adopt(wrapper, self.layer)

    def leave(self) -> None:
        """The experts are about to be the original's again: PEFT may do as it likes with them."""
        for wrapper in self.wrappers():
            for name in OVERRIDES:
                wrapper.__dict__.pop(name, None)

    def _pack(self, plain: dict[str, Tensor], wanted: dict[str, list[Delta]]) -> None:
        layer, packed, tier = self.layer, self.layer.packed, self.layer.pool.tier
        weights, folded = self._fold(plain, wanted)
        check_weights(layer.name, packed.fmt, list(weights.values()))
        if self.folded is NOTHING:
            self._checksum = layer.checksum
        blobs = packed.blobs if tier is None else tier.empty(layer.index)
        formats.pack(packed.fmt, packed.layout, layer.described(weights), blobs)
        layer.rewritten(blobs, checksum(blobs))
        self.folded = folded

    def _fold(
        self, plain: dict[str, Tensor], wanted: dict[str, list[Delta]]
    ) -> tuple[dict[str, Tensor], Folded]:
        """The weights with deltas, and what takes these out again."""
        weights = {
            name: deltas.add(tensor, wanted[name]) if name in wanted else tensor
            for name, tensor in plain.items()
        }
        kept = {}
        if self.layer.is_lossless and self.layer.pool.tier is None:
            kept = {name: deltas.keep(plain[name], weights[name], wanted[name]) for name in wanted}
        return weights, Folded(wanted, kept) if wanted else NOTHING

    def _look(self) -> list[Seen]:
        return [Seen(wrapper) for wrapper in self.wrappers()]

    def _warn_of_rounding(self) -> None:
        if self.folded is NOTHING or self.layer.is_lossless or self.layer.pool.tier is not None:
            return
        if self.layer.index == 0:
            warnings.warn(
                f"the experts are stored as {self.layer.packed.fmt}, with an adapter's delta inside: "
                "each change of adapters rounds them once more; weights='native' is exact",
                stacklevel=2,
            )


class AdaptedLayer(Protocol):
    """What of `PooledExperts` its adapters use."""

    name: str
    index: int
    shapes: dict[str, torch.Size]
    checksum: int
    is_lossless: bool
    pool: ExpertPool
    hybrid: Hybrid | None
    adapters: LayerAdapters

    @property
    def packed(self) -> PackedLayer:
        """The layer's experts in the pool."""

    def described(self, tensors: dict[str, Tensor]) -> ExpertWeights:
        """`ExpertWeights` views on other tensors of the original's shapes."""

    def unpacked(self, blobs: np.ndarray | None = None) -> dict[str, Tensor]:
        """The weights that the blobs hold."""

    def rewritten(self, blobs: np.ndarray | None, total: int) -> None:
        """The packed weights have changed."""


class Folded(NamedTuple):
    """What of adapters a layer's packed weights hold, by parameter, and what takes it out again."""

    deltas: dict[str, list[Delta]]
    kept: dict[str, list[Kept]]

    @property
    def nbytes(self) -> int:
        """The memory it takes."""
        added = (delta for found in self.deltas.values() for delta in found)
        kept = (part for found in self.kept.values() for part in found)
        return sum(d.left.nbytes + d.right.nbytes for d in added) + sum(k.nbytes for k in kept)


NOTHING = Folded({}, {})


class Folding:
    """All layers of a model, which follow their adapters together.

    Copies of experts, on an accelerator or in the RAM of a disk tier, are made anew with them.
    """

    def __init__(self) -> None:
        self.layers: list[AdaptedLayer] = []
        self._lock = threading.RLock()

    def follow(self) -> None:
        """Bring every stale layer up to date."""
        with self._lock:
            stale = [layer for layer in self.layers if layer.adapters.is_stale()]
            if stale:
                with quiet(stale[0]):
                    for layer in stale:
                        layer.adapters.follow()

    def attach(self) -> None:
        """Adapters that are there already are followed from the start."""
        self.follow()

    def detach(self, attempts: Attempts) -> None:
        """The layers are about to be the original's again."""
        for layer in self.layers:
            attempts.take(layer.adapters.leave)


@contextmanager
def quiet(layer: AdaptedLayer) -> Iterator[None]:
    """Within the block nobody reads packed experts; behind it the accelerator begins anew."""
    hybrid = layer.hybrid
    with hybrid.lock if hybrid is not None else nullcontext():
        if hybrid is not None:
            hybrid.accelerator.synchronize()
            hybrid.memory.sound = False  # its slots hold the former weights
        yield


def wanted_by(wrappers: list[Any]) -> dict[str, list[Delta]]:
    """Copies of all active deltas, by parameter."""
    found: dict[str, list[Delta]] = {}
    for wrapper in wrappers:
        for adapter in tuners.active_on(wrapper):
            found.setdefault(wrapper.parameter_name, []).append(tuners.delta_of(wrapper, adapter))
    return found


def check_adapters(model: nn.Module, found: FoundExperts, fmt: str) -> list[Tensor]:
    """The weights of a layer that is to be wrapped, with active deltas, if adapters are around it.

    Raises UnsupportedModelError for adapters that are no low-rank deltas.
    """
    tuners.check_around(model, found.name, found.module)
    parameters = found.spec.parameters
    wrappers = tuners.wrappers_of(found.parent._modules[found.attribute])
    for wrapper in wrappers:
        tuners.check_wrapper(wrapper, found.name, parameters)
    if formats.is_lossless(fmt):
        return []
    wanted = wanted_by(wrappers)
    return [deltas.add(getattr(found.module, name).data, wanted[name]) for name in wanted]


def check_weights(name: str, fmt: str, tensors: list[Tensor]) -> None:
    """Raise FormatError if a layer cannot be packed from these weights."""
    if only_files_bring(fmt):
        raise FormatError(
            f"the experts of {name} are kept as {fmt}, as a GGUF file holds them: an adapter's delta "
            f"cannot be added to them; load the original checkpoint as weights={rounded()[0]!r}, or "
            "leave experts out of the adapter"
        )
    for part in dict.fromkeys(split(fmt)):
        formats.check_range(name, part, tensors)


def adopt(wrapper: Any, layer: AdaptedLayer) -> None:
    """Have a wrapper around pooled experts pass its calls on; the pool holds what it would add."""
    if only_files_bring(layer.packed.fmt):
        check_weights(layer.name, layer.packed.fmt, [])
    wrapper.__dict__.update({name: way.__get__(wrapper) for name, way in OVERRIDES.items()})


def _registered(holder: nn.Module, name: str, module: nn.Module | None) -> None:
    """Called for every module that any other one is given: a wrapper around experts is adopted."""
    if module is None:
        return
    experts = tuners.inside(module)
    adapters = experts.__dict__.get("adapters")
    if isinstance(adapters, LayerAdapters):
        adapters.rescan()
        if name == "base_layer" and type(holder).__name__ == "ParamWrapper":
            adopt(holder, adapters.layer)


def _forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    self._check_forward_args(x, *args, **kwargs)
    kwargs.pop("adapter_names", None)
    if self.disable_adapters and self.merged:
        self.unmerge()
    return self.base_layer(x, *args, **kwargs)


def _get_param(self: Any) -> Tensor:
    return _layer_of(self).stand_in(self.parameter_name)


def _merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
    chosen = self.active_adapters if adapter_names is None else adapter_names
    chosen = [a for a in chosen if a in self.lora_A and a not in self.merged_adapters]
    found = [tuners.delta_of(self, adapter) for adapter in chosen]
    if found:
        _change(self, found, safe_merge)
        self.merged_adapters += chosen


def _unmerge(self: Any) -> None:
    if not self.merged:
        warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        return
    present = [adapter for adapter in self.merged_adapters if adapter in self.lora_A]
    found = [tuners.delta_of(self, adapter) for adapter in present]
    _change(self, [delta._replace(scale=-delta.scale) for delta in found])
    self.merged_adapters = []


def _change(wrapper: Any, found: list[Delta], safe: bool = False) -> None:
    layer = _layer_of(wrapper)
    with quiet(layer):
        layer.adapters.change(wrapper.parameter_name, found, safe)


def _layer_of(wrapper: Any) -> Any:
    return tuners.inside(wrapper)


OVERRIDES = {"forward": _forward, "get_param": _get_param, "merge": _merge, "unmerge": _unmerge}
"""Methods of a wrapper that would touch the parameters of its experts."""


# For good: a hook that is taken away while another thread builds a model would end that.
register_module_module_registration_hook(_registered)
