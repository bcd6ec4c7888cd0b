"""Run one compiled worker on several threads of the OpenMP runtime that torch already uses.

Two thread pools on the same cores fight: each spins while the other works. So `fork_join` calls
`GOMP_parallel` of the very library torch has loaded, and workers take tiles from an atomic counter.
That also avoids numba's own layers, which abort the process when two threads enter `workqueue`, and
kill a forked child under `omp`.
"""

import ctypes.util
import os
import re
import sys
import threading
import warnings
from pathlib import Path

import llvmlite.binding as llvm
import psutil
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_SYMBOL = "hybrimoe_gomp_parallel"


class Launch:
    """The one gate to the worker threads of this process.

    lock: held for every launch, because scratch buffers are shared and two teams would fight for
    the cores. forked: true in a child, where OpenMP's threads are gone and waiting for them hangs.
    """

    def __init__(self):
        self.lock = threading.Lock()
        self.forked = False
        self.cores = usable_cores()
        self.library = openmp_library()
        self.parallel = self._resolve()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self._after_fork)

    def threads(self, wanted=None):
        """Threads a kernel may use: `wanted`, or one per usable core; 1 in a forked child."""
        if self.forked or not self.parallel:
            return 1
        return wanted or self.cores

    def _after_fork(self):
        self.forked = True
        self.lock = threading.Lock()

    def _resolve(self):
        function = self.library and getattr(ctypes.CDLL(self.library), "GOMP_parallel", None)
        if not function:
            warnings.warn(
                "no OpenMP runtime with GOMP_parallel found: CPU experts run on one thread",
                RuntimeWarning,
                stacklevel=2,
            )
        address = ctypes.cast(function, ctypes.c_void_p).value if function else 0
        # Never called when 0: `threads` then answers 1, and one thread needs no team.
        llvm.add_symbol(
            _SYMBOL,
            address or ctypes.cast(ctypes.pythonapi.Py_IsInitialized, ctypes.c_void_p).value,
        )
        return bool(function)


def usable_cores():
    """Physical cores this process may use, after CPU affinity and the cgroup's quota."""
    cores = psutil.cpu_count(logical=False) or os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        cores = min(cores, len(os.sched_getaffinity(0)))
    return max(1, min(cores, _cgroup_cores()))


def _cgroup_cores():
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return int(quota) // int(period)
    except (OSError, ValueError):  # no cgroup v2, or "max": no quota
        return sys.maxsize


def openmp_library():
    """Path of the OpenMP runtime in this process, torch's own first; None where there is none."""
    name = re.compile(r"lib(gomp|iomp5|omp)\b[-.\w]*$")
    loaded = [path for path in _loaded_libraries() if name.search(path)]
    loaded.sort(key=lambda path: "torch" not in path)
    return next(iter(loaded), None) or ctypes.util.find_library("gomp")


def _loaded_libraries():
    maps = Path("/proc/self/maps")
    if maps.exists():
        return sorted({line.split()[-1] for line in maps.read_text().splitlines()})
    torch = sys.modules.get("torch")
    return [str(path) for path in Path(torch.__file__).parent.glob("lib/*")] if torch else []


@intrinsic
def fork_join(typing, threads, worker, args):
    """Call `worker(*args)` on `threads` threads at once and wait for all of them.

    The worker shares out its work by `simd.take`; its return value and errors are dropped.
    """
    signature = worker.get_call_type(typing, tuple(args), {})

    def codegen(context, builder, sig, values):
        compiled = worker.dispatcher.get_compile_result(signature)
        context.active_code_library.add_linking_library(compiled.library)
        layout = context.get_value_type(args)
        body = _outlined(context, builder.module, compiled, layout, signature)
        box = cgutils.alloca_once(builder, layout)
        builder.store(values[2], box)
        data = builder.bitcast(box, ir.IntType(8).as_pointer())
        count = builder.trunc(values[0], ir.IntType(32))
        alone = builder.icmp_signed("<=", count, ir.IntType(32)(1))
        with builder.if_else(alone) as (serial, parallel):
            with serial:
                builder.call(body, [data])
            with parallel:
                function_type = ir.FunctionType(
                    ir.VoidType(), [body.type, data.type, count.type, count.type]
                )
                gomp = cgutils.get_or_insert_function(builder.module, function_type, _SYMBOL)
                builder.call(gomp, [body, data, count, count.type(0)])
        return context.get_dummy_value()

    return types.void(types.intp, worker, args), codegen


def _outlined(context, module, compiled, layout, signature):
    """`void body(void *data)`: unpack the arguments and call the compiled worker."""
    pointer = ir.IntType(8).as_pointer()
    name = f"{compiled.fndesc.mangled_name}.outlined"
    if name in module.globals:
        return module.globals[name]
    body = ir.Function(module, ir.FunctionType(ir.VoidType(), [pointer]), name)
    body.linkage = "internal"
    builder = ir.IRBuilder(body.append_basic_block())
    packed = builder.load(builder.bitcast(body.args[0], layout.as_pointer()), typ=layout)
    arguments = [builder.extract_value(packed, i) for i in range(len(signature.args))]
    function = context.declare_function(module, compiled.fndesc)
    context.call_conv.call_function(
        builder, function, signature.return_type, signature.args, arguments
    )
    builder.ret_void()
    return body


launch = Launch()
