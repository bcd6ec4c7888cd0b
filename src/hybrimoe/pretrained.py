"""From a name to a wrapped model, and a wrapped model to files that load without packing."""

from __future__ import annotations

import dataclasses
import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from torch import nn

from hybrimoe.api import Runtime, complete
from hybrimoe.config import Config
from hybrimoe.errors import ConfigError, WrappedModelError
from hybrimoe.keeping import Keep, load_kept
from hybrimoe.runtime.loading.companions import origin_of
from hybrimoe.runtime.loading.packed_files import Parts, save
from hybrimoe.runtime.storage.tiers import WeightsOf
from hybrimoe.runtime.tuners import own_modules


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
    if config is not None and not isinstance(config, Config):
        raise ConfigError(f"config must be a hybrimoe.Config, got {config!r}")
    fields = {field.name for field in dataclasses.fields(Config)}
    ours = {name: hf_kwargs.pop(name) for name in fields & hf_kwargs.keys()}
    # Half of transformers comes with it, too much for `import hybrimoe`.
    from hybrimoe.runtime.loading.opening import load

    config = (config or Config()).replace(**ours)
    if keep_packed is False:
        return load(name_or_path, config, ours.keys(), hf_kwargs)
    return load_kept(
        name_or_path, config, ours.keys(), hf_kwargs, keep_packed, load=load, save=save_packed
    )


def save_packed(model: nn.Module, folder: str | os.PathLike[str]) -> None:
    """Write a wrapped model so that `from_pretrained(folder)` reads it without packing anything.

    The folder gets packed experts and dense layers, the other weights, a manifest with checksums, and
    what the model's own folder or its snapshot in the cache has besides: tokenizer, chat template,
    processors. A save over an older one takes effect in one step: a killed process or a full disk
    leaves the old one whole. Raises WrappedModelError if the model is not wrapped or has adapters,
    StorageError if the disk refuses.
    """
    runtime = getattr(model, "hybrimoe", None)
    if runtime is None:
        raise WrappedModelError(
            "save_packed needs a wrapped model; call hybrimoe.wrap(model) first"
        )
    if any(True for _ in own_modules(model)):
        raise WrappedModelError(
            "save_packed writes no adapters; save them by save_pretrained, and the model itself after "
            "merge_and_unload() or unload()"
        )
    from hybrimoe.runtime.loading.quantizer import bytes_bar

    origin = runtime.origin or origin_of(str(getattr(model, "name_or_path", None) or ""))
    parts = Parts(model, runtime.layers, runtime.linears, runtime.config.linear, origin)
    with ExitStack() as shown:
        bars: list[Any] = []

        def progress(nbytes: int) -> None:
            if not bars:  # later than the bar of the dense weights
                bars.append(shown.enter_context(bytes_bar("Writing experts", parts.packed_bytes)))
            bars[0].update(nbytes)

        save(parts, Path(folder), progress)


def make_known() -> None:
    """Let transformers take a `Config` as its `quantization_config`; again changes nothing."""
    from hybrimoe.runtime.loading.quantizer import register

    register(_start, _finish)


def _start(config: Config, model: nn.Module, weights_of: WeightsOf | None) -> Runtime:
    return Runtime(config, model, weights_of)


def _finish(runtime: Runtime, model: nn.Module) -> None:
    for layer in runtime.layers:
        layer.install()
    try:
        complete(runtime, model)
    except BaseException:
        runtime.detach()
        if runtime.hybrid is not None:
            runtime.hybrid.close()
        runtime.close()
        raise
