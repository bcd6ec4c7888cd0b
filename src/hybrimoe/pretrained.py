"""From a name to a plan or a wrapped model, and a wrapped model to files that load without packing.

Names are looked for before torch, transformers and most of this package are imported: that takes
seconds, and would be in vain for a name of nothing.
"""

from __future__ import annotations

import dataclasses
import os
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import ConfigError, WrappedModelError
from hybrimoe.hub import PLACE, look_for, named_file

if TYPE_CHECKING:
    from torch import nn

    from hybrimoe.config import Config
    from hybrimoe.memory.text import MemoryPlan
    from hybrimoe.models.adapters import FoundExperts
    from hybrimoe.runtime.disk.open import WeightsOf
    from hybrimoe.session import Runtime
    from hybrimoe.sources.keeping import Keep


def plan(
    model: str | Path | nn.Module,
    vram: int | float | str | None = None,
    ram: int | float | str | None = None,
    weights: str | None = None,
    context: int = 4096,
    revision: str | None = None,
    gguf_file: str | None = None,
) -> MemoryPlan:
    """What a model takes on this machine, from config.json and the headers of its files only.

    model: a folder (`save_packed` may have written it) or a name on the hub, planned for
    `from_pretrained`; or a loaded model, planned for `wrap`.
    vram: for expert slots, as in `Config`; None takes what a GPU has left, if there is one.
    ram: host memory that the whole model may take, not only its experts as in `Config`: bytes,
    "16GiB" or a fraction of what is available; None is all. Where no format fits into it, `call`
    has the `Config.ram` that does, with the other experts on disk.
    weights: "native", "int8" or "int4"; None takes the most precise one that fits.
    context: tokens of prompt and answer together, of one sequence.
    gguf_file: the GGUF file to load, on disk or in the cache; `model` may also be its path. Its
    types say how experts are kept, so `weights` must be None.
    Raises CheckpointNotFoundError, CheckpointError or UnsupportedModelError. A model that does not
    fit is no error until `ensure_fits`.
    """
    if not hasattr(model, "named_modules"):
        _check_path("model", model)
    if gguf_file is None and isinstance(model, str | os.PathLike):
        name, gguf_file = named_file(model, None)
        if gguf_file is None:
            look_for(name, {"revision": revision})
        model = name
    from hybrimoe.memory import plan as memory_plan

    return memory_plan.plan(model, vram, ram, weights, context, revision, gguf_file)


def from_pretrained(
    name_or_path: str | os.PathLike[str],
    config: Config | None = None,
    *,
    keep_packed: Keep = False,
    **hf_kwargs: Any,
) -> Any:
    """Load a transformers checkpoint straight into the pool; returns the model, already wrapped.

    name_or_path: a repository of the hub, a folder, or a folder that `save_packed` wrote.
    keep_packed: keep the packed model beside the cache of the hub, or in the folder of that path, and
    read it from there the next time; one that no longer fits its source is made anew. hf_kwargs:
    fields of `Config`, and whatever `from_pretrained` of transformers takes. Needs the memory of
    the packed experts, the dense weights and less than one layer. Raises CheckpointError or
    CheckpointNotFoundError for files that are damaged or missing, ConfigError or
    UnsupportedModelError for what cannot be loaded this way.
    """
    _check_path("name_or_path", name_or_path)
    place = {key: hf_kwargs[key] for key in PLACE if key in hf_kwargs}
    look_for(os.fspath(name_or_path), place, hf_kwargs.get("gguf_file") or "config.json")
    from hybrimoe.config import Config

    if config is not None and not isinstance(config, Config):
        raise ConfigError(f"config must be a hybrimoe.Config, got {config!r}")
    fields = {field.name for field in dataclasses.fields(Config)}
    ours = {name: hf_kwargs.pop(name) for name in fields & hf_kwargs.keys()}
    from hybrimoe.sources.open import load

    config = (config or Config()).replace(**ours)
    if keep_packed is False:
        return load(name_or_path, config, ours.keys(), hf_kwargs)
    from hybrimoe.sources.keeping import load_kept

    return load_kept(
        name_or_path, config, ours.keys(), hf_kwargs, keep_packed, load=load, save=save_packed
    )


def save_packed(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a wrapped model so that `from_pretrained(folder)` reads it without packing anything.

    The folder gets packed experts and dense layers, the other weights, a manifest with checksums, and
    what the model's own folder or its snapshot in the cache has besides: tokenizer, chat template,
    processors. A save over an older one takes effect in one step: a killed process or a full disk
    leaves the old one whole. Raises WrappedModelError if the model is not wrapped or has adapters,
    UnsupportedModelError if its dense layers are quantized, StorageError if the disk refuses.
    """
    _check_path("folder", folder or None)
    runtime = getattr(model, "hybrimoe", None)
    if runtime is None:
        raise WrappedModelError(
            "save_packed needs a wrapped model; call hybrimoe.wrap(model) first"
        )
    from hybrimoe.models.tuners import own_modules
    from hybrimoe.sources.companions import origin_of
    from hybrimoe.sources.packed.files import Parts, save

    if any(True for _ in own_modules(model)):
        raise WrappedModelError(
            "save_packed writes no adapters; save them by save_pretrained, and the model itself after "
            "merge_and_unload() or unload()"
        )
    from hybrimoe.sources.loader import bytes_bar
    from hybrimoe.sources.quantized import refuse_quantized_dense

    refuse_quantized_dense(model)
    origin = runtime.origin or origin_of(str(getattr(model, "name_or_path", None) or ""))
    parts = Parts(model, runtime.layers, runtime.linears, runtime.config.linear, origin)
    with ExitStack() as shown:
        bars: list[Any] = []

        def progress(nbytes: int) -> None:
            if not bars:  # later than the bar of the dense weights
                bars.append(shown.enter_context(bytes_bar("Writing experts", parts.packed_bytes)))
            bars[0].update(nbytes)

        save(parts, Path(folder), progress)


def _check_path(argument: str, value: Any) -> None:
    """Raise ConfigError for what names nothing on any disk."""
    is_path = isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str)
    if not is_path or "\0" in os.fspath(value):
        raise ConfigError(f"{argument} must be a path or a name, got {value!r}")


def register_quantizer() -> None:
    """Let transformers take a `Config` as its `quantization_config`; again changes nothing."""
    from hybrimoe.sources.loader import register

    register(_start, _finish)


def _start(
    config: Config, model: nn.Module, found: list[FoundExperts], weights_of: WeightsOf | None
) -> Runtime:
    from hybrimoe.session import Runtime

    return Runtime(config, model, found, weights_of)


def _finish(runtime: Runtime, model: nn.Module) -> None:
    from hybrimoe.session import complete

    try:
        for layer in runtime.layers:
            runtime.attach(layer)
        complete(runtime, model)
    except BaseException:
        runtime.abandon()
        raise
