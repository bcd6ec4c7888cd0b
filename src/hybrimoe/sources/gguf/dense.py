"""All of a GGUF file that is no expert: each tensor becomes a parameter, or the file is refused."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from hybrimoe.errors import CheckpointError, UnsupportedModelError
from hybrimoe.files import read_at
from hybrimoe.hub import first_line
from hybrimoe.models.bytes import STAGING_BYTES
from hybrimoe.sources.gguf.experts import PLAIN
from hybrimoe.sources.gguf.header import BLOCKS, GgufHeader, GgufTensor
from hybrimoe.sources.gguf.layout import Layout, Matrices

SMALL = 1 << 22
"""Numbers of a dense tensor that may be in memory twice."""
FREQUENCIES = "rope_freqs.weight"
"""Divides the frequencies of rotary embeddings: of no effect where it is 1."""


class LazyTensor:
    """A dense tensor that is read and dequantized when the loader of transformers slices it.

    parameter: what it becomes. A large one takes its dtype piece by piece, so that it never is in
    memory twice; a small one leaves that to the loader.
    """

    def __init__(self, name: str, tensor: GgufTensor, parameter: torch.Tensor) -> None:
        self.name, self.tensor = name, tensor
        self.shape = parameter.shape
        self.dtype = parameter.dtype if parameter.numel() > SMALL else torch.float32

    def __getitem__(self, _: Any) -> torch.Tensor:
        columns = self.tensor.shape[-1]
        out = torch.empty(self.shape.numel() // columns, columns, dtype=self.dtype)
        each = self.tensor.nbytes // len(out)
        chunk = max(1, STAGING_BYTES // (4 * columns))
        with self.tensor.path.open("rb", buffering=0) as file:
            for first in range(0, len(out), chunk):
                rows = out[first : first + chunk]
                raw = np.empty((len(rows), each), np.uint8)
                at = self.tensor.offset + first * each
                if read_at(file.fileno(), raw.reshape(-1), at) < raw.nbytes:
                    raise CheckpointError(
                        "ended early: it has become shorter", self.tensor.path, self.name
                    )
                rows.copy_(torch.from_numpy(dequantize(raw, self.tensor.kind)))
        return out.view(self.shape)


def dense_tensors(
    skeleton: Any, header: GgufHeader, layout: Layout, names: dict[str, str]
) -> dict[str, LazyTensor]:
    """All that is no expert, by the model's own names, checked against its shapes.

    names: the model's names by those of the file.
    """
    wanted = dict(skeleton.named_parameters())
    found: dict[str, LazyTensor] = {}
    for name, tensor in layout.dense.items():
        parameter = wanted.get(names.get(name, ""))
        if parameter is None:
            _check_harmless(name, tensor)
            continue
        flat = tuple(size for size in parameter.shape if size > 1)
        if tuple(size for size in tensor.shape if size > 1) != flat:
            raise CheckpointError(
                f"must have the shape {tuple(parameter.shape)} by the model's configuration, got "
                f"{tensor.shape}",
                tensor.path,
                name,
            )
        found[names[name]] = LazyTensor(name, tensor, parameter)
    _check_complete(skeleton, found, header)
    return found


def check_types(layout: Layout) -> None:
    """Raise UnsupportedModelError for tensors of a type that cannot be dequantized."""
    seen: set[int] = set()
    for name, tensor in (*layout.dense.items(), *_named(layout.experts.values())):
        if tensor.kind not in seen:
            seen.add(tensor.kind)
            try:
                dequantize(np.zeros((1, BLOCKS[tensor.kind][2]), np.uint8), tensor.kind)
            except UnsupportedModelError as error:
                raise UnsupportedModelError(f"{tensor.path}: tensor {name!r}: {error}") from error


def dequantize(raw: np.ndarray, kind: int) -> np.ndarray:
    """values [..., columns] float32 of a tensor's bytes [..., row_bytes] uint8."""
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize as values_of

    if kind in PLAIN:
        plain = torch.from_numpy(raw).view(PLAIN[kind])
        numbers: np.ndarray = plain.float().numpy()
        return numbers
    try:
        values: np.ndarray = values_of(raw, GGMLQuantizationType(kind))
    except (NotImplementedError, ValueError) as error:
        raise UnsupportedModelError(
            f"the package gguf cannot dequantize tensors of type {BLOCKS[kind][0]}: "
            f"{first_line(error)}"
        ) from error
    return values


def _named(experts: Iterable[Matrices]) -> list[tuple[str, GgufTensor]]:
    return [named for layer in experts for matrix in layer for named in matrix.tensors]


def _check_harmless(name: str, tensor: GgufTensor) -> None:
    """Raise unless a tensor that the model has no place for changes nothing."""
    if name != FREQUENCIES or not _is_all_one(name, tensor):
        raise CheckpointError(
            "has no place in the model: what it changes would be lost", tensor.path, name
        )


def _is_all_one(name: str, tensor: GgufTensor) -> bool:
    """Whether a small tensor holds nothing but 1."""
    shape = torch.empty(tensor.shape, device="meta")
    return shape.numel() < SMALL and bool((LazyTensor(name, tensor, shape)[...] == 1).all())


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
