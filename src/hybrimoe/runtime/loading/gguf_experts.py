"""Experts of a GGUF file into the blobs of the pool, a few at a time.

Where a blob can hold a file's own numbers it does: Q4_0 as int4, Q8_0, Q5_0 and IQ4_NL as int8, Q4_K,
Q5_K and Q6_K in formats of the same names. Other types are rounded to int8, and a warning says what
that adds. The dense weights are none of this module's business.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor

from hybrimoe.errors import CheckpointError, ConfigError, UnsupportedModelError
from hybrimoe.kernels import ggml, ggml_k
from hybrimoe.kernels.layout import is_integer, join, split
from hybrimoe.kernels.threads import launch
from hybrimoe.runtime.experts import PooledExperts
from hybrimoe.runtime.loading.arrivals import STAGING_BYTES, Arrivals
from hybrimoe.runtime.loading.gguf_check import GgufHeader, GgufTensor
from hybrimoe.runtime.loading.reading import bytes_of, read_at

logger = logging.getLogger("hybrimoe")
MATRICES = ("gate", "up", "down")
EXPERTS = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down)_exps\.weight")
OWN = {ggml.Q4_0: "int4", **ggml_k.FORMATS}
"""Formats for a type alone; all others become int8, some of them without loss."""
PLAIN = {0: torch.float32, 1: torch.float16, 30: torch.bfloat16}
"""Types that are no blocks."""
Dequantize = Callable[[np.ndarray, int], np.ndarray]
"""values [rows, columns] float32 = dequantize(raw [rows, bytes] uint8, kind)."""


class Matrices(NamedTuple):
    """The three tensors of one layer's experts: gate and up [E, F, D], down [E, D, F]."""

    gate: GgufTensor
    up: GgufTensor
    down: GgufTensor


def layers_of(header: GgufHeader) -> dict[int, Matrices]:
    """The experts of every layer that has some; raises CheckpointError unless they are complete."""
    found: dict[int, dict[str, GgufTensor]] = {}
    for name, tensor in header.tensors.items():
        match = EXPERTS.fullmatch(name)
        if match:
            found.setdefault(int(match[1]), {})[match[2]] = tensor
    if not found:
        raise UnsupportedModelError(
            f"{header.path} holds no experts (blk.0.ffn_gate_exps.weight and so on): a dense model, "
            "or one that an old llama.cpp converted"
        )
    for block, parts in found.items():
        for matrix in MATRICES:
            if matrix not in parts:
                raise CheckpointError(
                    "is missing", header.path, f"blk.{block}.ffn_{matrix}_exps.weight"
                )
    return {block: Matrices(**parts) for block, parts in sorted(found.items())}


def weights_of(layers: dict[int, Matrices]) -> dict[int, str]:
    """How each layer is kept: a blob format, or "native" for all if all are plain numbers."""
    if all(tensor.kind in PLAIN for layer in layers.values() for tensor in layer):
        return dict.fromkeys(layers, "native")
    return {block: _format_of(layer) for block, layer in layers.items()}


def _format_of(layer: Matrices) -> str:
    """Gate and up share a format, so types that differ become int8."""
    gate, up, down = (OWN.get(tensor.kind, "int8") for tensor in layer)
    return join(gate if gate == up else "int8", down)


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
    """Fills the pool from one file. dequantize: for types that the kernels do not read."""

    header: GgufHeader
    layers: dict[int, Matrices]
    dequantize: Dequantize
    roundings: dict[str, Rounding] = field(default_factory=dict)

    def fill(self, arrivals: Arrivals, progress: Callable[[int], object]) -> None:
        """Pack every layer of `arrivals`; progress: told the bytes of the file that are done."""
        blocks = [block_of(layer.name) for layer in arrivals.layers]
        if blocks != list(self.layers):
            raise CheckpointError(
                f"has experts in the layers {_some(self.layers)}, the model in {_some(blocks)}",
                self.header.path,
            )
        file = os.open(self.header.path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        try:
            for layer, (block, matrices) in zip(arrivals.layers, self.layers.items()):
                self._fill_layer(file, arrivals, layer, block, matrices)
                progress(sum(tensor.nbytes for tensor in matrices))
        finally:
            os.close(file)
        for type_name, rounding in self.roundings.items():
            logger.warning(
                "experts of type %s are kept as int8 in groups of 32, which rounds them: %s",
                type_name,
                rounding,
            )

    def _fill_layer(
        self, file: int, arrivals: Arrivals, layer: PooledExperts, block: int, matrices: Matrices
    ) -> None:
        up, down = list(layer.shapes)  # no biases: none of the families has any
        experts, rows, hidden = layer.shapes[up]
        wanted = ((experts, rows // 2, hidden),) * 2 + (tuple(layer.shapes[down]),)
        for matrix, tensor, shape in zip(MATRICES, matrices, wanted):
            if tensor.shape != shape:
                raise CheckpointError(
                    f"must have the shape {shape} by the model's configuration, got {tensor.shape}",
                    self.header.path,
                    _name(block, matrix),
                )
        if is_integer(layer.packed.fmt):
            for at, (matrix, tensor) in enumerate(zip(MATRICES, matrices)):
                self._relay(file, layer, at, _name(block, matrix), tensor)
            arrivals.accept_packed(layer)
        else:
            self._stream(file, arrivals, layer, block, matrices)

    def _relay(
        self, file: int, layer: PooledExperts, at: int, name: str, tensor: GgufTensor
    ) -> None:
        """One matrix of all experts into the blobs, by the kernel."""
        experts, rows, columns = tensor.shape
        each = tensor.nbytes // experts
        fmt = split(layer.packed.fmt)[at == 2]
        is_own = ggml_k.FORMATS.get(tensor.kind) == fmt
        direct = is_own or (tensor.kind in ggml.BLOCK and tensor.kind not in PLAIN)
        staged = each if direct else 4 * rows * columns
        chunk = min(experts, max(1, STAGING_BYTES // staged))
        staging = np.empty(chunk * each, np.uint8)
        threads = launch.threads()
        scratch, sums = np.empty((threads, 32), np.float32), np.zeros((threads, 3))
        packed, kind = layer.packed, tensor.kind if direct else ggml.F32
        for first in range(0, experts, chunk):
            count = min(chunk, experts - first)
            raw = staging[: count * each]
            self._read(file, name, raw, tensor.offset + first * each)
            if not direct:
                raw = self._values(raw, tensor, count).view(np.uint8).reshape(-1)
            work = np.zeros(8, np.int64)
            blobs = packed.blobs[first : first + count]
            what = (threads, packed.layout, at, (rows, columns), raw, blobs)
            with launch.lock:
                if is_own:
                    ggml_k.relay_k(kind, *what, work)
                else:
                    bits = 4 if fmt == "int4" else 8
                    ggml.relay_experts(kind, bits, *what, scratch, sums, work)
            if work[ggml.NOT_FINITE]:
                raise CheckpointError(
                    "holds weights that are not finite, or too large for a scale in float16",
                    self.header.path,
                    name,
                )
        groups, error, square = sums.sum(0).tolist()
        if groups:
            rounding = self.roundings.setdefault(tensor.type_name, Rounding())
            rounding.numbers += int(groups) * 32
            rounding.error += error
            rounding.square += square

    def _values(self, raw: np.ndarray, tensor: GgufTensor, count: int) -> np.ndarray:
        """Matrices [count, rows, columns] float32."""
        _, rows, columns = tensor.shape
        if tensor.kind in PLAIN:
            plain = torch.from_numpy(raw).view(PLAIN[tensor.kind]).float()
            return plain.numpy().reshape(count, rows, columns)
        values = self.dequantize(raw.reshape(count * rows, -1), tensor.kind)
        return np.ascontiguousarray(values, np.float32).reshape(count, rows, columns)

    def _stream(
        self, file: int, arrivals: Arrivals, layer: PooledExperts, block: int, matrices: Matrices
    ) -> None:
        """Experts in plain numbers, into the dtype of the model."""
        inner = matrices.gate.shape[1]
        up, down = list(layer.shapes)

        def read(matrix: str, out: Tensor, first: int) -> None:
            tensor = getattr(matrices, matrix)
            raw = torch.empty(out.shape, dtype=PLAIN[tensor.kind])
            each = tensor.nbytes // tensor.shape[0]
            self._read(file, _name(block, matrix), bytes_of(raw), tensor.offset + first * each)
            out.copy_(raw)

        def read_up(out: Tensor, first: int) -> None:
            read("gate", out[:, :inner], first)
            read("up", out[:, inner:], first)

        arrivals.stream(f"{layer.name}.{up}", read_up)
        arrivals.stream(f"{layer.name}.{down}", lambda out, first: read("down", out, first))

    def _read(self, file: int, name: str, out: np.ndarray, offset: int) -> None:
        if read_at(file, out, offset) < out.nbytes:
            raise CheckpointError(
                "ended early: the file has become shorter since it was checked",
                self.header.path,
                name,
            )


def check_experts(layers: list[PooledExperts]) -> None:
    """Raise unless the model keeps experts as the files do: gate above up, no biases."""
    for layer in layers:
        module = layer.original
        plain = layer.found.is_decorated and module.has_gate and module.is_concatenated
        if not plain or module.is_transposed or module.has_bias:
            raise UnsupportedModelError(
                f"{layer.name} is a {type(module).__name__}, whose layout in GGUF files is not known"
            )


def block_of(name: str) -> int:
    """The number of the layer that a module's name tells."""
    return int(re.findall(r"\.(\d+)\.", f".{name}.")[0])


def _name(block: int, matrix: str) -> str:
    return f"blk.{block}.ffn_{matrix}_exps.weight"


def _some(numbers: Any) -> str:
    return ", ".join(map(str, list(numbers)[:4])) + (" ..." if len(numbers) > 4 else "")
