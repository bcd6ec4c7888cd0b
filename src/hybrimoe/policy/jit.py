"""How the cores of the policies are compiled: plain numba."""

from collections.abc import Callable
from typing import Any

import numba

from hybrimoe.simd.compile import cache_for
from hybrimoe.simd.linking import LinkedCompiler


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function over arrays and numbers, and keep its machine code for the next process."""
    dispatcher = numba.njit(no_cfunc_wrapper=True)(function)
    dispatcher._cache = cache_for(function)
    return dispatcher


def inner(function: Callable[..., Any]) -> Any:
    """A function that only compiled functions call: it becomes part of their cached code."""
    options = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True}
    return numba.njit(pipeline_class=LinkedCompiler, **options)(function)


def inlined(function: Callable[..., Any]) -> Any:
    """A function that becomes part of its compiled callers, because a call costs as much as it."""
    return numba.njit(inline="always")(function)
