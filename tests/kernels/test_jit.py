"""The disk cache of compiled kernels: damage is repaired, and foreign code is not run."""

import importlib.util
import os
import pickle
import warnings
from pathlib import Path

import numba
import numpy as np
import pytest

from hybrimoe.kernels.cpu import experts
from hybrimoe.simd import compile as caching
from hybrimoe.simd import jit

SOURCE = """
from hybrimoe.simd.jit import kernel

@kernel
def double(x, out):
    for i in range(x.size):
        out[i] = 2 * x[i]
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a tiny kernel, whose cache lies in its own __pycache__."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    (tmp_path / "tiny.py").write_text(SOURCE)
    (tmp_path / "__pycache__").mkdir(mode=0o700)
    return tmp_path


def load(folder):
    """The kernel as a new process would see it."""
    spec = importlib.util.spec_from_file_location("tiny", folder / "tiny.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.double


def call(kernel):
    """Whether the result came from the disk cache; checks that it is right."""
    x, out = np.arange(5, dtype=np.float32), np.full(5, np.nan, np.float32)
    kernel(x, out)
    assert out.tolist() == [0, 2, 4, 6, 8]
    return sum(kernel.stats.cache_hits.values()) == 1


def cached(folder, suffix):
    (found,) = (folder / "__pycache__").glob(f"*.{suffix}")
    return found


def test_a_kernel_is_compiled_once(folder):
    assert not call(load(folder))
    assert call(load(folder))


@pytest.mark.parametrize("keep", [0.0, 0.02, 0.9], ids=["empty", "header", "most"])
@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_truncated_file_is_compiled_again(folder, suffix, keep):
    call(load(folder))
    path = cached(folder, suffix)
    content = path.read_bytes()
    path.write_bytes(content[: int(keep * len(content))])
    assert not call(load(folder))
    assert call(load(folder))  # and is whole again


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
def test_a_missing_file_is_compiled_again(folder, suffix):
    call(load(folder))
    cached(folder, suffix).unlink()
    assert not call(load(folder))
    assert call(load(folder))


def test_a_change_in_any_kernel_source_compiles_again(folder, monkeypatch):
    call(load(folder))
    monkeypatch.setattr(caching, "stamp_of", lambda file: "another")
    assert not call(load(folder))


def test_a_kernel_depends_on_its_imports_and_theirs():
    names = {path.name for path in caching.sources_of(Path(experts.__file__))}
    assert {
        "experts.py",
        "registry.py",
        "integer.py",
        "k_types.py",
        "isa.py",
        "vectors.py",
    } <= names
    assert names.isdisjoint({"run_layer.py", "torch_experts.py", "workspace.py"})


def test_the_stamp_shows_that_a_source_has_changed(tmp_path, monkeypatch):
    (tmp_path / "low.py").write_text("A = 1\n")
    (tmp_path / "high.py").write_text("from hybrimoe.low import (\n    A as B,\n)\n")
    monkeypatch.setattr(caching, "PACKAGE", tmp_path)
    before = caching.stamp_of(tmp_path / "high.py")
    (tmp_path / "low.py").write_text("A = 12\n")
    assert [name for name, *_ in before] == ["high.py", "low.py"]
    assert caching.stamp_of(tmp_path / "high.py") != before


class Canary:
    """Unpickling it creates a file: what a planted cache would do to a user."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no such owners or modes here")
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702], ids=oct)
def test_a_planted_cache_in_a_folder_of_others_never_runs(folder, mode):
    call(load(folder))
    canary = folder / "canary"
    poison = pickle.dumps(Canary(canary))
    for suffix in ("nbi", "nbc"):
        cached(folder, suffix).write_bytes(poison)
    (folder / "__pycache__").chmod(mode)
    with pytest.warns(RuntimeWarning, match="not cached: .*can be written by others"):
        kernel = load(folder)
    assert not call(kernel)
    assert not canary.exists()
    assert cached(folder, "nbi").read_bytes() == poison  # neither read nor written
    pickle.loads(poison)
    assert canary.exists()  # it would have sung


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no such owners or modes here")
def test_a_folder_of_another_user_is_refused(folder, monkeypatch):
    monkeypatch.setattr(caching.os, "geteuid", lambda: os.getuid() + 1)
    with pytest.warns(RuntimeWarning, match="belongs to another user"):
        assert not call(load(folder))


def test_a_private_folder_is_trusted_silently(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(load(folder))


def test_without_a_folder_kernels_still_compile(folder, monkeypatch):
    def nowhere(function, stamp):
        raise RuntimeError("cannot cache function: no locator available")

    monkeypatch.setattr(caching, "GuardedCache", nowhere)
    for _ in range(2):
        assert not call(load(folder))


def test_two_processes_do_not_compile_the_same_signature_at_once(folder, monkeypatch):
    monkeypatch.setattr(caching, "PATIENCE_S", 0.05)
    array = numba.float32[::1]
    first, second = load(folder), load(folder)
    assert first._cache._claim((array, array))  # as before it compiles
    assert not second._cache._claim((array, array))
    assert second._cache._claim((array, numba.float64[::1]))
    call(first)
    assert second._cache._claim((array, array))


def test_one_lock_per_kernel_is_left_behind(folder):
    assert not call(load(folder))
    cached(folder, "index.lock")
    assert len([*(folder / "__pycache__").glob("*.lock")]) == 1


def test_where_no_lock_can_be_made_kernels_still_compile(folder, monkeypatch):
    def refuse(self, *_):
        raise PermissionError("read-only file system")

    monkeypatch.setattr(caching.FileLock, "acquire", refuse)
    assert not call(load(folder))


def test_not_a_number_survives_fastmath():
    assert not jit.FASTMATH & {"nnan", "ninf", "fast"}
