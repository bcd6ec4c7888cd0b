"""Experts of a GGUF file into the blobs of the pool, a few at a time.

Where a blob can hold a file's own numbers it does: Q4_0 as int4, Q8_0, Q5_0 and IQ4_NL as int8, Q4_K,
Q5_K and Q6_K in formats of the same names. Other types are rounded to int8, and a warning says what
that adds. The dense weights are none of this module's business.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from hybrimoe.errors import CheckpointError, ConfigError, UnsupportedModelError
from hybrimoe.files import read_at
from hybrimoe.formats.integer import INT4, INT8
from hybrimoe.formats.layout import is_integer, join, split
from hybrimoe.formats.registry import FORMATS, named
from hybrimoe.kernels.cpu import relay as ggml
from hybrimoe.kernels.cpu import relay_k as ggml_k
from hybrimoe.models.adapters import FoundExperts
from hybrimoe.models.bytes import STAGING_BYTES
from hybrimoe.modules.pooled_experts import PooledExperts
from hybrimoe.simd.threads import launch
from hybrimoe.sources.gguf.layout import Matrices, Matrix
from hybrimoe.sources.safetensors import bytes_of
from hybrimoe.sources.sink import ExpertSink

logger = logging.getLogger("hybrimoe")
OWN = {fmt.ggml_type: fmt.name for fmt in FORMATS.values() if fmt.ggml_type is not None}
"""Formats for a type alone; all others become int8, some of them without loss."""
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Types that are no blocks."""
Dequantize = Callable[[np.ndarray, int], np.ndarray]
"""values [rows, columns] float32 = dequantize(raw [rows, bytes] uint8, kind)."""


def weights_of(layers: dict[int, Matrices]) -> dict[int, str]:
    """How each layer is kept: a blob format, or "native" for all if all are plain numbers."""
    if all(tensor.kind in PLAIN for layer in layers.values() for tensor in layer):
        return dict.fromkeys(layers, "native")
    return {block: _format_of(layer) for block, layer in layers.items()}


def _format_of(layer: Matrices) -> str:
    """Gate and up share a format, so types that differ become int8."""
    gate, up, down = (OWN.get(tensor.kind, INT8.name) for tensor in layer)
    return join(gate if gate == up else INT8.name, down)


def prescribed(layers: dict[int, Matrices]) -> Callable[[str], str | None]:
    """`weights_of` as a function of the name of a layer's experts."""
    weights = weights_of(layers)
    return lambda name: weights.get(block_of(name))


def refuse_format(weights: str) -> NoReturn:
    """Raise ConfigError: a file brings its own format."""
    raise ConfigError(
        f"weights must be left out with gguf_file, got {weights!r}: the types in the file say how "
        "experts are kept"
    )


@dataclass
class Rounding:
    """What storing added to the file's own error, over all weights of one type that it rounds."""

    numbers: int = 0
    error: float = 0.0
    square: float = 0.0

    def __str__(self) -> str:
        nmse = self.error / self.square if self.square else 0.0
        return f"{self.numbers / 1e6:.1f} million weights, NMSE {nmse:.1e}"


@dataclass
class ExpertsReader:
    """Fills the pool from a model's files. dequantize: for types that the kernels do not read."""

    layers: dict[int, Matrices]
    dequantize: Dequantize
    roundings: dict[str, Rounding] = field(default_factory=dict)

    def fill(self, arrivals: ExpertSink, progress: Callable[[int], object]) -> None:
        """Pack every layer of `arrivals`; progress: told the bytes of the file that are done."""
        with ExitStack() as stack:
            files = _Files(stack)
            for layer, matrices in zip(arrivals.layers, self.layers.values()):
                self._fill_layer(files, arrivals, layer, matrices)
                progress(sum(matrix.nbytes for matrix in matrices))
        for type_name, rounding in self.roundings.items():
            logger.warning(
                "experts of type %s are kept as int8 in groups of 32, which rounds them: %s",
                type_name,
                rounding,
            )

    def _fill_layer(
        self, files: _Files, arrivals: ExpertSink, layer: PooledExperts, matrices: Matrices
    ) -> None:
        if is_integer(layer.packed.fmt):
            for at, matrix in enumerate(matrices):
                self._relay(files, layer, at, matrix)
            arrivals.accept_packed(layer)
        else:
            _stream(files, arrivals, layer, matrices)

    def _relay(self, files: _Files, layer: PooledExperts, at: int, matrix: Matrix) -> None:
        """One matrix of all experts into the blobs, by the kernel."""
        experts, rows, columns = matrix.shape
        fmt = split(layer.packed.fmt)[at == 2]
        is_own = OWN.get(matrix.kind) == fmt and named(fmt).pack is None
        direct = is_own or (matrix.kind in ggml.BLOCK and matrix.kind not in PLAIN)
        staged = matrix.each if direct else 4 * rows * columns
        chunk = min(experts, max(1, STAGING_BYTES // staged))
        if len(matrix.tensors) > 1:  # so that an error names the right one
            chunk = 1
        staging = np.empty(chunk * matrix.each, np.uint8)
        threads = launch.threads()
        scratch, sums = np.empty((threads, 32), np.float32), np.zeros((threads, 3))
        packed, kind = layer.packed, matrix.kind if direct else ggml.F32
        for first in range(0, experts, chunk):
            count = min(chunk, experts - first)
            raw = staging[: count * matrix.each]
            files.read(matrix, first, raw)
            if not direct:
                raw = self._values(raw, matrix, count).view(np.uint8).reshape(-1)
            work = np.zeros(8, np.int64)
            blobs = packed.blobs[first : first + count]
            what = (threads, packed.layout, at, (rows, columns), raw, blobs)
            with launch.lock:
                if is_own:
                    ggml_k.relay_k(kind, *what, work)
                else:
                    bits = 4 if fmt == INT4.name else 8
                    ggml.relay_experts(kind, bits, *what, scratch, sums, work)
            if work[ggml.NOT_FINITE]:
                name, path, *_ = next(matrix.pieces(first, count))
                raise CheckpointError(
                    "holds weights that are not finite, or too large for a scale in float16",
                    path,
                    name,
                )
        groups, error, square = sums.sum(0).tolist()
        if groups:
            rounding = self.roundings.setdefault(matrix.type_name, Rounding())
            rounding.numbers += int(groups) * 32
            rounding.error += error
            rounding.square += square

    def _values(self, raw: np.ndarray, matrix: Matrix, count: int) -> np.ndarray:
        """Matrices [count, rows, columns] float32."""
        _, rows, columns = matrix.shape
        if matrix.kind in PLAIN:
            plain = torch.from_numpy(raw).view(PLAIN[matrix.kind]).float()
            return plain.numpy().reshape(count, rows, columns)
        values = self.dequantize(raw.reshape(count * rows, -1), matrix.kind)
        return np.ascontiguousarray(values, np.float32).reshape(count, rows, columns)


class _Files:
    """The files of a model, each opened when it is first read and closed with the stack."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack, self._open = stack, dict[Path, int]()

    def read(self, matrix: Matrix, first: int, out: np.ndarray) -> None:
        """Fill `out` [bytes] with as many experts as it holds, from `first` on."""
        done = 0
        for name, path, offset, nbytes in matrix.pieces(first, out.nbytes // matrix.each):
            part = out[done : done + nbytes]
            if read_at(self._file(path), part, offset) < nbytes:
                raise CheckpointError(
                    "ended early: the file has become shorter since it was checked", path, name
                )
            done += nbytes

    def _file(self, path: Path) -> int:
        if path not in self._open:
            self._open[path] = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
            self._stack.callback(os.close, self._open[path])
        return self._open[path]


def _stream(files: _Files, arrivals: ExpertSink, layer: PooledExperts, matrices: Matrices) -> None:
    """Experts in plain numbers, into the dtype of the model."""
    inner = matrices.gate.shape[1]
    up, down = list(layer.shapes)

    def read(matrix: Matrix, out: Tensor, first: int) -> None:
        raw = torch.empty(out.shape, dtype=PLAIN[matrix.kind])
        files.read(matrix, first, bytes_of(raw))
        out.copy_(raw)

    def read_up(out: Tensor, first: int) -> None:
        read(matrices.gate, out[:, :inner], first)
        read(matrices.up, out[:, inner:], first)

    arrivals.stream(f"{layer.name}.{up}", read_up)
    arrivals.stream(f"{layer.name}.{down}", lambda out, first: read(matrices.down, out, first))


def check_experts(found: Iterable[FoundExperts], layers: dict[int, Matrices], path: Path) -> None:
    """Raise unless the model has experts where the file has, of the same shapes, and as files keep
    them: gate above up, no biases."""
    blocks = {block_of(experts.name): experts for experts in found}
    if list(blocks) != list(layers):
        raise CheckpointError(
            f"has experts in the layers {_some(layers)}, the model in {_some(blocks)}", path
        )
    for block, experts in blocks.items():
        module = experts.module
        plain = experts.is_decorated and module.has_gate and module.is_concatenated
        if not plain or module.is_transposed or module.has_bias:
            raise UnsupportedModelError(
                f"{experts.name} is a {type(module).__name__}, whose layout in GGUF files is not "
                "known"
            )
        _check_shapes(layers[block], [tuple(shape.shape) for shape in module.parameters()])


def _check_shapes(matrices: Matrices, shapes: list[tuple[int, ...]]) -> None:
    (experts, rows, hidden), down = shapes
    wanted = (*((experts, rows // 2, hidden),) * 2, down)
    for matrix, shape in zip(matrices, wanted):
        if matrix.shape != shape:
            name, tensor = matrix.tensors[0]
            raise CheckpointError(
                f"must have the shape {shape} by the model's configuration, got {matrix.shape}",
                tensor.path,
                name,
            )


def block_of(name: str) -> int:
    """The number of the layer that a module's name tells."""
    return int(re.findall(r"\.(\d+)\.", f".{name}.")[0])


def _some(numbers: Any) -> str:
    return ", ".join(map(str, list(numbers)[:4])) + (" ..." if len(numbers) > 4 else "")
