"""A GGUF file into a wrapped model: transformers says what it is, the experts never go through it.

The names and shapes of dense tensors come from the tables of transformers, as does the configuration
unless a config.json lies beside the file. Dense tensors are dequantized one by one, when the loader
of transformers asks for them; experts go from the file into the pool.
"""

from __future__ import annotations

import importlib.util
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
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
from hybrimoe.runtime.formats import choice_of
from hybrimoe.runtime.loading import gguf_experts
from hybrimoe.runtime.loading.arrivals import STAGING_BYTES, Arrivals
from hybrimoe.runtime.loading.gguf_check import ArrayLength, GgufHeader, GgufTensor, read_gguf
from hybrimoe.runtime.loading.hub import CLIENT_ERRORS, first_line, reach
from hybrimoe.runtime.loading.reading import read_at
from hybrimoe.runtime.loading.skeleton import build_skeleton

FAMILIES = {"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}
"""Architectures that transformers maps, changing no number on the way: their `model_type`."""
SMALL = 1 << 22
"""Numbers of a dense tensor that may be in memory twice."""
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

    def fill(self, arrivals: Arrivals) -> None:
        """Read all experts into the pool."""
        gguf_experts.check_experts(arrivals.layers)
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
    layers: dict[int, gguf_experts.Matrices]
    config: Any
    skeleton: Any
    dtype: torch.dtype
    dense: dict[str, LazyTensor]


class LazyTensor:
    """A dense tensor that is read and dequantized when the loader of transformers slices it.

    parameter: what it becomes. A large one takes its dtype piece by piece, so that it never is in
    memory twice; a small one leaves that to the loader.
    """

    def __init__(self, path: Path, name: str, tensor: GgufTensor, parameter: torch.Tensor) -> None:
        self.path, self.name, self.tensor = path, name, tensor
        self.shape = parameter.shape
        self.dtype = parameter.dtype if parameter.numel() > SMALL else torch.float32

    def __getitem__(self, _: Any) -> torch.Tensor:
        columns = self.tensor.shape[-1]
        out = torch.empty(self.shape.numel() // columns, columns, dtype=self.dtype)
        each = self.tensor.nbytes // len(out)
        chunk = max(1, STAGING_BYTES // (4 * columns))
        with self.path.open("rb", buffering=0) as file:
            for first in range(0, len(out), chunk):
                rows = out[first : first + chunk]
                raw = np.empty((len(rows), each), np.uint8)
                at = self.tensor.offset + first * each
                if read_at(file.fileno(), raw.reshape(-1), at) < raw.nbytes:
                    raise CheckpointError(
                        "ended early: it has become shorter", self.path, self.name
                    )
                rows.copy_(torch.from_numpy(dequantize(raw, self.tensor.kind)))
        return out.view(self.shape)


def load_gguf(
    name: str | os.PathLike[str], config: Config, is_format_given: bool, hf_kwargs: dict[str, Any]
) -> Any:
    """What `from_pretrained(name, gguf_file=...)` does, once its other arguments are checked."""
    if is_format_given or config.weights != "native":
        gguf_experts.refuse_format(config.weights)
    hf_kwargs = dict(hf_kwargs)
    header, layers, model_config, skeleton, dtype, dense = open_gguf(name, hf_kwargs)
    weights = gguf_experts.weights_of(layers)
    kept = choice_of(weights.values())
    reader = gguf_experts.ExpertsReader(header, layers, dequantize)
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
            f"{', '.join(FAMILIES)}: load others with transformers, then call hybrimoe.wrap"
        )
    layers = gguf_experts.layers_of(header)
    config = read_config(path, header, family, layers, hf_kwargs.pop("config", None))
    asked = hf_kwargs.pop("dtype", None) or hf_kwargs.pop("torch_dtype", None) or "auto"
    dtype = dtype_of(asked)
    skeleton = _build(config, dtype, path)
    dense = dense_tensors(skeleton, header)
    return GgufModel(header, layers, config, skeleton, dtype, dense)


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
        path = Path(cached_file(str(name), gguf_file, **place))
        # Beside it, so that it is found there; many repositories of GGUF files have none.
        cached_file(str(name), "config.json", _raise_exceptions_for_missing_entries=False, **place)
    except CLIENT_ERRORS as error:
        raise CheckpointNotFoundError(f"{name}: {first_line(error)}") from error
    return path, path.parent


def read_config(path: Path, header: GgufHeader, family: str, layers: Any, given: Any = None) -> Any:
    """The model's configuration: that given, else config.json beside the file, else its metadata.

    Sizes that transformers does not read from the metadata are those of the tensors.
    """
    if isinstance(given, transformers.PreTrainedConfig):
        config = given
    elif (path.parent / "config.json").is_file():
        config = _read(path.parent, path)
    else:
        _check_blocks(header)
        config = _read(path.parent, path, gguf_file=path.name)
        config.moe_intermediate_size = next(iter(layers.values())).gate.shape[1]
        shared = header.tensors.get("blk.0.ffn_up_shexp.weight")
        if shared is not None:
            config.shared_expert_intermediate_size = shared.shape[0]
    if config.model_type != family:
        raise CheckpointError(
            f"holds a {family} by its metadata, the configuration is of {config.model_type!r}", path
        )
    return config


def _build(config: Any, dtype: torch.dtype, path: Path) -> Any:
    try:
        return build_skeleton(config, dtype)
    except (*UNREADABLE, ArithmeticError, RuntimeError, MemoryError) as error:
        raise CheckpointError(
            f"describes a model that cannot be built: {first_line(error.__cause__ or error)}", path
        ) from error


def _read(folder: Path, path: Path, **kwargs: Any) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(folder, **kwargs)
    except OSError as error:
        raise CheckpointNotFoundError(f"{folder}: {first_line(error)}") from error
    except (*UNREADABLE, KeyError, TypeError, IndexError, AttributeError) as error:
        raise CheckpointError(
            f"has metadata that transformers cannot read: {type(error).__name__} "
            f"{first_line(error.__cause__ or error)}",
            path,
        ) from error


def _check_blocks(header: GgufHeader) -> None:
    """A model is built with as many layers as the metadata says: no more than there are tensors."""
    found = {int(m[1]) for m in map(re.compile(r"blk\.(\d+)\.").match, header.tensors) if m}
    key = f"{header.architecture}.block_count"
    blocks = header.values.get(key)
    if isinstance(blocks, ArrayLength) or blocks != len(found):
        raise CheckpointError(
            f"must have the number of its layers, {len(found)}, as {key}, got {str(blocks)[:40]}",
            header.path,
        )


def dtype_of(asked: Any) -> torch.dtype:
    """The dtype of the dense weights: float32 unless another is asked for, as transformers has it."""
    if asked == "auto":
        return torch.float32
    dtype = getattr(torch, asked.removeprefix("torch."), None) if isinstance(asked, str) else asked
    if not isinstance(dtype, torch.dtype):
        raise ConfigError(f"dtype must be a torch.dtype or the name of one, got {asked!r}")
    return dtype


def dense_tensors(skeleton: Any, header: GgufHeader) -> dict[str, LazyTensor]:
    """All that is no expert, by the model's own names, checked against its shapes."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    processor = TENSOR_PROCESSORS.get(header.architecture, TensorProcessor)(
        config=skeleton.config.to_dict()
    )
    names = get_gguf_hf_weights_map(skeleton, processor)
    wanted = dict(skeleton.named_parameters())
    found: dict[str, LazyTensor] = {}
    for name, tensor in header.tensors.items():
        parameter = wanted.get(names.get(name, ""))
        if parameter is None or gguf_experts.EXPERTS.fullmatch(name):
            continue
        flat = tuple(size for size in parameter.shape if size > 1)
        if tuple(size for size in tensor.shape if size > 1) != flat:
            raise CheckpointError(
                f"must have the shape {tuple(parameter.shape)} by the model's configuration, got "
                f"{tensor.shape}",
                header.path,
                name,
            )
        found[names[name]] = LazyTensor(header.path, name, tensor, parameter)
    _check_complete(skeleton, found, header)
    return found


def _check_complete(skeleton: Any, found: dict[str, LazyTensor], header: GgufHeader) -> None:
    """transformers would make up what is missing."""
    tied = set(getattr(skeleton, "all_tied_weights_keys", None) or ())
    for name, _ in skeleton.named_parameters():
        if name not in found and name not in tied and ".experts." not in name:
            raise CheckpointError(
                f"has no tensor for {name} of the model: it is incomplete, or of another model than "
                "the configuration says",
                header.path,
            )


def dequantize(raw: np.ndarray, kind: int) -> np.ndarray:
    """values [..., columns] float32 of a tensor's bytes [..., row_bytes] uint8."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as values_of

    if kind in gguf_experts.PLAIN:
        plain = torch.from_numpy(raw).view(gguf_experts.PLAIN[kind])
        numbers: np.ndarray = plain.float().numpy()
        return numbers
    try:
        values: np.ndarray = values_of(raw, GGMLQuantizationType(kind))
    except NotImplementedError as error:
        raise UnsupportedModelError(
            f"the package gguf cannot dequantize tensors of type {kind}: {first_line(error)}"
        ) from error
    return values
