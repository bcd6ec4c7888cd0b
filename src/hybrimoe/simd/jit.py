"""How every kernel is compiled, and what its cached machine code depends on."""

import numba

from hybrimoe.simd.compile import cache_for
from hybrimoe.simd.linking import LinkedCompiler, LoopCompiler

FASTMATH = {"nsz", "arcp", "contract", "afn", "reassoc"}
"""No nnan and no ninf: a broken model must show its NaN."""

_OPTIONS = {"fastmath": FASTMATH, "nogil": True, "error_model": "numpy", "_nrt": False}
_LINKED = {"no_cpython_wrapper": True, "no_cfunc_wrapper": True, "pipeline_class": LinkedCompiler}
INLINED = (
    {"fastmath": FASTMATH, "forceinline": True, "_nrt": False}
    | _LINKED
    | {"pipeline_class": LoopCompiler}
)
"""Options of the overloads that make up an inner loop."""


def inner(function):
    """Compile a function that only kernels call: it becomes part of their cached code."""
    return numba.njit(**_OPTIONS, **_LINKED)(function)


def inlined(function):
    """An `inner` function that must melt into its caller, because a call costs as much as its work."""
    return numba.njit(**_OPTIONS, forceinline=True, **_LINKED)(function)


def kernel(function):
    """Compile an entry point: machine code without the GIL, cached on disk."""
    dispatcher = numba.njit(**_OPTIONS, no_cfunc_wrapper=True)(function)
    dispatcher._cache = cache_for(function)
    return dispatcher
