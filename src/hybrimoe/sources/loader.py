"""A checkpoint straight into the pool, through the loader of transformers.

transformers reads a checkpoint parameter by parameter and lets a quantizer add weight converters.
Ours take the experts' parameters away from the loader and pack them on arrival; all else (renaming,
tying, sharding over files, the dense weights, progress) stays what `from_pretrained` does. So every
family loads here that loads there.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.logging import tqdm

from hybrimoe.choices import METHOD
from hybrimoe.config import Config
from hybrimoe.errors import CheckpointError, ConfigError, UnsupportedModelError
from hybrimoe.models import weights as formats
from hybrimoe.models.adapters import FoundExperts, find_experts
from hybrimoe.modules.pooled_experts import PooledExperts
from hybrimoe.runtime.disk.open import WeightsOf
from hybrimoe.sources.converters import PackingConverter
from hybrimoe.sources.load_memory import copy_mapped_tensors, ensure_fits
from hybrimoe.sources.missing import Missing
from hybrimoe.sources.packed.folder import PackedFolder
from hybrimoe.sources.packed.linears import StoredLinear
from hybrimoe.sources.packed.source import PackedConfig, check_dtype, open_packed
from hybrimoe.sources.quantized import refuse_declared
from hybrimoe.sources.safetensors import Reader, dtypes_in, examine_files
from hybrimoe.sources.sink import ExpertSink
from hybrimoe.sources.stored_numbers import ensure_plain


class Session(Protocol):
    """The part of a `Runtime` that loading fills."""

    layers: list[PooledExperts]

    def make_room(self) -> None:
        """Reserve the disk space of experts that do not stay in RAM."""

    def pack(self, experts: FoundExperts, weights: str | None = None) -> PooledExperts:
        """Add a layer to the pool; one on the meta device gets memory that is still to be filled.

        weights: a format of its own, where it has one.
        """

    def adopt(self, stored: Sequence[StoredLinear]) -> None:
        """Put dense layers into their places that were read packed."""


class Source(Protocol):
    """A `Config` for experts that do not come through the loader of transformers."""

    @property
    def config(self) -> Config:
        """How the model is to be wrapped."""

    @property
    def keeps_files(self) -> bool:
        """Whether the disk tier, or a map, goes on using the files that were read."""

    def weights_of(self, name: str) -> str | None:
        """The format of the experts of that name; None if there are none."""

    def prepare(self, model: Any) -> Sequence[StoredLinear]:
        """Dense layers of a model on the meta device that do not come through the loader either."""

    def fill(self, arrivals: ExpertSink) -> None:
        """Read all experts into the pool."""

    def settle(self, model: Any) -> None:
        """Take back from the loaded model what only the loading needed."""


Start = Callable[[Config, nn.Module, list[FoundExperts], WeightsOf | None], Session]
Finish = Callable[[Any, nn.Module], None]


def register(start: Start, finish: Finish) -> None:
    """Make transformers know `quantization_config=hybrimoe.Config(...)`; again changes nothing.

    Takes the place of what `import hybrimoe` put there to wait for it.

    start: makes the runtime of a model without weights, given its experts and the formats that files
    prescribe, if any. finish: completes it when all are there.
    """
    if not isinstance(AUTO_QUANTIZER_MAPPING.get(METHOD), type):
        faces = {"start": staticmethod(start), "finish": staticmethod(finish)}
        AUTO_QUANTIZER_MAPPING[METHOD] = type("HybriMoEQuantizer", (Quantizer,), faces)


def refuse_checkpoint(config: Any) -> None:
    """Raise UnsupportedModelError if a model's configuration declares a quantization of its files.

    transformers would import the package of the method, complain that two configurations are of
    different classes, or for a method it does not know go on as if nothing had been declared.
    """
    name = str(getattr(config, "name_or_path", None) or "")
    refuse_declared(name, config, dtypes_in(Path(name)) if name else None)


class Quantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers asks while it loads a model for us. One per load."""

    start: Start
    finish: Finish
    requires_calibration = False

    def __init__(self, quantization_config: Config | Source | PackedFolder, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.packed: Source | None = None
        if isinstance(quantization_config, PackedFolder):
            self.config = quantization_config.given or Config()
            if not self.pre_quantized:  # a user's dict, for any checkpoint
                self.config = Config.from_dict(quantization_config.settings())
        elif isinstance(quantization_config, Config):
            self.config = quantization_config
        else:
            self.packed, self.config = quantization_config, quantization_config.config
        self.session: Session | None = None
        self.arrivals: ExpertSink | None = None
        self.reader: Reader | None = None
        self.missing: Missing | None = None
        self.linears: Sequence[StoredLinear] = ()
        self.model: Any = None
        self.shapes: dict[str, torch.Size] = {}

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:
        """Refuse what would take weights to where the pool is not."""
        check_device_map(device_map)

    def update_device_map(self, device_map: Any) -> Any:
        """ "auto" leaves the placing to hybrimoe: all is loaded to the CPU."""
        return None if is_automatic(device_map) else device_map

    def update_tp_plan(self, config: Any) -> Any:
        """Called before the files are looked for, by transformers up to some version."""
        return self._open_folder(config)

    def update_ep_plan(self, config: Any) -> Any:
        """Called at the same time."""
        return self._open_folder(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """Called at the same time, by later versions."""
        return self._open_folder(config)

    def _open_folder(self, config: Any) -> Any:
        """Where transformers loads a packed folder, have it read the dense weights and no others."""
        folder = self.quantization_config
        if self.pre_quantized and self.packed is None and isinstance(folder, PackedFolder):
            path, manifest = folder.find(str(config.name_or_path or ""))
            self.packed = open_packed(path, manifest, self.config, bytes_bar)
            self.packed.lend(config, f"{manifest['folder']}/")
            self.config = self.packed.config
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Refuse a dtype that experts cannot have, or that packed ones do not have."""
        if isinstance(self.packed, PackedConfig):
            check_dtype(dtype, self.packed.dtype, self.packed.folder.parent)
        formats.format_of(self.config.weights, dtype)
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        if getattr(model.config, "distributed_config", None) is not None:
            raise UnsupportedModelError("a model spread over processes cannot be loaded packed")
        if checkpoint_files:
            catalogue = examine_files(checkpoint_files, folder_of(model, checkpoint_files))
            ensure_plain(model, catalogue)
            self.reader = Reader(catalogue) if self.packed is None else None
        self.model, self.missing = model, Missing(model)
        self.linears = () if self.packed is None else self.packed.prepare(model)
        self.shapes = {name: p.shape for name, p in model.named_parameters()}
        with torch.device("cpu"):  # transformers builds models under the meta device
            found = find_experts(model)
            stored = len(self.reader.catalogue) if self.reader is not None else 0
            kept = None if self.packed is None else self.packed.weights_of
            budget = self.config.weights, self.config.ram
            beside = sum(linear.blob.nbytes for linear in self.linears)
            ensure_fits(model, *budget, checkpoint_files or (), stored, kept, beside, found)
            self.session = self.start(self.config, model, found, kept)
            if self.packed is None or not self.packed.keeps_files:
                self.session.make_room()
            for experts in found:
                self.session.pack(experts, None if kept is None else kept(experts.name))
        self.arrivals = ExpertSink(self.session.layers)
        if self.packed is not None:
            self.packed.fill(self.arrivals)
            self.arrivals.skip_in_loader()

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Converters for all that may hold experts.

        transformers asks its own first whether they match a name, but takes the last one given for
        the pattern that did: so its own stay on the model, for saving it.
        """
        if self.packed is not None:
            return []
        promised: set[str] = set()
        share = (self.arrivals, self.reader, promised)
        known = get_model_conversion_mapping(self.model)
        known = [converter for converter in known if isinstance(converter, WeightConverter)]
        self._check_stored_shapes(known)
        ours = [
            PackingConverter.instead_of(converter, *share)
            for converter in known
            if self._may_hold_experts(converter)
        ]
        return ours + [PackingConverter.of_merged(tail, *share) for tail in self._tails()]

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """All converters; what a `key_mapping` of the user's renames is looked at now."""
        if self.reader is not None:
            ensure_plain(model, self.reader.catalogue, weight_conversions)
        return super().update_weight_conversions(weight_conversions, model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        assert self.arrivals is not None
        self.arrivals.finish()
        self._check_shapes(model)
        assert self.missing is not None
        self.missing.check(may_add_head=not self.is_own)
        if self.packed is not None:
            self.packed.settle(model)
        if self.packed is None or self.packed.keeps_files:
            copy_mapped_tensors(model)
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [
            conversion for conversion in conversions if not isinstance(conversion, PackingConverter)
        ]
        self.remove_quantization_config(model)
        for module in model.modules():
            if hasattr(module, "config") and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized
        session, reader = self.session, self.reader
        assert session is not None
        session.adopt(self.linears)
        self.session = self.arrivals = self.reader = self.model = self.missing = None
        self.linears = ()
        if reader is not None:
            reader.close()
        self.finish(session, model)

    @property
    def is_own(self) -> bool:
        """Whether the class of the model was our choice, so that a head is never meant to be new."""
        return self.packed is not None and self.packed is self.quantization_config

    def is_serializable(self) -> bool:
        """A wrapped model saves the weights as the checkpoint has them."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Experts have no gradients."""
        return False

    def _may_hold_experts(self, converter: WeightConverter) -> bool:
        assert self.arrivals is not None
        names = {target.name for target in self.arrivals.targets.values()}
        return any(pattern.endswith(tuple(names)) for pattern in converter.target_patterns)

    def _tails(self) -> list[str]:
        """The experts' parameters without the number of the layer: one pattern for all layers."""
        assert self.arrivals is not None
        return sorted({re.split(r"\.\d+\.", name)[-1] for name in self.arrivals.targets})

    def _check_stored_shapes(self, known: list[WeightConverter]) -> None:
        """Raise for a tensor that goes into a parameter as it is and has another shape."""
        stored = self.reader.catalogue if self.reader is not None else {}
        for name in stored.keys() & self.shapes.keys():
            is_converted = any(converter.compiled_sources.search(name) for converter in known)
            if not is_converted and stored[name].shape != self.shapes[name]:
                raise CheckpointError(
                    f"must have the shape {tuple(self.shapes[name])} by the model's configuration, "
                    f"got {stored[name].shape}",
                    stored[name].path,
                    name,
                )

    def _check_shapes(self, model: Any) -> None:
        """transformers 5.7 sets parameters of any shape if there is a quantizer."""
        for name, parameter in model.named_parameters():
            wanted = self.shapes.get(name)
            packed = name in self.arrivals.targets  # type: ignore[union-attr]
            if wanted is not None and parameter.shape != wanted and not packed:
                raise CheckpointError(
                    f"must have the shape {tuple(wanted)} by the model's configuration, got "
                    f"{tuple(parameter.shape)}",
                    tensor=name,
                )


def bytes_bar(what: str, total: int) -> Any:
    """A progress bar that `transformers.utils.logging` turns off and on."""
    return tqdm(total=total, desc=what, unit="B", unit_scale=True)


def is_automatic(device_map: Any) -> bool:
    """Whether a device_map leaves the placing to hybrimoe."""
    return isinstance(device_map, str) and device_map == "auto"


def check_device_map(device_map: Any) -> None:
    """Raise ConfigError unless everything is loaded to the CPU, or left to us."""
    places = device_map.values() if isinstance(device_map, dict) else [device_map]
    if device_map != {} and (
        is_automatic(device_map) or all(place is None or str(place) == "cpu" for place in places)
    ):
        return
    raise ConfigError(
        f"device_map must be left out, 'auto' or 'cpu', got {device_map!r}: hybrimoe places the "
        "experts, and hybrimoe.Config(device=...) says where the dense part computes"
    )


def folder_of(model: Any, files: list[str]) -> Path:
    """The folder that a checkpoint's files must lie in."""
    name = Path(str(model.config.name_or_path or ""))
    return name if name.is_dir() else Path(files[0]).parent
