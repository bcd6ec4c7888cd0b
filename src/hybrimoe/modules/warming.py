"""What a model needs compiled, ahead of its first token: each kernel runs once on a tiny layer."""

from __future__ import annotations

import functools
import multiprocessing
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from hybrimoe.formats.base import SUPER
from hybrimoe.formats.gate import Gate
from hybrimoe.formats.layout import expert_layout
from hybrimoe.kernels.cpu.linear import run_linear
from hybrimoe.kernels.cpu.rms_norm import run_norm
from hybrimoe.kernels.cpu.run_layer import PackedLayer, run_layer
from hybrimoe.kernels.cpu.workspace import Workspace
from hybrimoe.models import weights as formats
from hybrimoe.models.weights import ExpertWeights
from hybrimoe.modules.packed_linear import head_format, pack_matrix
from hybrimoe.policy.rehearsal import rehearse
from hybrimoe.policy.split import plan_split
from hybrimoe.simd.isa import HOST_ISA
from hybrimoe.simd.stopwatch import SOON, stopwatch
from hybrimoe.simd.threads import launch

if TYPE_CHECKING:
    from hybrimoe.modules.pooled_experts import PooledExperts


ISA_NAMES = {"avx512vnni": "AVX512-VNNI", "avx2": "AVX2", "neon": "NEON", "portable": "plain code"}
DTYPES = {name: dtype for dtype, name in formats.NATIVE.items()}
SIZE = SUPER
"""D and F of the tiny layer, which every format can hold."""


class Need(NamedTuple):
    """One thing to compile. kind: of `KINDS`; fmt and dtype: as the kernel knows them, or empty."""

    kind: str
    fmt: str = ""
    dtype: str = ""


def warm(needs: Iterable[Need]) -> None:
    """Compile what is neither in this process nor on the disk, and say so if it takes a while."""
    wanted = list(dict.fromkeys(needs))
    aside = _policies_aside(wanted)
    shown = ", ".join(dict.fromkeys(need.fmt for need in wanted if need.fmt)) or "the policies"
    what, since = f"compiling kernels for {shown} on {ISA_NAMES[HOST_ISA]}", stopwatch.seconds
    try:
        for number, need in enumerate(wanted, 1):
            text = f"hybrimoe: {what}, once per machine: {number} of {len(wanted)}"
            with stopwatch.saying(text, since):
                if aside is not None and need.kind == "policies":
                    _wait_for(aside)
                run_once(need)
    finally:
        if aside is not None and aside.poll() is None:  # interrupted: nobody waits for it any more
            aside.kill()
            aside.wait()


def compile_apart(needs: Iterable[Need]) -> Iterator[tuple[Need, float]]:
    """Fill the disk cache from several processes; each need as it is ready, and what it took.

    0 seconds where it was there already.
    """
    wanted = list(dict.fromkeys(needs))
    workers = min(launch.cores, len(wanted))
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from zip(wanted, pool.map(seconds_of, wanted))


def seconds_of(need: Need) -> float:
    """Run a kernel once; the seconds that this process compiled for it."""
    before = stopwatch.seconds
    run_once(need)
    return stopwatch.seconds - before


@functools.cache
def run_once(need: Need) -> None:
    """Make one kernel ready in this process."""
    KINDS[need.kind](need.fmt, need.dtype)


def needs_of(layers: Iterable[PooledExperts], linear: str | None, shared: bool) -> list[Need]:
    """What a wrapped model's first pass runs. shared: its experts run beside an accelerator too."""
    kinds = sorted({(layer.packed.fmt, formats.NATIVE[layer.dtype]) for layer in layers})
    return needs_for(kinds, linear, shared)


def needs_for(layers: list[tuple[str, str]], linear: str | None, shared: bool) -> list[Need]:
    """The same of layers of (format, dtype). Beside an accelerator experts sum in float32."""
    needs = [Need("experts", fmt, "float32" if shared else dtype) for fmt, dtype in layers]
    if linear is not None:
        for _, dtype in layers:
            needs += [Need("linear", fmt, dtype) for fmt in (linear, head_format())]
            needs.append(Need("norm", "", dtype))
    return [*needs, Need("policies")] if shared else needs


def _wait_for(aside: subprocess.Popen[bytes]) -> None:
    try:
        aside.wait(SOON)
    except subprocess.TimeoutExpired:
        stopwatch.speak()
        aside.wait()


def _policies_aside(wanted: list[Need]) -> subprocess.Popen[bytes] | None:
    """A process that compiles the policies into the disk cache while this one compiles kernels.

    None where they are there already, or nothing could be kept, or nothing else is to be done.
    """
    folder = getattr(plan_split._cache, "cache_path", None)
    alone = len(wanted) < 2 or launch.cores < 2 or Need("policies") not in wanted
    # An application that was frozen into one file is its own `sys.executable`, and would start again.
    has_python = bool(sys.executable) and not getattr(sys, "frozen", False)
    if alone or folder is None or not has_python or plan_split._cache.holds_any():
        return None
    code = f"import sys; sys.path[:0] = {sys.path!r}; "
    code += "from hybrimoe.policy.rehearsal import rehearse; rehearse()"
    quiet = subprocess.DEVNULL
    return subprocess.Popen([sys.executable, "-c", code], stdin=quiet, stdout=quiet, stderr=quiet)


def _experts(fmt: str, dtype: str) -> None:
    layer = _layer(fmt)
    x, out = _tokens(dtype), _tokens(dtype)
    ids, weights = np.zeros((1, 1), np.int64), np.zeros((1, 1), np.float32)
    run_layer(layer, x, ids, weights, out, Workspace(), dtype, 1)


def _packing(fmt: str, dtype: str) -> None:
    layer = _layer(fmt)
    formats.pack(fmt, layer.layout, _weights(dtype), layer.blobs)


def _unpacking(fmt: str, dtype: str) -> None:
    layer = _layer(fmt)
    formats.unpack(fmt, layer.layout, layer.blobs, _weights(dtype))


def _linear(fmt: str, dtype: str) -> None:
    matrix = pack_matrix(fmt, torch.nn.Linear(SIZE, SIZE, bias=False, dtype=DTYPES[dtype]))
    run_linear(matrix, _tokens(dtype), _tokens(dtype), Workspace(), dtype, 1)


def _norm(fmt: str, dtype: str) -> None:
    run_norm(_tokens(dtype), _tokens(dtype)[0], _tokens(dtype), 1e-6, 0.0, True, dtype)


def _policies(fmt: str, dtype: str) -> None:
    rehearse()


def _layer(fmt: str) -> PackedLayer:
    layout = expert_layout(fmt, SIZE, SIZE, True, False)
    return PackedLayer(fmt, layout, Gate(0), SIZE, np.zeros((1, layout.expert_bytes), np.uint8))


def _tokens(dtype: str) -> np.ndarray:
    return np.zeros((1, SIZE), np.float32 if dtype == "float32" else np.uint16)


def _weights(dtype: str) -> ExpertWeights:
    """The weights of one expert, all zero."""
    up = torch.zeros(1, 2, SIZE, SIZE, dtype=DTYPES[dtype])
    return ExpertWeights(up, up[:, 0], Gate(0))


KINDS: dict[str, Callable[[str, str], None]] = {
    "experts": _experts,
    "packing": _packing,
    "unpacking": _unpacking,
    "linear": _linear,
    "norm": _norm,
    "policies": _policies,
}
