"""Experts by Triton: in its interpreter, compiled for a GPU that need not be there, and on one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu_cases import BOUNDS, Case, compute, error, grid, layer_of, make_batch, partial_sum

from hybrimoe.kernels import triton_experts
from hybrimoe.kernels.activations import Gate
from hybrimoe.kernels.layout import expert_layout
from hybrimoe.kernels.triton_experts import TritonMissingError, available, run

needs_triton = pytest.mark.skipif(not available(), reason="triton is not installed")
on_gpu = pytest.mark.skipif(
    not (available() and torch.cuda.is_available()), reason="needs triton and a CUDA device"
)
PATHS = {"pairs": False, "tiles": True}
TYPES = {
    **dict.fromkeys(("words", "token", "slot", "sorted_slot", "shards", "tiles"), "*i32"),
    **dict.fromkeys(("weight", "sorted_weight", "out", "y"), "*fp32"),
    **dict.fromkeys(("alpha", "limit", "offset"), "fp32"),
    **{"x": "*bf16", "pairs": "i32"},
}


@needs_triton
def test_the_interpreter_equals_float64():
    tests = Path(__file__).with_name("interpreted.py")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(tests)]
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
    code = "import sys; sys.modules['triton'] = None; import hybrimoe.kernels.triton_experts as t; "
    done = subprocess.run(
        [sys.executable, "-c", code + "print(t.available())"], capture_output=True, text=True
    )

    assert done.stdout == "False\n"


@needs_triton
@pytest.mark.parametrize("name", ["_up_pairs", "_down_tokens", "_up_tiles", "_down_tiles"])
@pytest.mark.parametrize("capability", [89, 90])
def test_compiles_for_ada_and_hopper(name, capability):
    """The interpreter accepts what the compiler does not; Triton brings its own assembler."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    layout = expert_layout("int4", 256, 512, True, True)
    x = torch.empty(1, 256, dtype=torch.bfloat16)
    constants = triton_experts._constants("int4", layout, Gate(0), x, True)
    pairs, tiles = {"PAIRS": 128, "UNITS": 32}, {"TILE": 16, "BLOCKS": 4, "GROUPS": 2}
    constants |= tiles if "tiles" in name else pairs
    types = TYPES | {"h": "*bf16" if "tiles" in name else "*fp32"}
    kernel = getattr(triton_experts, name)
    signature = {n: "constexpr" if n in constants else types[n] for n in kernel.arg_names}
    source = ASTSource(kernel, signature, constants)
    compiled = compile(source, target=GPUTarget("cuda", capability, 32))

    assert len(compiled.asm["cubin"]) > 0


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
