"""A model without weights, from its configuration alone: every shape, no memory."""

from __future__ import annotations

import os
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from hybrimoe.errors import CheckpointNotFoundError, UnsupportedModelError
from hybrimoe.hub import HTTP_ERRORS, first_line
from hybrimoe.models.adapters import find_experts

DTYPES = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float32,
}
"""What transformers makes of a safetensors dtype when nothing names one."""

UNBUILDABLE = (ValueError, TypeError, KeyError, AttributeError, ArithmeticError)
"""What transformers raises for a configuration with values that make no sense."""

PLAIN = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])
"""Operations of transformers' converters that only stack experts."""


def read_config(name: str | os.PathLike[str], **place: Any) -> Any:
    """The configuration of a checkpoint: a local folder, or a repository of the hub.

    place: arguments of transformers' `from_pretrained` that say where files come from.
    """
    from transformers import AutoConfig  # seconds, and only needed here

    try:
        return AutoConfig.from_pretrained(name, **place)
    except HTTP_ERRORS as error:
        raise CheckpointNotFoundError(
            f"no config.json of {os.fspath(name)!r} can be read: {first_line(error)}"
        ) from error
    except UnsupportedModelError:
        raise
    except (*UNBUILDABLE, StrictDataclassError) as error:
        raise UnsupportedModelError(
            f"transformers does not know the model in {os.fspath(name)!r}: {first_line(error)}"
        ) from error


def build_skeleton(config: Any, dtype: torch.dtype, model_class: Any = None) -> nn.Module:
    """The model on the meta device. model_class: None takes the one that `from_pretrained` takes."""
    import transformers

    text = transformers.AutoModelForCausalLM
    if model_class is None and type(config) not in text._model_mapping:
        named = [getattr(transformers, n, None) for n in config.architectures or ()]
        model_class = next((found for found in named if found is not None), None)
    try:
        with torch.device("meta"):
            if model_class is not None:
                model = model_class._from_config(config, dtype=dtype)
            else:
                model = text.from_config(config, dtype=dtype)
    except (*UNBUILDABLE, ImportError, RuntimeError) as error:
        raise UnsupportedModelError(
            f"transformers cannot build {type(config).__name__} as a causal language model: "
            f"{first_line(error)}"
        ) from error
    return model.eval()  # type: ignore[no-any-return]


def weight_dtype(config: Any, stored: dict[str, int]) -> torch.dtype:
    """The dtype that `from_pretrained(dtype="auto")` chooses; stored: bytes by safetensors dtype."""
    text = config.get_text_config()
    for source in (config, text):
        dtype = getattr(source, "dtype", None)
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype.removeprefix("torch."), None)
        if isinstance(dtype, torch.dtype):
            return dtype
    floats = {name: size for name, size in stored.items() if name in DTYPES}
    return DTYPES[max(floats, key=floats.__getitem__)] if floats else torch.float32


def kept_dtypes(model: Any, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Parts of parameter names that `from_pretrained` keeps in another dtype than the rest."""
    return dict(model._get_dtype_plan(dtype))


def packs_on_arrival(model: Any) -> bool:
    """Whether the experts of a checkpoint can be packed a few at a time as they are read.

    So it is where each is stored alone, or all as the model has them; else the loader of transformers
    puts a layer's parameter together first.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    merged = {name for found in find_experts(model) for name, _ in found.module.named_parameters()}
    for conversion in get_model_conversion_mapping(model):
        makes = tuple(target.split(".")[-1] for target in conversion.target_patterns)
        kinds = [type(operation).__name__ for operation in getattr(conversion, "operations", ())]
        if merged.intersection(makes) and kinds and kinds not in PLAIN:
            return False
    return True
