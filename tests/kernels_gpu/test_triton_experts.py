"""Experts by Triton: in its interpreter, compiled for a GPU that need not be there, and on one."""

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from gpu_cases import BOUNDS, SILU, Case, compute, error, grid, layer_of, make_batch, partial_sum

from hybrimoe.formats.layout import expert_layout
from hybrimoe.formats.registry import named
from hybrimoe.kernels.gpu import triton_experts
from hybrimoe.kernels.gpu.triton_experts import (
    BLOCKS,
    GROUPS,
    IN_FLIGHT,
    TILES,
    TritonMissingError,
    available,
    run,
)

needs_triton = pytest.mark.skipif(not available(), reason="triton is not installed")
on_gpu = pytest.mark.skipif(
    not (available() and torch.cuda.is_available()), reason="needs triton and a CUDA device"
)
PATHS = {"pairs": False, "tiles": True}
TYPES = {
    **dict.fromkeys(("words", "table"), "*i32"),
    **dict.fromkeys(("out", "y"), "*fp32"),
    **dict.fromkeys(("alpha", "limit", "offset"), "fp32"),
    **dict.fromkeys(("pairs", "tokens"), "i32"),
}
KERNELS = {"up_pairs": False, "down_tokens": False, "up_tiles": True, "down_tiles": True}


@needs_triton
def test_the_interpreter_equals_float64():
    tests = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, "-m", "pytest", "-n0", "-p", "no:cacheprovider", str(tests)]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    print(done.stdout[-3000:], done.stderr[-1000:])

    assert done.returncode == 0


def test_without_triton_using_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(triton_experts, "triton", None)

    assert not available()
    with pytest.raises(TritonMissingError, match="pip install triton"):
        compute(run, Case(), layer_of(Case()), make_batch(Case(), 1))


def test_importing_without_triton_works():
    code = "import sys; sys.modules['triton'] = None; import hybrimoe.kernels.gpu.triton_experts as t; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(t.available())"], capture_output=True, text=True
    )

    assert done.stdout == "False\n"


@needs_triton
def test_importing_asks_for_no_driver():
    code = "import hybrimoe.kernels.gpu.triton_experts as t, torch; print(t.available(), end=' '); "
    code += "print(torch.cuda.is_initialized())"
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )

    assert done.stdout == "True False\n"


@needs_triton
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_spills(name, capability):
    """The interpreter accepts what the compiler does not; Triton brings its own assembler."""
    if KERNELS[name]:
        for precision, dtype in (("ieee", "bf16"), ("tf32x3", "fp32")):
            _, size, warps = TILES[precision][-1]
            tile = {"TILE": size, "BLOCKS": BLOCKS, "GROUPS": GROUPS, "PRECISION": precision}
            assert spilled(name, capability, {"x": dtype, "h": dtype}, tile, warps) == 0
    else:
        units = IN_FLIGHT // named("int4").part_bytes * (2 if name == "down_tokens" else 1)
        types, warps = {"x": "bf16", "h": "fp32"}, 8 if name == "down_tokens" else 4
        assert spilled(name, capability, types, {"UNITS": units}, warps) == 0


def spilled(name, capability, types, constants, warps):
    """Bytes per thread that a kernel keeps in local memory, as it is launched for Qwen3-30B-A3B."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    layout = expert_layout("int4", 2048, 768, True, False)
    constants = triton_experts._constants("int4", layout, SILU.kind, 2048) | constants
    types = TYPES | {name: f"*{dtype}" for name, dtype in types.items()}
    kernel = getattr(triton_experts, name)
    constants = {n: value for n, value in constants.items() if n in kernel.arg_names}
    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, n in enumerate(kernel.arg_names)
        if signature[n].startswith("*")
    }
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": warps}
    compiled = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert ".target sm_" in compiled.asm["ptx"]
    return local_bytes(compiled.asm["cubin"])


def local_bytes(cubin):
    """Stack frame of the one kernel in a cubin, by the disassembler that Triton brings."""
    tool = Path(triton_experts.triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return int(re.search(r"STACK:(\d+)", text)[1])


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("tiled", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("case", grid(), ids=str)
def test_a_gpu_equals_float64(case, tiled):
    assert error(run, case, "cuda", tiled=tiled) < BOUNDS[case.dtype if tiled else "float32"]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("tiled", PATHS.values(), ids=PATHS)
@pytest.mark.parametrize("fmt", ["int4", "float16"])
def test_partial_experts_sum_to_the_whole_on_a_gpu(fmt, tiled):
    assert partial_sum(run, Case(fmt, bias=True), "cuda", tiled=tiled) < BOUNDS["float32"]


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("tiled", PATHS.values(), ids=PATHS)
def test_a_gpu_gives_the_same_bits_every_time(tiled):
    case = Case("int4", "bfloat16", tokens=33, k=5, hidden=512, inner=300)
    layer = layer_of(case)
    batch = make_batch(case, 1)
    first = compute(run, case, layer, batch, "cuda", tiled=tiled)

    for _ in range(10):
        assert torch.equal(first, compute(run, case, layer, batch, "cuda", tiled=tiled))
