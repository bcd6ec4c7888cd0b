"""Scalars of the torch dtypes that numba does not know: bfloat16 and float16 travel as uint16 bits."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from hybrimoe.simd.jit import INLINED
from hybrimoe.simd.vectors import Tag, bits_to_float, float_to_bits

DTYPES = {name: Tag("dtype", name) for name in ("bfloat16", "float16", "float32")}
F16 = DTYPES["float16"]


@intrinsic
def _f16_to_f32(typing, bits):
    def codegen(context, builder, sig, args):
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), codegen


@intrinsic
def _f32_to_f16(typing, value):
    def codegen(context, builder, sig, args):
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), codegen


def _bf16_to_f32(dtype, number):
    return bits_to_float(np.int32(np.uint32(number) << np.uint32(16)))


def _f32_to_bf16(dtype, value):
    # Round to nearest even; a NaN would round to infinity, so it keeps its upper half instead.
    bits = np.uint32(float_to_bits(value))
    rounded = bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
    return np.uint16((rounded if value == value else bits | np.uint32(0x400000)) >> np.uint32(16))


def widen(dtype, number):
    """float32 of one stored number."""
    raise TypeError("widen runs only inside a kernel")


def narrow(dtype, value):
    """A float32 rounded to how `dtype` is stored; beyond the range of float16 it is infinite."""
    raise TypeError("narrow runs only inside a kernel")


@overload(widen, jit_options=INLINED)
def _choose_widen(dtype, number):
    return {
        "bfloat16": _bf16_to_f32,
        "float16": lambda dtype, number: _f16_to_f32(number),
        "float32": lambda dtype, number: number,
    }[dtype.value]


@overload(narrow, jit_options=INLINED)
def _choose_narrow(dtype, value):
    return {
        "bfloat16": _f32_to_bf16,
        "float16": lambda dtype, value: _f32_to_f16(value),
        "float32": lambda dtype, value: value,
    }[dtype.value]
