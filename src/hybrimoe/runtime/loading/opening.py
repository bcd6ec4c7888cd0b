"""What a name means, and whether it can be loaded, before a loader touches any of its weights."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.utils.hub import cached_file

from hybrimoe.config import Config
from hybrimoe.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    UnsupportedModelError,
)
from hybrimoe.runtime.formats import choice_of
from hybrimoe.runtime.loading.checkpoints import CONVERT, INDEX, examine_folder, read_index
from hybrimoe.runtime.loading.hub import CLIENT_ERRORS, PLACE, cached_folder, first_line, reach
from hybrimoe.runtime.loading.load_memory import ensure_fits
from hybrimoe.runtime.loading.packed_files import DENSE, check_dense, read_manifest
from hybrimoe.runtime.loading.quantizer import PackedConfig, check_device_map
from hybrimoe.runtime.loading.skeleton import build_skeleton, read_config, weight_dtype

REFUSED = {
    "quantization_config": "hybrimoe's own is given by config=",
    "state_dict": "build the model with it, then call hybrimoe.wrap",
    "tp_plan": "a model spread over processes cannot be loaded packed",
    "tp_size": "a model spread over processes cannot be loaded packed",
    "distributed_config": "a model spread over processes cannot be loaded packed",
    "device_mesh": "a model spread over processes cannot be loaded packed",
    "ignore_mismatched_sizes": "weights of other shapes belong to another model",
}
"""Arguments of transformers' from_pretrained that mean something else here, and what to do."""


def load(
    name: str | os.PathLike[str], config: Config, is_format_given: bool, hf_kwargs: dict[str, Any]
) -> Any:
    """What `hybrimoe.from_pretrained` does.

    is_format_given: whether `weights` was asked for by name; else packed files decide it.
    """
    for argument, advice in REFUSED.items():
        if hf_kwargs.get(argument):
            raise ConfigError(f"{argument} cannot be given to hybrimoe.from_pretrained: {advice}")
    if hf_kwargs.get("use_safetensors") is False:
        raise CheckpointError(f"use_safetensors=False asks for pickles: {CONVERT}")
    check_device_map(hf_kwargs.get("device_map"))
    if hf_kwargs.get("gguf_file") is not None:
        from hybrimoe.runtime.loading.gguf_file import load_gguf  # an extra

        return load_gguf(name, config, is_format_given, hf_kwargs)
    folder = Path(name)
    if folder.is_dir():
        folder = folder / (hf_kwargs.get("subfolder") or "")
        manifest = read_manifest(folder)
        while manifest is not None:
            try:
                return load_packed(folder, manifest, config, is_format_given, hf_kwargs)
            except (CheckpointError, CheckpointNotFoundError):
                newer = read_manifest(folder)  # a save may have taken the old files away
                if newer == manifest:
                    raise
                manifest = newer
        examine_folder(folder, hf_kwargs.get("variant"))
    else:
        hf_kwargs = examine_remote(os.fspath(name), hf_kwargs)
    hf_kwargs = {**hf_kwargs, "use_safetensors": True}
    model_class, _ = class_of(name, hf_kwargs)
    if not folder.is_dir() and not hf_kwargs.get("trust_remote_code"):
        ensure_remote_fits(str(name), config, hf_kwargs)
    return model_class.from_pretrained(name, quantization_config=config, **hf_kwargs)


def load_packed(
    folder: Path,
    manifest: dict[str, Any],
    config: Config,
    is_format_given: bool,
    hf_kwargs: dict[str, Any],
) -> Any:
    """Load what `save_packed` wrote: the dense weights by transformers, the experts by ourselves."""
    dtype = manifest["layers"][0]["dtype"]
    stored = choice_of(layer["weights"] for layer in manifest["layers"])
    if (is_format_given or config.weights != "native") and config.weights != stored:
        raise ConfigError(
            f"weights must be {stored!r}, which the experts in {folder} were packed as, got "
            f"{config.weights!r}; load the original checkpoint to pack them again"
        )
    asked = hf_kwargs.get("dtype") or hf_kwargs.get("torch_dtype") or "auto"
    if asked != "auto" and str(asked).removeprefix("torch.") != dtype:
        raise ConfigError(f"dtype must be {dtype}, which {folder} was saved in, got {asked}")
    part = folder / manifest["folder"]
    check_dense(part, manifest)
    ours = {"dtype", "torch_dtype", "subfolder", "variant", "use_safetensors"}
    hf_kwargs = {key: value for key, value in hf_kwargs.items() if key not in ours}
    model_class, model_config = class_of(part, hf_kwargs)
    model_config.transformers_weights = DENSE
    packed = PackedConfig(config.replace(weights=stored), manifest, part)
    return model_class.from_pretrained(
        part, config=model_config, quantization_config=packed, dtype=dtype, **hf_kwargs
    )


def examine_remote(name: str, hf_kwargs: dict[str, Any]) -> dict[str, Any]:
    """Check that a repository can be had, and its index, before the files that it names are fetched.

    Returns `hf_kwargs`, with `local_files_only` where only the cache can give it.
    """
    place = reach(name, {key: hf_kwargs[key] for key in PLACE if key in hf_kwargs})
    folder = cached_folder(name, place)
    if place.get("local_files_only") and folder is not None:
        examine_folder(folder, hf_kwargs.get("variant"))
        # The automatic classes look for adapters of PEFT by arguments of their own.
        adapters = {"local_files_only": True, **(hf_kwargs.get("adapter_kwargs") or {})}
        return hf_kwargs | place | {"adapter_kwargs": adapters}
    try:
        index = cached_file(name, INDEX, _raise_exceptions_for_missing_entries=False, **place)
    except CLIENT_ERRORS as error:
        raise CheckpointNotFoundError(f"{name}: {first_line(error)}") from error
    if index is not None:
        read_index(Path(index), Path(index).parent)
    return hf_kwargs


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
    method = (getattr(config, "quantization_config", None) or {}).get("quant_method")
    if method is not None:
        raise UnsupportedModelError(
            f"{os.fspath(name)!r} is quantized by {method}; let transformers load it dequantized, such "
            "as with quantization_config=Mxfp4Config(dequantize=True), and call hybrimoe.wrap"
        )
    text = transformers.AutoModelForCausalLM
    if type(config) in text._model_mapping or "auto_map" in config.to_dict():
        return text, config
    for architecture in config.architectures or ():
        if hasattr(transformers, architecture):
            return getattr(transformers, architecture), config
    return text, config
