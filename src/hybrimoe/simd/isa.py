"""Dot products of packed weights with int8 activations, one instruction sequence per instruction set."""

from __future__ import annotations

import os

import llvmlite.binding as llvm
from llvmlite import ir
from numba.extending import intrinsic

from hybrimoe.simd.vectors import (
    BYTES,
    I8,
    I16,
    I32,
    INTS,
    LANES,
    Tag,
    call,
    int_tile,
    join,
    lanes,
    load_at,
    splat,
)


# Dot products of 64 weight bytes (4 per lane) with one quad of int8 activations. `nibbles` says that the
# bytes are 0..63; otherwise they are signed and lie in [-127, 127], as do the activations.
def _dot_avx512vnni(builder, total, weights, quad, nibbles):
    """vpdpbusd wants unsigned weights: signed ones are biased by 128, which `start_bytes` takes back."""
    if not nibbles:
        weights = builder.xor(weights, ir.Constant(BYTES.llvm, [-128] * 64))
    args = [total, builder.bitcast(weights, INTS.llvm), splat(builder, quad)]
    return call(builder, "llvm.x86.avx512.vpdpbusd.512", INTS.llvm, args)


def _dot_avx2(builder, total, weights, quad, nibbles):
    """pmaddubsw saturates at 2^15, so the sign of signed weights moves: |x| * (sign(x) * w)."""
    bytes32, shorts, ints = ir.VectorType(I8, 32), ir.VectorType(I16, 16), ir.VectorType(I32, 8)
    x = builder.bitcast(splat(builder, quad, 8), bytes32)
    magnitude = call(builder, "llvm.abs.v32i8", bytes32, [x, ir.IntType(1)(0)])
    ones, sums = ir.Constant(shorts, [1] * 16), []
    for half in (0, 32):
        unsigned, signed = lanes(builder, weights, half, 32), x
        if not nibbles:
            signed = call(builder, "llvm.x86.avx2.psign.b", bytes32, [unsigned, x])
            unsigned = magnitude
        pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", shorts, [unsigned, signed])
        sums.append(call(builder, "llvm.x86.avx2.pmadd.wd", ints, [pairs, ones]))
    return builder.add(total, join(builder, sums))


def _dot_neon(builder, total, weights, quad, nibbles):
    bytes16, ints4 = ir.VectorType(I8, 16), ir.VectorType(I32, 4)
    x = builder.bitcast(splat(builder, quad, 4), bytes16)
    name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
    sums = [
        call(
            builder,
            name,
            ints4,
            [lanes(builder, total, 4 * q, 4), lanes(builder, weights, 16 * q, 16), x],
        )
        for q in range(4)
    ]
    return join(builder, sums)


def _dot_portable(builder, total, weights, quad, nibbles):
    words, shift24 = builder.bitcast(weights, INTS.llvm), ir.Constant(INTS.llvm, [24] * LANES)
    for byte in range(4):
        up = I32(24 - 8 * byte)
        x = builder.ashr(builder.shl(quad, up), I32(24))
        w = builder.ashr(builder.shl(words, splat(builder, up)), shift24)
        total = builder.add(total, builder.mul(w, splat(builder, x)))
    return total


_DOTS = {
    "avx512vnni": _dot_avx512vnni,
    "avx2": _dot_avx2,
    "neon": _dot_neon,
    "portable": _dot_portable,
}


def _dot(isa, total, rows, offset, tokens, multiply):
    """Signature and code of one dot product per token of a tile."""

    def codegen(context, builder, sig, args):
        result, weights, pointers, at = args[1], args[2], args[3], args[4]
        for t in range(tokens):
            quad = load_at(builder, builder.extract_value(pointers, t), at, I32)
            part = builder.extract_value(result, t)
            result = builder.insert_value(result, multiply(builder, part, weights, quad), t)
        return result

    return total(isa, total, BYTES, rows, offset), codegen


@intrinsic
def dot_nibbles(typing, isa, total, weights, rows, offset):
    """total[t] += 64 bytes of 0..63, four per lane, times the four int8 at rows[t] + offset."""
    multiply = _DOTS[isa.value]
    return _dot(isa, total, rows, offset, total.tokens, lambda *a: multiply(*a, True))


@intrinsic
def dot_bytes(typing, isa, total, weights, rows, offset):
    """total[t] += 64 signed bytes, four per lane, times the four int8 at rows[t] + offset."""
    multiply = _DOTS[isa.value]
    return _dot(isa, total, rows, offset, total.tokens, lambda *a: multiply(*a, False))


@intrinsic
def start_nibbles(typing, isa, rows, offset):
    """int_tile holding the int32 at rows[t] + offset: minus 8 times the sum of the activations."""
    tile = int_tile(rows.tokens)

    def codegen(context, builder, sig, args):
        result = ir.Constant(tile.llvm, ir.Undefined)
        for t in range(rows.tokens):
            start = load_at(builder, builder.extract_value(args[1], t), args[2], I32)
            result = builder.insert_value(result, splat(builder, start), t)
        return result

    return tile(isa, rows, offset), codegen


@intrinsic
def start_bytes(typing, isa, rows, offset):
    """int_tile that undoes the bias of `dot_bytes`; the int32 at rows[t] + offset is -8 * sum(x)."""
    tile, biased = int_tile(rows.tokens), isa.value == "avx512vnni"

    def codegen(context, builder, sig, args):
        result = ir.Constant(tile.llvm, None)
        for t in range(rows.tokens if biased else 0):
            start = load_at(builder, builder.extract_value(args[1], t), args[2], I32)
            times16 = builder.shl(splat(builder, start), ir.Constant(INTS.llvm, [4] * LANES))
            result = builder.insert_value(result, times16, t)
        return result

    return tile(isa, rows, offset), codegen


ISAS = ("avx512vnni", "avx2", "neon", "portable")


def detect_isa():
    """The fastest instruction set of this machine, or the one named by HYBRIMOE_ISA."""
    wanted = os.environ.get("HYBRIMOE_ISA")
    if wanted is not None and wanted not in ISAS:
        raise ValueError(f"HYBRIMOE_ISA must be one of {', '.join(ISAS)}, got {wanted!r}")
    if wanted is not None and not runs_here(wanted):
        raise ValueError(f"HYBRIMOE_ISA={wanted} needs instructions that this machine lacks")
    return wanted or next(isa for isa in ISAS if runs_here(isa))


def runs_here(isa):
    """Whether this machine has the instructions of `isa`."""
    features = llvm.get_host_cpu_features()
    needed = {
        "avx512vnni": ("avx512f", "avx512bw", "avx512vnni"),
        "avx2": ("avx2", "fma", "f16c"),
        "neon": ("neon", "dotprod"),
        "portable": (),
    }
    return all(features.get(name, False) for name in needed[isa])


HOST_ISA = detect_isa()
ISA_TAGS = {name: Tag("isa", name) for name in ISAS}
