"""A GGUF file into a wrapped model: transformers says what it is, the experts never go through it.

The names and shapes of dense tensors come from the tables of transformers, the configuration from a
config.json beside the file or else from its metadata. Dense tensors are dequantized one by one, when
the loader of transformers asks for them; experts go from the file into the pool.
"""

from __future__ import annotations

import copy
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers.utils.hub import cached_file
from transformers.utils.logging import tqdm

from hybrimoe.config import Config
from hybrimoe.errors import (
    CheckpointError,
    CheckpointNotFoundError,
    ConfigError,
    UnsupportedModelError,
)
from hybrimoe.hub import CLIENT_ERRORS, first_line, reach
from hybrimoe.models.adapters import find_experts
from hybrimoe.models.skeleton import build_skeleton
from hybrimoe.models.weights import choice_of
from hybrimoe.sources.gguf import experts as gguf_experts
from hybrimoe.sources.gguf.dense import LazyTensor, check_types, dense_tensors, dequantize
from hybrimoe.sources.gguf.header import GgufHeader
from hybrimoe.sources.gguf.layout import Layout, Matrices, layout_of
from hybrimoe.sources.gguf.metadata import check_metadata, fields_of
from hybrimoe.sources.gguf.parts import part_names, read_gguf
from hybrimoe.sources.sink import ExpertSink

FAMILIES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
"""Architectures that transformers maps, changing no number on the way: their `model_type`."""
UNREADABLE = (ValueError, StrictDataclassError)
"""What configurations raise for values that they do not take."""
HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


@dataclass(frozen=True)
class GgufSource:
    """A `Config` for experts that lie in a GGUF file; what our loader asks of it."""

    config: Config
    reader: gguf_experts.ExpertsReader
    weights: dict[int, str]

    @property
    def quant_method(self) -> str:
        """The name by which transformers finds our loader."""
        return self.config.quant_method

    @property
    def keeps_files(self) -> bool:
        """All is copied out of the file."""
        return False

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain data, which transformers prints."""
        return self.config.to_dict()

    def weights_of(self, name: str) -> str | None:
        """The format of the experts of that name."""
        return self.weights.get(gguf_experts.block_of(name))

    def prepare(self, model: Any) -> tuple[()]:
        """No dense layers lie there packed as ours are."""
        return ()

    def fill(self, arrivals: ExpertSink) -> None:
        """Read all experts into the pool."""
        total = sum(tensor.nbytes for layer in self.reader.layers.values() for tensor in layer)
        bar = tqdm(total=total, desc="Reading experts", unit="B", unit_scale=True)
        with bar, torch.device("cpu"):  # transformers builds models under the meta device
            self.reader.fill(arrivals, bar.update)

    def settle(self, model: Any) -> None:
        """Nothing was lent to the model."""


class GgufModel(NamedTuple):
    """A file and the model that it will be, of which nothing but the header has been read.

    skeleton: on the meta device, in `dtype`. dense: all that is no expert, by the model's names.
    """

    header: GgufHeader
    layers: dict[int, Matrices]
    config: Any
    skeleton: Any
    dtype: torch.dtype
    dense: dict[str, LazyTensor]


def load_gguf(
    name: str | os.PathLike[str], config: Config, is_format_given: bool, hf_kwargs: dict[str, Any]
) -> Any:
    """What `from_pretrained(name, gguf_file=...)` does, once its other arguments are checked."""
    if is_format_given or config.weights != "native":
        gguf_experts.refuse_format(config.weights)
    hf_kwargs = dict(hf_kwargs)
    _, layers, model_config, skeleton, dtype, dense = open_gguf(name, hf_kwargs)
    weights = gguf_experts.weights_of(layers)
    kept = choice_of(weights.values())
    reader = gguf_experts.ExpertsReader(layers, dequantize)
    source = GgufSource(config.replace(weights=kept), reader, weights)
    ours = {*HUB, "use_safetensors", "variant", "trust_remote_code"}
    kwargs = {key: value for key, value in hf_kwargs.items() if key not in ours}
    model = type(skeleton).from_pretrained(
        None,
        config=model_config,
        state_dict=dense,
        quantization_config=source,
        dtype=dtype,
        **kwargs,
    )
    loaded = model[0] if isinstance(model, tuple) else model
    loaded.config.name_or_path = loaded.name_or_path = os.fspath(name)
    return model


def open_gguf(name: str | os.PathLike[str], hf_kwargs: dict[str, Any]) -> GgufModel:
    """Check a file, and say what model it is; takes what it knows out of `hf_kwargs`.

    Raises ConfigError, CheckpointNotFoundError, CheckpointError or UnsupportedModelError.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ConfigError("gguf_file needs the package gguf: pip install 'hybrimoe[gguf]'")
    path, folder = find_file(name, hf_kwargs.pop("gguf_file"), hf_kwargs)
    header = read_gguf(path, folder)
    family = FAMILIES.get(header.architecture)
    if family is None:
        raise UnsupportedModelError(
            f"{path} holds a model of architecture {header.architecture!r}; experts are read from "
            f"{' and '.join(FAMILIES)}: load others with transformers, then call hybrimoe.wrap"
        )
    layout = layout_of(header)
    check_types(layout)
    config = read_config(path, header, layout, family, hf_kwargs.pop("config", None))
    check_metadata(header, config)
    asked = hf_kwargs.pop("dtype", None) or hf_kwargs.pop("torch_dtype", None) or "auto"
    dtype = dtype_of(asked)
    skeleton = _build(config, dtype, path)
    gguf_experts.check_experts(find_experts(skeleton), layout.experts, path)
    dense = dense_tensors(skeleton, header, layout, names_of(skeleton, header.architecture))
    return GgufModel(header, layout.experts, config, skeleton, dtype, dense)


def find_file(
    name: str | os.PathLike[str], gguf_file: Any, hf_kwargs: dict[str, Any]
) -> tuple[Path, Path]:
    """The file and the folder that it must lie in, fetched from the hub if need be."""
    if not isinstance(gguf_file, str) or not gguf_file.endswith(".gguf"):
        raise ConfigError(f"gguf_file must be the name of a .gguf file, got {gguf_file!r}")
    folder = Path(name)
    if folder.is_dir():
        folder = folder / (hf_kwargs.get("subfolder") or "")
        return folder / gguf_file, folder
    asked = {key: hf_kwargs[key] for key in HUB if key in hf_kwargs}
    place = reach(os.fspath(name), asked, gguf_file)
    try:
        path, *_ = [Path(cached_file(str(name), part, **place)) for part in part_names(gguf_file)]
        # Beside it, so that it is found there; many repositories of GGUF files have none.
        cached_file(str(name), "config.json", _raise_exceptions_for_missing_entries=False, **place)
    except CLIENT_ERRORS as error:
        raise CheckpointNotFoundError(f"{name}: {first_line(error)}") from error
    return path, path.parent


def read_config(
    path: Path, header: GgufHeader, layout: Layout, family: str, given: Any = None
) -> Any:
    """The model's configuration: that given, else config.json beside the file, else its metadata.

    An output matrix in the file is used, whatever a configuration says of tied ones; and the numbers are
    the file's, whatever it says of the quantization of other files.
    """
    if isinstance(given, transformers.PreTrainedConfig):
        config = given
    elif (path.parent / "config.json").is_file():
        config = _read(path.parent, path)
    else:
        fields = fields_of(header, layout, family)
        config = _read(family, path, transformers.AutoConfig.for_model, **fields)
    if config.model_type != family:
        raise CheckpointError(
            f"holds a {family} by its metadata, the configuration is of {config.model_type!r}", path
        )
    config = copy.deepcopy(config)
    if "output.weight" in header.tensors:
        config.tie_word_embeddings = False
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _build(config: Any, dtype: torch.dtype, path: Path) -> Any:
    try:
        return build_skeleton(config, dtype)
    except (*UNREADABLE, ArithmeticError, RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"describes a model that cannot be built: {first_line(error.__cause__ or error)}", path
        ) from error


def _read(
    name: Any, path: Path, read: Any = transformers.AutoConfig.from_pretrained, **fields: Any
) -> Any:
    """What `read` makes of a folder, or of a kind of model and its fields."""
    try:
        return read(name, **fields)
    except OSError as error:
        raise CheckpointNotFoundError(f"{name}: {first_line(error)}") from error
    except (*UNREADABLE, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"has metadata that transformers cannot read: {type(error).__name__} "
            f"{first_line(error.__cause__ or error)}",
            path,
        ) from error


def dtype_of(asked: Any) -> torch.dtype:
    """The dtype of the dense weights: float32 unless another is asked for, as transformers has it."""
    if asked == "auto":
        return torch.float32
    dtype = getattr(torch, asked.removeprefix("torch."), None) if isinstance(asked, str) else asked
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype must be a torch.dtype or the name of one, got {asked!r}")
    return dtype


def names_of(skeleton: Any, architecture: str) -> dict[str, str]:
    """The model's names of tensors by those of the file."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(
        config=skeleton.config.to_dict()
    )
    names: dict[str, str] = get_gguf_hf_weights_map(skeleton, processor)
    return names
