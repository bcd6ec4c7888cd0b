"""How Triton's kernels read packed experts: units as numbers, their scales, biases, and the gate.

A unit is 32 columns of the 16 rows of a block: what `words_of` reads, as 32-bit words that hold
consecutive rows, so 16-byte loads fill whole cache lines. N is how many columns of one row lie side
by side (`neighbours` of the format). All offsets count words; those into the slab are 64-bit.
"""

from __future__ import annotations

try:
    import triton
    import triton.language as tl
except ImportError:  # importing must work without; `triton_experts.run` then says what is missing
    triton = tl = None

# A kernel is compiled once per constant: a count that changes from call to call must not be one.
COUNTS = ("pairs", "tokens", "tiles")
jit = (lambda kernel: kernel) if triton is None else triton.jit
entry = jit if triton is None else triton.jit(do_not_specialize=COUNTS)


@jit
def words_of(words, at, live, CODES: tl.constexpr, N: tl.constexpr):
    """Units [U] at words `at`, zero unless `live`: int32 [U, J, 16], float16 in that format."""
    j, lane = tl.arange(0, 32 // N)[None, :, None], tl.arange(0, 16)[None, None, :]
    if CODES == "float16":
        halves = words.to(tl.pointer_type(tl.float16), bitcast=True)
        return tl.load(halves + at[:, None, None] * 2 + j * 16 + lane, live[:, None, None], 0)
    else:
        return tl.load(words + at[:, None, None] + j * 16 + lane, live[:, None, None], 0)


@jit
def numbers(packed, n, CODES: tl.constexpr):
    """Number n of each word, without its scale, as float32; n broadcasts against the words."""
    if CODES == "nibbles":  # the low nibbles of four bytes, then the high ones
        nibble = (packed >> (n % 4 * 8 + n // 4 * 4)) & 15
        # Bits of 2**23 + q: a subtraction makes the float, where a conversion has half the rate.
        return (nibble | 0x4B000000).to(tl.float32, bitcast=True) - 8388616.0
    elif CODES == "bytes":
        return ((packed << (24 - n * 8)) >> 24).to(tl.float32)
    elif CODES == "bfloat16":
        return ((packed >> (n * 16)) << 16).to(tl.float32, bitcast=True)
    elif CODES == "float16":
        return packed.to(tl.float32)
    else:
        return packed.to(tl.float32, bitcast=True)


@jit
def scales(words, at, live, CODES: tl.constexpr):
    """Scales of units [U]: float32 [U, 1, 16]; lies behind the weights. One in native formats."""
    if CODES == "nibbles" or CODES == "bytes":
        halves = words.to(tl.pointer_type(tl.float16), bitcast=True)
        start: tl.constexpr = 128 if CODES == "nibbles" else 256
        at = at[:, None, None] * 2 + start + tl.arange(0, 16)[None, None, :]
        return tl.load(halves + at, mask=live[:, None, None], other=0).to(tl.float32)
    else:
        return tl.full([1, 1, 1], 1.0, tl.float32)


@jit
def add_units(total, words, at, live, x, column, end, CODES: tl.constexpr, N: tl.constexpr):
    """total [U, J, 16] plus units times x[column + N j + n], zero from `end` on, summed over n.

    One number of all words at a time: a fourth axis for n would spread it over threads.
    """
    packed = words_of(words, at, live, CODES, N)
    part = tl.zeros_like(total)
    d = column[:, None] + tl.arange(0, 32 // N)[None, :] * N
    for n in tl.static_range(N):
        xs = tl.load(x + d + n, mask=live[:, None] & (d + n < end), other=0).to(tl.float32)
        part += numbers(packed, n, CODES) * xs[:, :, None]
    return total + part * scales(words, at, live, CODES)


@jit
def matrix(
    words, at, live,
    BLOCKS: tl.constexpr, GROUPS: tl.constexpr, CODES: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Units [BLOCKS * GROUPS], groups innermost, with scales, as float32 [32 GROUPS, 16 BLOCKS]."""
    n = tl.arange(0, N)[None, None, None, :]
    w = numbers(words_of(words, at, live, CODES, N)[:, :, :, None], n, CODES)
    w *= scales(words, at, live, CODES)[:, :, :, None]
    w = tl.reshape(w, (BLOCKS, GROUPS, 32 // N, 16, N))
    return tl.reshape(tl.permute(w, (1, 2, 4, 0, 3)), (GROUPS * 32, BLOCKS * 16))


@jit
def float_at(words, at, mask):
    """float32 among int32 words: biases in a blob, routing weights in a table."""
    return tl.load(words + at, mask=mask, other=0).to(tl.float32, bitcast=True)


@jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@jit
def _tanh(x):
    return 1 - 2 / (1 + tl.exp(2 * x))


@jit
def gate(g, u, alpha, limit, offset, KIND: tl.constexpr):
    """The formula of `Gate`, in the order of its NAMES; written so that NaN passes every clamp."""
    if KIND == 5:
        return alpha * _tanh(g / alpha) * _sigmoid(g) * limit * _tanh(u / limit)
    else:
        g = tl.where(g > limit, limit, g)
        u = tl.where(u > limit, limit, u)
        u = tl.where(u < -limit, -limit, u) + offset
        if KIND == 0:
            act = g * _sigmoid(alpha * g)
        elif KIND == 1:
            act = 0.5 * g * (1 + tl.erf(g * 0.7071067811865476))
        elif KIND == 2:
            act = 0.5 * g * (1 + _tanh(0.7978845608028654 * (g + 0.044715 * g * g * g)))
        else:
            act = tl.where(g < 0, 0.0, g)
            if KIND == 4:
                act = act * act
        return act * u
