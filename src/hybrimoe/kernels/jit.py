"""How every kernel is compiled, and a disk cache that survives damage.

numba's cache is a folder of pickles: a truncated file raises on the first call instead of being
compiled again, and a planted one runs code. `GuardedCache` recompiles in the first case and stays
away from folders that others may write to in the second.
"""

import contextlib
import functools
import os
import pickle
import stat
import warnings
from pathlib import Path

import numba
from numba.core.caching import FunctionCache, NullCache

FASTMATH = {"nsz", "arcp", "contract", "afn", "reassoc"}
"""No nnan and no ninf: a broken model must show its NaN."""

NOT_COMPILED = {"reference.py", "torch_experts.py", "triton_experts.py", "moe.py"}
_OPTIONS = {"fastmath": FASTMATH, "nogil": True, "error_model": "numpy", "_nrt": False}
INLINED = {"fastmath": FASTMATH, "forceinline": True, "_nrt": False}
"""Options of the overloads that make up an inner loop."""


def inner(function):
    """Compile a function that only kernels call: it becomes part of their cached code."""
    return numba.njit(**_OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)


def inlined(function):
    """An `inner` function that must melt into its caller, because a call costs as much as its work."""
    return numba.njit(**_OPTIONS, forceinline=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)(
        function
    )


def kernel(function):
    """Compile an entry point: machine code without the GIL, cached on disk."""
    dispatcher = numba.njit(**_OPTIONS)(function)
    dispatcher._cache = _cache_for(function)
    return dispatcher


def _cache_for(function):
    try:
        cache = GuardedCache(function)
    except RuntimeError:  # numba found no folder it may write to
        return NullCache()
    problem = folder_problem(cache.cache_path)
    if problem:
        warnings.warn(f"compiled kernels are not cached: {problem}", RuntimeWarning, stacklevel=3)
        return NullCache()
    return cache


def folder_problem(path):
    """Why a folder of executable pickles cannot be trusted, or None."""
    if not os.path.isdir(path) or not hasattr(os, "geteuid"):
        return None
    status = os.stat(path)
    if status.st_uid != os.geteuid():
        return f"{path} belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by others; make it private with chmod go-w"
    return None


class GuardedCache(FunctionCache):
    """numba's cache, keyed on all kernel sources, that recompiles what it cannot read or write."""

    def __init__(self, function):
        super().__init__(function)
        self._cache_file._source_stamp = _sources_stamp()

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except (pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, IndexError):
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig, data):
        # A full disk or a read-only folder costs the next process a compilation, not this one a call.
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)


@functools.cache
def _sources_stamp():
    # An inlined function lives in another file than its caller; numba watches only the caller's.
    folder = Path(__file__).parent
    files = sorted(f for f in folder.glob("*.py") if f.name not in NOT_COMPILED)
    return tuple((f.name, f.stat().st_mtime_ns, f.stat().st_size) for f in files)
