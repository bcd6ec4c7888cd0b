"""Machine code of the policies is kept, and made anew when any source it depends on changes."""

import importlib.util
from pathlib import Path

import numba
import numpy as np
import pytest

from hybrimoe.policy import jit
from hybrimoe.simd import compile as caching

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
    monkeypatch.setattr(caching, "stamp_of", lambda file: "another")
    assert not was_kept(folder)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_machine_code_is_cached_by_one_function_alone(path):
    text = path.read_text()
    assert "njit" not in text or path.name == "jit.py", f"{path.name} has a cache of its own"


def test_who_compiles_nothing_makes_nothing_compile_again():
    names = {path.name for path in caching.sources_of(FOLDER / "slots.py")}
    assert {"slots.py", "jit.py", "timeline.py"} <= names
    assert names.isdisjoint({"engine.py", "cache.py", "presets.py"})
