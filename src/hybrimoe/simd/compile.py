"""A disk cache of compiled functions that survives damage and knows every source it depends on.

numba's cache is a folder of pickles: a truncated file raises on the first call instead of being
compiled again, a planted one runs code, and one that was compiled with a function of another file is
not compiled again when that file changes. `GuardedCache` recompiles in the first and the last case
and stays away from folders that others may write to in the second. Nor does numba know of other
processes: two that compile at once give two functions one file, and the loser's name leads to the
winner's code. Here one waits for the other.
"""

import contextlib
import functools
import hashlib
import os
import pickle
import re
import stat
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from numba.core.caching import FunctionCache, NullCache

Stamp = tuple[tuple[str, int, int], ...]
PACKAGE = Path(__file__).parent.parent
IMPORT = re.compile(r"^from (hybrimoe[\w.]*) import (\([^)]*\)|[^\n]*)", re.MULTILINE)
PATIENCE_S = 120.0
"""How long to wait for a process that compiles the same function, before doing it too."""


def cache_for(function: Callable[..., Any]) -> FunctionCache:
    """Where the machine code of a function is kept."""
    try:
        cache = GuardedCache(function, stamp_of(Path(function.__code__.co_filename)))
    except RuntimeError:  # numba found no folder it may write to
        return NullCache()
    problem = folder_problem(cache.cache_path)
    if problem:
        warnings.warn(f"compiled kernels are not cached: {problem}", RuntimeWarning, stacklevel=4)
        return NullCache()
    return cache


def stamp_of(file: Path) -> Stamp:
    """Name, time and size of all sources that the compiled functions of a file may be made of.

    Functions and constants of other files become part of the machine code, and numba watches only the
    function's own. A file can only use what it imports, so these are its imports, and theirs.
    """
    stats = ((each.name, each.stat()) for each in sources_of(file))
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


def sources_of(file: Path) -> list[Path]:
    """A source and all files of this package that it imports, directly or not, in order of names."""
    found, pending = {file}, [file]
    while pending:
        for imported in imports_of(pending.pop()) - found:
            found.add(imported)
            pending.append(imported)
    return sorted(found)


@functools.cache
def imports_of(file: Path) -> set[Path]:
    """The files of this package that a source imports when it is imported itself."""
    found = set()
    for module, names in IMPORT.findall(file.read_text()):
        place = PACKAGE.joinpath(*module.split(".")[1:])
        inside = {
            place / f"{name.split()[0]}.py" for name in names.strip("()").split(",") if name.strip()
        }
        found |= {path for path in (place.with_suffix(".py"), *inside) if path.is_file()}
    return found


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
        self._claims: dict[Any, FileLock] = {}

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The code of one signature, or None where it must be compiled, which nobody else does then."""
        found = self._load(sig, target_context)
        if found is not None or not self._claim(sig):
            return found
        return self._load(sig, target_context)  # whoever had the claim may have kept it meanwhile

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the code of one signature, if that is possible."""
        # A full disk or a read-only folder costs the next process a compilation, not this one a call.
        with contextlib.suppress(OSError, Timeout), self._lock("index"):
            super().save_overload(sig, data)
        self._release(sig)

    def holds_any(self) -> bool:
        """Whether some signature is kept that was compiled from the sources as they are."""
        try:
            return bool(self._cache_file._load_index())
        except (pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, IndexError):
            return False

    def _load(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except (pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, IndexError):
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def _claim(self, sig: Any) -> bool:
        """Wait until no other process compiles this signature; false where that cannot be known."""
        lock = self._lock(hashlib.sha256(str(sig).encode()).hexdigest()[:16])
        with contextlib.suppress(OSError, Timeout):
            lock.acquire()
            self._claims[sig] = lock
        return sig in self._claims

    def _release(self, sig: Any) -> None:
        lock = self._claims.pop(sig, None)
        if lock is not None:
            lock.release()
            with contextlib.suppress(OSError):
                os.unlink(lock.lock_file)

    def _lock(self, name: str) -> FileLock:
        path = os.path.join(self.cache_path, f"{self._cache_file._index_name}.{name}.lock")
        return FileLock(path, timeout=PATIENCE_S)
