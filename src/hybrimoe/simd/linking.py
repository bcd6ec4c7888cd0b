"""Functions that become part of their compiled callers: only the caller's code is optimized.

numba optimizes a called function and emits machine code for it, then links its LLVM module into each
caller and does both again, once per level of calls. The kernels are five levels deep and call their
inner functions from nowhere else, so that machine code is never run. Leaving it out halves the
seconds that a kernel takes to compile, and the kernel computes the same bits.
"""

from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler


class LinkedLibrary(JITCodeLibrary):  # type: ignore[misc]
    """An LLVM module as it was lowered, which is neither optimized nor given to the engine."""

    @property
    def codegen(self) -> Any:
        """The code generator, as far as a function without machine code needs one."""
        return _WithoutEngine(self._codegen)

    def get_pointer_to_function(self, name: str) -> int:
        """Zero: there is no machine code."""
        self._ensure_finalized()
        return 0

    def _optimize_functions(self, ll_module: Any) -> None:
        ll_module.data_layout = self._codegen._data_layout

    def _optimize_final_module(self) -> None:
        """The caller's optimization sees this code as part of its own."""

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()
        self._finalized = True


class OptimizedLibrary(LinkedLibrary):
    """A linked module that is optimized by itself first."""

    def _optimize_functions(self, ll_module: Any) -> None:
        JITCodeLibrary._optimize_functions(self, ll_module)

    def _optimize_final_module(self) -> None:
        JITCodeLibrary._optimize_final_module(self)


class LinkedCompiler(Compiler):  # type: ignore[misc]
    """For `numba.njit(pipeline_class=...)`: code that is good for nothing but linking.

    Such a function is called by compiled functions alone, and needs `no_cpython_wrapper` and
    `no_cfunc_wrapper`.
    """

    library_class = LinkedLibrary

    def __init__(self, typingctx: Any, targetctx: Any, library: Any, *rest: Any) -> None:
        if library is None:
            library = self.library_class(targetctx.codegen(), "linked")
            library.enable_object_caching()
        super().__init__(typingctx, targetctx, library, *rest)


class LoopCompiler(LinkedCompiler):
    """For innermost loops: optimized before they are linked, and again as a part of the caller.

    The second round unrolls further, which makes int8 kernels 1.1x as fast on many tokens.
    """

    library_class = OptimizedLibrary


class _WithoutEngine:
    """A code generator that does not look for the environment of a function in the engine."""

    def __init__(self, codegen: Any) -> None:
        self._codegen = codegen

    def set_env(self, env_name: str, env: Any) -> None:
        """Only what Python calls has an environment."""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._codegen, name)
