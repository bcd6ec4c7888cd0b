"""Machine code of the policies is kept, and made anew when any source it depends on changes."""

import ast
import importlib.util
from pathlib import Path

import numba
import numpy as np
import pytest

from hybrimoe.policy import jit

FOLDER = Path(jit.__file__).parent
SOURCE = """
from hybrimoe.policy.jit import compiled

@compiled
def double(x, out):
    out[:] = 2 * x
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    (tmp_path / "tiny.py").write_text(SOURCE)
    (tmp_path / "__pycache__").mkdir(mode=0o700)
    return tmp_path


def was_kept(folder) -> bool:
    """Call the function as a new process would; whether its code came from the disk."""
    spec = importlib.util.spec_from_file_location("tiny", folder / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    out = np.empty(3)
    module.double(np.arange(3.0), out)
    assert out.tolist() == [0, 2, 4]
    return sum(module.double.stats.cache_hits.values()) == 1


def test_a_core_is_compiled_once_per_state_of_all_sources(folder, monkeypatch):
    assert not was_kept(folder)
    assert was_kept(folder)
    monkeypatch.setattr(jit, "_sources_stamp", lambda: "another")
    assert not was_kept(folder)


def test_the_stamp_covers_every_source_with_machine_code():
    stamped = {name for name, _, _ in jit._sources_stamp()}
    every = {path.name for path in FOLDER.glob("*.py")}
    assert stamped == every - jit.NOT_COMPILED
    for path in FOLDER.glob("*.py"):
        text = path.read_text()
        assert "policy.jit" not in text or path.name in stamped, f"{path.name} is compiled"
        assert "njit" not in text or path.name == "jit.py", f"{path.name} has a cache of its own"


def test_no_constant_of_machine_code_comes_from_a_file_outside_the_stamp():
    for path in FOLDER.glob("*.py"):
        if path.name in jit.NOT_COMPILED or "policy.jit" not in path.read_text():
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and f"{node.module}".startswith("hybrimoe.policy."):
                source = f"{node.module.rsplit('.', 1)[1]}.py"
                constants = {alias.name for alias in node.names if alias.name.isupper()}
                rankings = {"LRU", "LFU", "MRS"}
                assert source not in jit.NOT_COMPILED or constants <= rankings, path.name
