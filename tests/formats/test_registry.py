"""A format is one value: its sizes, its torch decode and its place in the list."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch

import hybrimoe
from hybrimoe.errors import FormatError
from hybrimoe.formats import registry
from hybrimoe.formats.base import LINE, ROWS
from hybrimoe.formats.decode import decode
from hybrimoe.formats.registry import FORMATS, choices, named, register, rounded

SOURCE = Path(hybrimoe.__file__).parent
COLUMNS = 512


def block_of(name: str) -> np.ndarray:
    """Random bytes of one block, with finite scales."""
    fmt, rng = named(name), np.random.default_rng(0)
    if fmt.pack is not None:
        rows = rng.standard_normal((ROWS, COLUMNS)).astype(np.float32)
        return np.frombuffer(reference._pack_block(name, rows), np.uint8).copy()
    units = rng.integers(0, 256, (COLUMNS // fmt.columns, fmt.unit_bytes)).astype(np.uint8)
    heads = rng.standard_normal((len(units), fmt.head_bytes // 2)).astype(np.float16)
    units[:, : fmt.head_bytes] = heads.view(np.uint8)
    block = np.zeros(fmt.block_bytes(COLUMNS), np.uint8)
    block[: units.size] = units.reshape(-1)
    return block


@pytest.mark.parametrize("name", FORMATS)
def test_torch_reads_what_the_reference_reads_to_the_last_bit(name):
    block = block_of(name)
    wanted = reference._unpack_block(name, block)[:, :COLUMNS]
    found = decode(named(name), torch.from_numpy(block), COLUMNS, torch.float32)
    assert found.shape[-1] == named(name).neighbours
    rows = found.permute(2, 0, 1, 3).reshape(ROWS, -1)  # [16, g, J, N] -> [16, C]
    assert np.array_equal(rows.numpy(), wanted)


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_are_whole_cache_lines(name):
    fmt = named(name)
    assert fmt.block_bytes(COLUMNS) % LINE == 0
    assert 0 <= fmt.block_bytes(COLUMNS) - COLUMNS // fmt.columns * fmt.unit_bytes < LINE


def test_what_a_user_may_choose_comes_from_the_list():
    assert choices() == ("native", "int8", "int4")
    assert rounded() == ("int8", "int4")


def test_an_unknown_format_is_refused_with_all_names():
    with pytest.raises(FormatError, match=r"unknown format 'int3'; formats are float32, .*q6_k"):
        named("int3")


@pytest.mark.parametrize("name", ["native", "", "Int4", "4bit", "q4_k+q6_k"])
def test_a_name_that_is_none_is_refused(name):
    with pytest.raises(FormatError, match="must be of a-z, 0-9 and _"):
        register(replace(named("int4"), name=name))
    assert name not in FORMATS


def test_a_name_belongs_to_one_format():
    with pytest.raises(FormatError, match="'int4' is taken"):
        register(replace(named("int8"), name="int4"))
    assert register(named("int4")) is FORMATS["int4"]


def test_no_format_is_named_outside_its_file():
    """Dtypes aside, whose names are those of native formats."""
    names = {name for name, fmt in FORMATS.items() if not fmt.is_native}
    own = {SOURCE / "formats" / f"{file}.py" for file in ("integer", "k_types", "registry")}
    found = [
        f"{path.relative_to(SOURCE)}: {node.value}"
        for path in SOURCE.rglob("*.py")
        if path not in own
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Constant) and node.value in names
    ]
    assert found == []


def test_machine_code_of_a_format_from_elsewhere_depends_on_its_file(monkeypatch, tmp_path):
    fmt = named("int4")
    assert registry._version(fmt) == ""
    monkeypatch.setattr(registry, "PACKAGE", tmp_path)
    assert registry._version(fmt) != ""
