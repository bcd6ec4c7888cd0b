"""Which tensors of a GGUF file hold the experts of which layer, and which blocks are layers at all.

Three layouts are read: one tensor of a matrix of all experts (gate, up and down), the same with gate
above up in one tensor, and one tensor for each expert, as llama.cpp first wrote them. Blocks that
predict further tokens (MTP) come after the layers, and no model of transformers has them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hybrimoe.errors import CheckpointError, UnsupportedModelError
from hybrimoe.sources.gguf.header import GgufHeader, GgufTensor

MATRICES = ("gate", "up", "down")
NUMBER = "(0|[1-9][0-9]*)"
BLOCK = re.compile(rf"blk\.{NUMBER}\.")
STACKED = re.compile(rf"blk\.{NUMBER}\.ffn_(gate|up|down|gate_up)_exps\.weight")
SINGLE = re.compile(rf"blk\.{NUMBER}\.ffn_(gate|up|down)\.{NUMBER}\.weight")
PREDICTS = re.compile(rf"blk\.{NUMBER}\.nextn\..+")
Named = tuple[str, GgufTensor]


class Matrix(NamedTuple):
    """One matrix of all experts of a layer.

    tensors: one that holds all experts, or one for each. shape: [E, rows, columns]. first_row: where
    the matrix begins in each expert of the tensor, which may hold more than it.
    """

    tensors: tuple[Named, ...]
    shape: tuple[int, ...]
    first_row: int = 0

    @property
    def kind(self) -> int:
        """Its ggml type."""
        return self.tensors[0][1].kind

    @property
    def type_name(self) -> str:
        """Its type as ggml calls it."""
        return self.tensors[0][1].type_name

    @property
    def each(self) -> int:
        """Bytes of one expert."""
        return self.shape[1] * self._row_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return self.shape[0] * self.each

    def pieces(self, first: int, count: int) -> Iterator[tuple[str, Path, int, int]]:
        """Where the experts first, first + 1, ... lie: tensor, file, offset and bytes, in order."""
        for expert in range(first, first + count):
            name, tensor = self.tensors[expert if len(self.tensors) > 1 else 0]
            stride = tensor.nbytes // self.shape[0]
            at = tensor.offset + self.first_row * self._row_bytes
            if len(self.tensors) == 1 and stride == self.each:
                yield name, tensor.path, at + first * stride, count * stride
                return
            if len(self.tensors) == 1:
                at += expert * stride
            yield name, tensor.path, at, self.each

    @property
    def _row_bytes(self) -> int:
        tensor = self.tensors[0][1]
        return tensor.nbytes // math.prod(tensor.shape[:-1])


class Matrices(NamedTuple):
    """The three matrices of one layer's experts: gate and up [E, F, D], down [E, D, F]."""

    gate: Matrix
    up: Matrix
    down: Matrix


class Layout(NamedTuple):
    """layers: decoder layers. experts: of every layer that has some. dense: all other tensors.

    Tensors of blocks that predict further tokens are in none of them.
    """

    layers: int
    experts: dict[int, Matrices]
    dense: dict[str, GgufTensor]


def layout_of(header: GgufHeader) -> Layout:
    """Sort all tensors; raises CheckpointError unless blocks and experts are complete."""
    if not any(map(_is_expert, header.tensors)):
        raise UnsupportedModelError(
            f"{header.path} holds no experts (blk.0.ffn_gate_exps.weight and so on): a dense model"
        )
    layers = count_layers(header)
    dense: dict[str, GgufTensor] = {}
    blocks: dict[int, dict[str, GgufTensor]] = {}
    for name, tensor in header.tensors.items():
        block = _block_of(name)
        if block >= layers:
            continue
        if _is_expert(name):
            blocks.setdefault(block, {})[name] = tensor
        else:
            dense[name] = tensor
    if not blocks:
        raise CheckpointError("has experts in none of its layers", header.path)
    experts = {block: _matrices(block, blocks[block], header.path) for block in sorted(blocks)}
    return Layout(layers, experts, dense)


def is_plain(header: GgufHeader) -> bool:
    """Whether transformers reads it too: one file, a tensor for each matrix of all experts, layers
    alone."""
    others = (SINGLE, PREDICTS, re.compile(r".*_gate_up_exps\..*"))
    is_known = not any(other.fullmatch(name) for name in header.tensors for other in others)
    further = header.values.get(_key(header, "nextn_predict_layers"))
    return len(header.paths) == 1 and is_known and not further


def count_layers(header: GgufHeader) -> int:
    """The blocks that are decoder layers; raises CheckpointError if the metadata counts others.

    block_count has the blocks that predict further tokens in it. Some writers leave these blocks out,
    and some leave out nextn_predict_layers, so what tensors say comes first.
    """
    found = {_block_of(name) for name in header.tensors} - {-1}
    predicting = {_block_of(name) for name in header.tensors if PREDICTS.fullmatch(name)}
    stated = _number(header, "nextn_predict_layers", 0)
    blocks = _number(header, "block_count", None)
    extra = len(predicting) or stated
    layers = blocks - extra
    if predicting and not stated and blocks == len(found) - extra:
        layers = blocks
    end = layers + extra
    for name in header.tensors:
        if _block_of(name) >= end:
            raise CheckpointError(
                f"belongs to none of the {blocks} blocks of {_key(header, 'block_count')}",
                header.tensors[name].path,
                name,
            )
    whole = len(found) in (layers, end) and found == set(range(len(found)))
    last = not predicting or (predicting == set(range(layers, end)) and stated in (0, extra))
    if layers < 1 or not whole or not last:
        raise _wrong_count(header, blocks, len(found), stated, len(predicting))
    return layers


def _wrong_count(
    header: GgufHeader, blocks: int, found: int, stated: int, predicting: int
) -> CheckpointError:
    further = ""
    if stated or predicting:
        further = (
            f" with {_key(header, 'nextn_predict_layers')} = {stated}, where {predicting} blocks "
            "predict further tokens (nextn tensors)"
        )
    return CheckpointError(
        f"must have the number of its layers, {found}, as {_key(header, 'block_count')}, got "
        f"{blocks}{further}",
        header.path,
    )


def _matrices(block: int, tensors: dict[str, GgufTensor], path: Path) -> Matrices:
    """The experts of one layer, from the tensors that hold some of them."""
    found: dict[str, Matrix] = {}
    for part, matrix in (*_stacked(tensors), *_singles(block, tensors)):
        if part in found:
            name, tensor = matrix.tensors[0]
            other = found[part].tensors[0][0]
            raise CheckpointError(f"holds what {other} holds as well", tensor.path, name)
        found[part] = matrix
    for part in MATRICES:
        if part not in found:
            raise CheckpointError("is missing", path, f"blk.{block}.ffn_{part}_exps.weight")
    return Matrices(**found)


def _stacked(tensors: dict[str, GgufTensor]) -> Iterator[tuple[str, Matrix]]:
    for name, tensor in tensors.items():
        match = STACKED.fullmatch(name)
        if match is None:
            continue
        # ggml leaves out leading sizes of 1.
        shape = (1,) * (3 - len(tensor.shape)) + tensor.shape
        if len(shape) != 3 or (match[2] == "gate_up" and shape[1] % 2):
            rows = "an even number of rows, " if match[2] == "gate_up" else ""
            raise CheckpointError(
                f"must have three sizes, {rows}experts first, got {tensor.shape}", tensor.path, name
            )
        if match[2] != "gate_up":
            yield match[2], Matrix(((name, tensor),), shape)
            continue
        half = (shape[0], shape[1] // 2, shape[2])
        yield "gate", Matrix(((name, tensor),), half)
        yield "up", Matrix(((name, tensor),), half, first_row=half[1])


def _singles(block: int, tensors: dict[str, GgufTensor]) -> Iterator[tuple[str, Matrix]]:
    """Matrices of which each expert has a tensor of its own."""
    parts: dict[str, dict[int, Named]] = {}
    for name, tensor in tensors.items():
        match = SINGLE.fullmatch(name)
        if match:
            parts.setdefault(match[2], {})[int(match[3])] = (name, tensor)
    for part, experts in parts.items():
        first_name, first = next(iter(experts.values()))
        for expert in range(len(experts)):
            if expert not in experts:
                name = f"blk.{block}.ffn_{part}.{expert}.weight"
                raise CheckpointError("is missing", first.path, name)
            name, tensor = experts[expert]
            if len(tensor.shape) != 2 or tensor[:2] != first[:2]:
                raise CheckpointError(
                    f"must be a matrix of the type and shape of {first_name}, {first.type_name} "
                    f"{first.shape}, got {tensor.type_name} {tensor.shape}",
                    tensor.path,
                    name,
                )
        ordered = tuple(experts[expert] for expert in range(len(experts)))
        yield part, Matrix(ordered, (len(experts), *first.shape))


def _is_expert(name: str) -> bool:
    return bool(STACKED.fullmatch(name) or SINGLE.fullmatch(name))


def _block_of(name: str) -> int:
    """The number of a tensor's block; -1 for tensors outside of all."""
    match = BLOCK.match(name)
    return int(match[1]) if match else -1


def _number(header: GgufHeader, key: str, default: int | None) -> int:
    value: Any = header.values.get(_key(header, key), default)
    if type(value) is not int or value < 0:
        raise CheckpointError(
            f"must have the number of its layers as {_key(header, key)}, got {str(value)[:40]}",
            header.path,
        )
    return value


def _key(header: GgufHeader, key: str) -> str:
    return f"{header.architecture}.{key}"
