"""What a name means, and whether it can be loaded, before a loader touches any of its weights."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from transformers.utils.hub import cached_file

from hybrimoe.config import Config
from hybrimoe.errors import CheckpointError, CheckpointNotFoundError, ConfigError, HybriMoEError
from hybrimoe.hub import CLIENT_ERRORS, PLACE, cached_folder, first_line, reach
from hybrimoe.models.skeleton import UNBUILDABLE, build_skeleton, read_config, weight_dtype
from hybrimoe.sources.companions import origin_of
from hybrimoe.sources.load_memory import ensure_fits
from hybrimoe.sources.loader import bytes_bar, check_device_map, is_automatic
from hybrimoe.sources.missing import refuse_missing
from hybrimoe.sources.packed.folder import PackedFolder, is_packed
from hybrimoe.sources.packed.manifest import read_manifest
from hybrimoe.sources.packed.source import check_dtype, open_packed
from hybrimoe.sources.quantized import refuse_declared
from hybrimoe.sources.safetensors import CONVERT, INDEX, dtypes_in, examine_folder, read_index

REFUSED = {
    "quantization_config": "hybrimoe's own is given by config=",
    "state_dict": "build the model with it, then call hybrimoe.wrap",
    "tp_plan": "a model spread over processes cannot be loaded packed",
    "tp_size": "a model spread over processes cannot be loaded packed",
    "distributed_config": "a model spread over processes cannot be loaded packed",
    "device_mesh": "a model spread over processes cannot be loaded packed",
    "ignore_mismatched_sizes": "weights of other shapes belong to another model",
    "max_memory": "vram= and ram= say how much experts may take",
    "offload_folder": "spill= names the folder of experts beyond ram=",
}
"""Arguments of transformers' from_pretrained that mean something else here, and what to do."""


def load(
    name: str | os.PathLike[str],
    config: Config,
    given: Collection[str],
    hf_kwargs: dict[str, Any],
) -> Any:
    """What `hybrimoe.from_pretrained` does.

    given: the fields of `config` that were asked for by name; packed files decide the others.
    """
    for argument, advice in REFUSED.items():
        if hf_kwargs.get(argument):
            raise ConfigError(f"{argument} cannot be given to hybrimoe.from_pretrained: {advice}")
    if hf_kwargs.get("use_safetensors") is False:
        raise CheckpointError(f"use_safetensors=False asks for pickles: {CONVERT}")
    for argument in ("dtype", "torch_dtype"):
        check_dtype_name(argument, hf_kwargs.get(argument))
    check_device_map(hf_kwargs.get("device_map"))
    if is_automatic(hf_kwargs.get("device_map")):
        hf_kwargs = {key: value for key, value in hf_kwargs.items() if key != "device_map"}
    if hf_kwargs.get("gguf_file") is not None:
        from hybrimoe.sources.gguf.model import load_gguf  # an extra

        return load_gguf(name, config, "weights" in given, hf_kwargs)
    folder = Path(name)
    if os.path.isdir(folder):
        folder = inside(folder, hf_kwargs.get("subfolder"))
        manifest = read_manifest(folder)
        while manifest is not None:
            try:
                return load_packed(folder, manifest, config, given, hf_kwargs)
            except (CheckpointError, CheckpointNotFoundError):
                newer = read_manifest(folder)  # a save may have taken the old files away
                if newer == manifest:
                    raise
                manifest = newer
        examine_folder(folder, hf_kwargs.get("variant"))
    else:
        hf_kwargs = examine_remote(os.fspath(name), hf_kwargs)
        fetched = fetch_packed(os.fspath(name), hf_kwargs)
        if fetched is not None:
            kwargs = {key: value for key, value in hf_kwargs.items() if key not in PLACE}
            return load(fetched, config, given, kwargs)
    hf_kwargs = {**hf_kwargs, "use_safetensors": True}
    model_class, model_config = class_of(name, hf_kwargs)
    if not folder.is_dir():
        if not hf_kwargs.get("trust_remote_code"):
            ensure_remote_fits(os.fspath(name), config, hf_kwargs)
        examine_cached(os.fspath(name), hf_kwargs)
    told = {**hf_kwargs, "quantization_config": config, "output_loading_info": True}
    try:
        model, found = model_class.from_pretrained(name, **told)
    except UNBUILDABLE as error:
        if not isinstance(error, HybriMoEError):
            explain_unbuildable(model_config)
        raise
    refuse_missing(found["missing_keys"])  # the class was our choice: not even a head may be new
    model.hybrimoe.origin = origin_of(os.fspath(name), hf_kwargs)
    return (model, found) if hf_kwargs.get("output_loading_info") else model


def inside(folder: Path, subfolder: Any) -> Path:
    """A folder of a folder that exists; raises ConfigError or CheckpointNotFoundError."""
    if not isinstance(subfolder, str | None):
        raise ConfigError(f"subfolder must be the name of a folder, got {subfolder!r}")
    found = folder / (subfolder or "")
    if not found.is_dir():
        raise CheckpointNotFoundError(f"no folder {str(found)!r}: subfolder={subfolder!r}")
    return found


def explain_unbuildable(model_config: Any) -> None:
    """Raise UnsupportedModelError if it is the configuration that transformers cannot load."""
    build_skeleton(model_config, torch.float32)


def check_dtype_name(argument: str, asked: Any) -> None:
    """Raise ConfigError for what is no dtype, nor the name of one that torch has.

    A dict has one for each part of a model.
    """
    if asked is None or isinstance(asked, torch.dtype | dict) or asked == "auto":
        return
    if not isinstance(asked, str) or not isinstance(getattr(torch, asked, None), torch.dtype):
        raise ConfigError(f"{argument} must name a dtype of torch or 'auto', got {asked!r}")


def load_packed(
    folder: Path,
    manifest: dict[str, Any],
    config: Config,
    given: Collection[str],
    hf_kwargs: dict[str, Any],
) -> Any:
    """Load what `save_packed` wrote: the dense weights by transformers, all else by ourselves."""
    packed = open_packed(folder, manifest, config, bytes_bar, given)
    check_dtype(hf_kwargs.get("dtype") or hf_kwargs.get("torch_dtype"), packed.dtype, folder)
    ours = {"dtype", "torch_dtype", "subfolder", "variant", "use_safetensors", "revision"}
    hf_kwargs = {key: value for key, value in hf_kwargs.items() if key not in ours}
    model_class, model_config = class_of(packed.folder, hf_kwargs)
    packed.lend(model_config)
    given_config = {"config": model_config, "quantization_config": packed, "dtype": packed.dtype}
    return model_class.from_pretrained(packed.folder, **given_config, **hf_kwargs)


def examine_remote(name: str, hf_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Check that a repository can be had, and its index, before the files that it names are fetched.

    Returns `hf_kwargs`, with `local_files_only` where only the cache can give it.
    """
    place = reach(name, {key: hf_kwargs[key] for key in PLACE if key in hf_kwargs})
    try:
        index = cached_file(name, INDEX, _raise_exceptions_for_missing_entries=False, **place)
    except CLIENT_ERRORS as error:
        raise CheckpointNotFoundError(f"{name}: {first_line(error)}") from error
    if index is not None:
        read_index(Path(index), Path(index).parent)
    if not place.get("local_files_only"):
        return hf_kwargs
    # The automatic classes look for adapters of PEFT by arguments of their own.
    adapters = {"local_files_only": True, **(hf_kwargs.get("adapter_kwargs") or {})}
    return hf_kwargs | place | {"adapter_kwargs": adapters}


def examine_cached(name: str, hf_kwargs: dict[str, Any]) -> None:
    """Where only the cache can give a repository, check that all of its files are there."""
    folder = cached_folder(name, {key: hf_kwargs[key] for key in PLACE if key in hf_kwargs})
    if hf_kwargs.get("local_files_only") and folder is not None:
        examine_folder(folder, hf_kwargs.get("variant"))


def revision_of(name: str, file: str, place: dict[str, Any]) -> str | None:
    """The commit of a repository that a file of it comes from now; None for what is no repository."""
    path = cached_file(name, file, **place)
    parts = Path(path).parts if path is not None else ()
    return parts[parts.index("snapshots") + 1] if "snapshots" in parts else None


def fetch_packed(name: str, hf_kwargs: dict[str, Any]) -> Path | None:
    """The snapshot of a repository that holds a packed folder, fetched if need be; else None."""
    place = {key: hf_kwargs[key] for key in PLACE if key in hf_kwargs}
    config = hf_kwargs.get("config") or read_config(
        name, **place, trust_remote_code=hf_kwargs.get("trust_remote_code")
    )
    if not is_packed(getattr(config, "quantization_config", None)):
        return None
    where = {key: value for key, value in place.items() if key not in ("subfolder", "proxies")}
    try:
        return Path(snapshot_download(name, **where)) / (place.get("subfolder") or "")
    except CLIENT_ERRORS as error:
        raise CheckpointNotFoundError(f"{name}: {first_line(error)}") from error


def ensure_remote_fits(name: str, config: Config, hf_kwargs: dict[str, Any]) -> None:
    """Raise InsufficientMemoryError before the weights of a repository are fetched."""
    model_config = hf_kwargs.get("config")
    if model_config is None:
        model_config, _ = transformers.AutoConfig.from_pretrained(
            name, return_unused_kwargs=True, **hf_kwargs
        )
    asked = hf_kwargs.get("dtype") or hf_kwargs.get("torch_dtype") or "auto"
    if asked == "auto":
        asked = weight_dtype(model_config, {})
    dtype = getattr(torch, asked) if isinstance(asked, str) else asked
    ensure_fits(build_skeleton(model_config, dtype), config.weights, config.ram)


def class_of(name: str | os.PathLike[str], hf_kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The class that loads a checkpoint (for text if there is one, else the one that config.json
    names), and the configuration."""
    place = {key: hf_kwargs[key] for key in (*PLACE, "trust_remote_code") if key in hf_kwargs}
    config = read_config(name, **place)
    if is_packed(getattr(config, "quantization_config", None)):
        PackedFolder({}).find(os.fspath(name))
    folder = Path(name) / (hf_kwargs.get("subfolder") or "")
    refuse_declared(os.fspath(name), config, dtypes_in(folder, hf_kwargs.get("variant")))
    text = transformers.AutoModelForCausalLM
    if type(config) in text._model_mapping or "auto_map" in config.to_dict():
        return text, config
    for architecture in config.architectures or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture), config
    return text, config
