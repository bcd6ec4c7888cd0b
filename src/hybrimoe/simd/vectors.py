"""LLVM vectors for numba: 16 output rows wide, a few tokens deep.

A weight block holds 16 output rows interleaved, so one SIMD lane is one output row and no sum ever
crosses lanes. A *tile* is the running sum of those 16 rows for `n` tokens at once: every weight that
is unpacked serves `n` tokens. LLVM splits the 512-bit vectors where the machine is narrower; only
the int8 dot product needs an instruction per instruction set.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import lower_constant
from numba.extending import NativeValue, intrinsic, models, register_model, unbox

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
LANES = 16


class TagType(types.Type):
    """The type of a compile-time constant: kernels are specialised and cached per tag."""

    def __init__(self, kind, value, version):
        self.kind, self.value = kind, value
        super().__init__(name=f"Tag({kind}={value}{version and '@'}{version})")


class Tag:
    """A value the compiler sees as a type, e.g. `Tag("isa", "avx2")` or `Tag("tokens", 4)`.

    version: machine code of one version is not that of another.
    """

    def __init__(self, kind, value, version=""):
        self.value = value
        self._numba_type_ = TagType(kind, value, version)

    def __repr__(self):
        return f"Tag({self._numba_type_.kind}={self.value})"


register_model(TagType)(models.OpaqueModel)


@unbox(TagType)
def _unbox_tag(typ, obj, c):
    return NativeValue(c.context.get_dummy_value())


@lower_constant(TagType)
def _constant_tag(context, builder, typ, value):
    return context.get_dummy_value()


class VectorType(types.Type):
    """One LLVM vector, or for a tile one vector per token."""

    def __init__(self, name, element, count, tokens=0):
        vector = ir.VectorType(element, count)
        self.tokens = tokens
        self.llvm = ir.ArrayType(vector, tokens) if tokens else vector
        super().__init__(name=name)


class RowsType(types.Type):
    """A pointer to the activations of each token of a tile."""

    def __init__(self, tokens):
        self.tokens = tokens
        super().__init__(name=f"rows{tokens}")


@register_model(VectorType)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager, typ):
        super().__init__(manager, typ, typ.llvm)


@register_model(RowsType)
class _RowsModel(models.PrimitiveModel):
    def __init__(self, manager, typ):
        super().__init__(manager, typ, ir.ArrayType(I8.as_pointer(), typ.tokens))


BYTES = VectorType("bytes64", I8, 64)
INTS = VectorType("ints16", I32, LANES)
FLOATS = VectorType("floats16", F32, LANES)


def int_tile(tokens):
    return VectorType(f"int_tile{tokens}", I32, LANES, tokens)


def float_tile(tokens):
    return VectorType(f"float_tile{tokens}", F32, LANES, tokens)


def address(context, builder, array_type, array, offset):
    """Pointer to byte `offset` of a C-contiguous array."""
    base = context.make_array(array_type)(context, builder, array).data
    return builder.gep(builder.bitcast(base, I8.as_pointer()), [offset], source_etype=I8)


def load(builder, pointer, typ, align=1):
    return builder.load(builder.bitcast(pointer, typ.as_pointer()), align=align, typ=typ)


def load_at(builder, pointer, offset, typ, align=4):
    return load(builder, builder.gep(pointer, [offset], source_etype=I8), typ, align)


def _store(builder, value, pointer, align=4):
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer()), align=align)


def splat(builder, value, count=LANES):
    vector = ir.VectorType(value.type, count)
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), value, I32(0))
    zeros = ir.Constant(ir.VectorType(I32, count), [0] * count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def call(builder, name, result, args):
    function_type = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function_type, name), args)


def _fma(builder, a, b, c):
    return call(builder, "llvm.fma.v16f32", a.type, [a, b, c])


def lanes(builder, vector, start, count):
    mask = ir.Constant(ir.VectorType(I32, count), list(range(start, start + count)))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), mask)


def join(builder, parts):
    while len(parts) > 1:
        size = 2 * parts[0].type.count
        mask = ir.Constant(ir.VectorType(I32, size), list(range(size)))
        pairs = zip(parts[::2], parts[1::2])
        parts = [builder.shuffle_vector(a, b, mask) for a, b in pairs]
    return parts[0]


@intrinsic
def splat_tile(typing, tokens, floats):
    """float_tile that starts every token at the same 16 floats."""
    tile = float_tile(tokens.value)

    def codegen(context, builder, sig, args):
        result = ir.Constant(tile.llvm, ir.Undefined)
        for t in range(tokens.value):
            result = builder.insert_value(result, args[1], t)
        return result

    return tile(tokens, floats), codegen


@intrinsic
def zeros_like(typing, tile):
    """A tile of zeros, as deep as another."""
    return tile(tile), lambda context, builder, sig, args: ir.Constant(tile.llvm, None)


@intrinsic
def no_floats(typing):
    """16 zeros."""
    return FLOATS(), lambda context, builder, sig, args: ir.Constant(FLOATS.llvm, None)


@intrinsic
def following_rows(typing, tokens, array, first, stride):
    """Pointers to rows first, first + 1, ... of `array`, whose rows are `stride` bytes long."""
    rows = RowsType(tokens.value)

    def codegen(context, builder, sig, args):
        result = ir.Constant(ir.ArrayType(I8.as_pointer(), tokens.value), ir.Undefined)
        for t in range(tokens.value):
            at = builder.mul(builder.add(args[2], I64(t)), args[3])
            pointer = address(context, builder, array, args[1], at)
            result = builder.insert_value(result, pointer, t)
        return result

    return rows(tokens, array, types.intp, types.intp), codegen


@intrinsic
def token_rows(typing, tokens, array, index, first, stride):
    """Pointers to rows index[first + t] of `array`, whose rows are `stride` bytes long."""
    rows = RowsType(tokens.value)

    def codegen(context, builder, sig, args):
        result = ir.Constant(ir.ArrayType(I8.as_pointer(), tokens.value), ir.Undefined)
        for t in range(tokens.value):
            at = builder.mul(builder.add(args[3], I64(t)), I64(4))
            place = address(context, builder, index, args[2], at)
            row = builder.sext(load(builder, place, I32, 4), I64)
            pointer = address(context, builder, array, args[1], builder.mul(row, args[4]))
            result = builder.insert_value(result, pointer, t)
        return result

    return rows(tokens, array, index, types.intp, types.intp), codegen


@intrinsic
def load_bytes(typing, array, offset):
    """64 bytes at byte `offset` of a uint8 array."""

    def codegen(context, builder, sig, args):
        return load(builder, address(context, builder, array, *args), BYTES.llvm)

    return BYTES(array, types.intp), codegen


def _load_floats(array, widen):
    def codegen(context, builder, sig, args):
        return widen(builder, address(context, builder, array, *args))

    return FLOATS(array, types.intp), codegen


@intrinsic
def load_f16(typing, array, offset):
    """16 float16 at byte `offset` of a uint8 array, as float32."""
    halves = ir.VectorType(F16, LANES)
    return _load_floats(array, lambda b, p: b.fpext(load(b, p, halves), FLOATS.llvm))


@intrinsic
def load_f32(typing, array, offset):
    """16 float32 at byte `offset` of a uint8 array."""
    return _load_floats(array, lambda b, p: load(b, p, FLOATS.llvm))


@intrinsic
def load_bf16_even(typing, array, offset):
    """The even elements of 32 bfloat16 at byte `offset`, as float32."""

    def widen(builder, pointer):
        words = load(builder, pointer, INTS.llvm)
        shifted = builder.shl(words, ir.Constant(INTS.llvm, [16] * LANES))
        return builder.bitcast(shifted, FLOATS.llvm)

    return _load_floats(array, widen)


@intrinsic
def load_bf16_odd(typing, array, offset):
    """The odd elements of 32 bfloat16 at byte `offset`, as float32."""

    def widen(builder, pointer):
        words = load(builder, pointer, INTS.llvm)
        masked = builder.and_(words, ir.Constant(INTS.llvm, [-65536] * LANES))
        return builder.bitcast(masked, FLOATS.llvm)

    return _load_floats(array, widen)


@intrinsic
def prefetch(typing, array, offset):
    """Ask for the cache line at byte `offset`; an address outside the array is harmless."""

    def codegen(context, builder, sig, args):
        place = address(context, builder, array, *args)
        hints = [I32(0), I32(3), I32(1)]  # to read, into all caches, data
        call(builder, "llvm.prefetch.p0", ir.VoidType(), [place, *hints])
        return context.get_dummy_value()

    return types.void(array, types.intp), codegen


@intrinsic
def low_nibbles(typing, packed):
    """The lower four bits of each byte."""

    def codegen(context, builder, sig, args):
        return builder.and_(args[0], ir.Constant(BYTES.llvm, [15] * 64))

    return BYTES(packed), codegen


@intrinsic
def high_nibbles(typing, packed):
    """The upper four bits of each byte. Shifts 16-bit words: there is no byte shift on x86."""

    def codegen(context, builder, sig, args):
        words = ir.VectorType(I16, 32)
        shifted = builder.lshr(builder.bitcast(args[0], words), ir.Constant(words, [4] * 32))
        return builder.and_(
            builder.bitcast(shifted, BYTES.llvm), ir.Constant(BYTES.llvm, [15] * 64)
        )

    return BYTES(packed), codegen


@intrinsic
def add_scaled(typing, total, ints, scale, rows, offset):
    """total[t] += ints[t] * scale * (the float32 at rows[t] + offset)."""

    def codegen(context, builder, sig, args):
        result, ints, scale, pointers, at = args
        for t in range(total.tokens):
            x = load_at(builder, builder.extract_value(pointers, t), at, F32)
            value = builder.sitofp(builder.extract_value(ints, t), FLOATS.llvm)
            factor = builder.fmul(scale, splat(builder, x))
            part = _fma(builder, value, factor, builder.extract_value(result, t))
            result = builder.insert_value(result, part, t)
        return result

    return total(total, ints, FLOATS, rows, types.intp), codegen


@intrinsic
def add_product(typing, total, weights, rows, offset):
    """total[t] += weights * (the float32 at rows[t] + offset)."""

    def codegen(context, builder, sig, args):
        result, weights, pointers, at = args
        for t in range(total.tokens):
            x = load_at(builder, builder.extract_value(pointers, t), at, F32)
            part = _fma(builder, weights, splat(builder, x), builder.extract_value(result, t))
            result = builder.insert_value(result, part, t)
        return result

    return total(total, FLOATS, rows, types.intp), codegen


@intrinsic
def add_tiles(typing, a, b):
    """a + b."""

    def codegen(context, builder, sig, args):
        result = args[0]
        for t in range(a.tokens):
            parts = builder.extract_value(args[0], t), builder.extract_value(args[1], t)
            result = builder.insert_value(result, builder.fadd(*parts), t)
        return result

    return a(a, b), codegen


@intrinsic
def store_tile(typing, tile, array, offset, stride):
    """Write token t of a tile to 16 float32 at byte `offset + t * stride` of `array`."""

    def codegen(context, builder, sig, args):
        for t in range(tile.tokens):
            at = builder.add(args[2], builder.mul(args[3], I64(t)))
            place = address(context, builder, array, args[1], at)
            _store(builder, builder.extract_value(args[0], t), place)
        return context.get_dummy_value()

    return types.void(tile, array, types.intp, types.intp), codegen


@intrinsic
def add_weighted(typing, tile, rows, offset, weights, first):
    """16 float32 at rows[t] + offset += tile[t] * weights[first + t]."""

    def codegen(context, builder, sig, args):
        for t in range(tile.tokens):
            pointer = builder.extract_value(args[1], t)
            old = load_at(builder, pointer, args[2], FLOATS.llvm)
            at = builder.mul(builder.add(args[4], I64(t)), I64(4))
            weight = load(builder, address(context, builder, weights, args[3], at), F32, 4)
            new = _fma(builder, builder.extract_value(args[0], t), splat(builder, weight), old)
            _store(builder, new, builder.gep(pointer, [args[2]], source_etype=I8))
        return context.get_dummy_value()

    return types.void(tile, rows, types.intp, weights, types.intp), codegen


@intrinsic
def bits_to_float(typing, bits):
    """The float32 whose bits are an int32."""
    return types.float32(types.int32), lambda context, builder, sig, args: builder.bitcast(
        args[0], F32
    )


@intrinsic
def float_to_bits(typing, value):
    """The bits of a float32 as int32."""
    return types.int32(types.float32), lambda context, builder, sig, args: builder.bitcast(
        args[0], I32
    )


@intrinsic
def take(typing, counters, which):
    """Atomically return counters[which] and add one: the next tile for whichever thread is free."""

    def codegen(context, builder, sig, args):
        at = builder.mul(args[1], I64(8))
        place = address(context, builder, counters, args[0], at)
        place = builder.bitcast(place, I64.as_pointer())
        return builder.atomic_rmw("add", place, I64(1), "monotonic")

    return types.int64(counters, types.intp), codegen
