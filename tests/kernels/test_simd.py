"""Instruction sets: which one is chosen, and the int8 dot product of each."""

import ctypes

import llvmlite.binding as llvm
import numpy as np
import pytest
from llvmlite import ir

from hybrimoe.simd import isa as dots
from hybrimoe.simd import vectors as simd
from hybrimoe.simd.isa import ISAS, detect_isa, runs_here

HERE = [isa for isa in ISAS if runs_here(isa)]
ABSENT = [isa for isa in ISAS if not runs_here(isa)]
SDOT = "llvm.aarch64.neon.sdot.v4i32.v16i8"
SDOT_MODEL = """
define <4 x i32> @sdot_model(<4 x i32> %total, <16 x i8> %a, <16 x i8> %b) {
  %wide_a = sext <16 x i8> %a to <16 x i32>
  %wide_b = sext <16 x i8> %b to <16 x i32>
  %product = mul <16 x i32> %wide_a, %wide_b
  %part0 = shufflevector <16 x i32> %product, <16 x i32> undef, <4 x i32> <i32 0, i32 4, i32 8, i32 12>
  %part1 = shufflevector <16 x i32> %product, <16 x i32> undef, <4 x i32> <i32 1, i32 5, i32 9, i32 13>
  %part2 = shufflevector <16 x i32> %product, <16 x i32> undef, <4 x i32> <i32 2, i32 6, i32 10, i32 14>
  %part3 = shufflevector <16 x i32> %product, <16 x i32> undef, <4 x i32> <i32 3, i32 7, i32 11, i32 15>
  %sum0 = add <4 x i32> %part0, %part1
  %sum1 = add <4 x i32> %part2, %part3
  %sum = add <4 x i32> %sum0, %sum1
  %result = add <4 x i32> %total, %sum
  ret <4 x i32> %result
}
"""
"""What the instruction SDOT does, in plain LLVM: four sums of four products of signed bytes."""


def dot_module(isa, nibbles):
    """LLVM module with void dot(int32 total[16], int8 weights[64], int32 *quad), total updated."""
    module = ir.Module()
    pointers = [t.as_pointer() for t in (simd.INTS.llvm, simd.BYTES.llvm, simd.I32)]
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), pointers), "dot")
    builder = ir.IRBuilder(function.append_basic_block())
    total, weights, quad = (builder.load(arg, align=1) for arg in function.args)
    result = dots._DOTS[isa](builder, total, weights, quad, nibbles)
    builder.store(result, function.args[0], align=1)
    builder.ret_void()
    return str(module)


def compile_here(text):
    """An engine with the module `text`, and its function `dot` for numpy arrays."""
    features = llvm.get_host_cpu_features().flatten()
    target = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=features
    )
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(text), target)
    engine.finalize_object()
    signature = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 3)
    function = signature(engine.get_function_address("dot"))
    return engine, lambda *arrays: function(*(a.ctypes.data for a in arrays))


def check_dot(text, isa, nibbles):
    """Compare with int arithmetic: random bytes and both extremes, where 16 bits saturate."""
    _engine, dot = compile_here(text)
    rng = np.random.default_rng(0)
    low, high = (0, 63) if nibbles else (-127, 127)
    for trial in range(200):
        weights = rng.integers(low, high + 1, 64).astype(np.int8)
        x = rng.integers(-127, 128, 4).astype(np.int8)
        if trial % 2:
            weights, x = rng.choice([low, high], 64).astype(np.int8), np.sign(x) * np.int8(127)
        start = rng.integers(-(10**6), 10**6, 16).astype(np.int32)
        total = start.copy()
        dot(total, weights, x)
        offset = 128 if isa == "avx512vnni" and not nibbles else 0  # `start_bytes` takes it back
        wide = weights.reshape(16, 4).astype(np.int64) + offset
        assert np.array_equal(total, start + wide @ x.astype(np.int64))


@pytest.mark.parametrize("nibbles", [True, False], ids=["nibbles", "bytes"])
@pytest.mark.parametrize("isa", HERE)
def test_dot_product_is_exact(isa, nibbles):
    check_dot(dot_module(isa, nibbles), isa, nibbles)


@pytest.mark.parametrize("nibbles", [True, False], ids=["nibbles", "bytes"])
def test_neon_dot_product_is_exact_given_what_sdot_does(nibbles):
    # No ARM machine here: everything but the instruction itself is executed.
    text = dot_module("neon", nibbles).replace(SDOT, "sdot_model")
    lines = [line for line in text.splitlines() if not line.startswith("declare")]
    check_dot("\n".join(lines) + SDOT_MODEL, "neon", nibbles)


@pytest.mark.parametrize("nibbles", [True, False], ids=["nibbles", "bytes"])
def test_neon_dot_product_becomes_four_sdot_instructions(nibbles):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple("aarch64-linux-gnu")
    except RuntimeError:
        pytest.skip("this llvmlite has no AArch64 backend")
    machine = target.create_target_machine(cpu="generic", features="+neon,+dotprod", opt=3)
    module = llvm.parse_assembly(dot_module("neon", nibbles))
    module.triple = "aarch64-linux-gnu"
    assert machine.emit_assembly(module).count("\tsdot\t") == 4


def test_the_fastest_instruction_set_is_chosen(monkeypatch):
    monkeypatch.delenv("HYBRIMOE_ISA", raising=False)
    assert detect_isa() == HERE[0]


@pytest.mark.parametrize("isa", HERE)
def test_the_environment_may_choose_another(monkeypatch, isa):
    monkeypatch.setenv("HYBRIMOE_ISA", isa)
    assert detect_isa() == isa


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("HYBRIMOE_ISA", "bogus")
    with pytest.raises(ValueError, match=r"HYBRIMOE_ISA must be one of avx512vnni.*got 'bogus'"):
        detect_isa()


@pytest.mark.parametrize("isa", ABSENT)
def test_an_instruction_set_of_another_machine_is_refused(monkeypatch, isa):
    monkeypatch.setenv("HYBRIMOE_ISA", isa)
    with pytest.raises(ValueError, match=f"HYBRIMOE_ISA={isa} needs instructions"):
        detect_isa()


def test_the_portable_path_runs_everywhere():
    assert "portable" in HERE
