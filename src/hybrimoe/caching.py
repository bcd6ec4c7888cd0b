"""A disk cache of compiled functions that survives damage and knows every source it depends on.

numba's cache is a folder of pickles: a truncated file raises on the first call instead of being
compiled again, a planted one runs code, and one that was compiled with a function of another file is
not compiled again when that file changes. `GuardedCache` recompiles in the first and the last case
and stays away from folders that others may write to in the second.
"""

import contextlib
import os
import pickle
import stat
import warnings
from collections.abc import Callable, Container
from pathlib import Path
from typing import Any

from numba.core.caching import FunctionCache, NullCache

Stamp = tuple[tuple[str, int, int], ...]


def cache_for(function: Callable[..., Any], stamp: object) -> FunctionCache:
    """Where the machine code of a function is kept; `stamp` is what it depends on."""
    try:
        cache = GuardedCache(function, stamp)
    except RuntimeError:  # numba found no folder it may write to
        return NullCache()
    problem = folder_problem(cache.cache_path)
    if problem:
        warnings.warn(f"compiled kernels are not cached: {problem}", RuntimeWarning, stacklevel=4)
        return NullCache()
    return cache


def sources_stamp(folder: Path, leaving_out: Container[str] = ()) -> Stamp:
    """Name, time and size of each source in a folder, but for those named."""
    files = sorted(file for file in folder.glob("*.py") if file.name not in leaving_out)
    return tuple((file.name, file.stat().st_mtime_ns, file.stat().st_size) for file in files)


def folder_problem(path: str) -> str | None:
    """Why a folder of executable pickles cannot be trusted, or None."""
    if not os.path.isdir(path) or not hasattr(os, "geteuid"):
        return None
    status = os.stat(path)
    if status.st_uid != os.geteuid():
        return f"{path} belongs to another user"
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"{path} can be written by others; make it private with chmod go-w"
    return None


class GuardedCache(FunctionCache):  # type: ignore[misc]
    """numba's cache, keyed on all sources of a stamp, that recompiles what it cannot read or write."""

    def __init__(self, function: Callable[..., Any], stamp: object) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = stamp

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The code of one signature, or None where it must be compiled."""
        try:
            return super().load_overload(sig, target_context)
        except (pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, IndexError):
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the code of one signature, if that is possible."""
        # A full disk or a read-only folder costs the next process a compilation, not this one a call.
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)
