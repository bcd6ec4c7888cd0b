"""How the cores of the policies are compiled: plain numba, cached on disk with all sources as key."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba

from hybrimoe.caching import Stamp, cache_for, sources_stamp
from hybrimoe.linking import LinkedCompiler

NOT_COMPILED = {
    *("cache.py", "checking.py", "drawing.py", "engine.py", "fitting.py", "presets.py"),
    *("profiles.py", "ranking.py", "recording.py", "rehearsal.py", "sizes.py", "sources.py"),
    *("statistics.py", "synthesis.py"),
}
"""Files without compiled functions, and without constants that compiled functions read."""


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function over arrays and numbers, and keep its machine code for the next process."""
    dispatcher = numba.njit(no_cfunc_wrapper=True)(function)
    dispatcher._cache = cache_for(function, _sources_stamp())
    return dispatcher


def inner(function: Callable[..., Any]) -> Any:
    """A function that only compiled functions call: it becomes part of their cached code."""
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return numba.njit(pipeline_class=LinkedCompiler, **options)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A function that becomes part of its compiled callers, because a call costs as much as it."""
    return numba.njit(inline="always")(function)


@functools.cache
def _sources_stamp() -> Stamp:
    # Constants and functions of other files are part of the machine code; numba watches only one.
    return sources_stamp(Path(__file__).parent, NOT_COMPILED)
