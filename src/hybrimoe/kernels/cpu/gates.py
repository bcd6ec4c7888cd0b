"""What experts do between their projections, as scalar formulas that LLVM turns into SIMD loops."""

import numpy as np

from hybrimoe.formats.gate import GELU, GELU_TANH, RELU, RELU2, SILU
from hybrimoe.simd.jit import inner
from hybrimoe.simd.vectors import bits_to_float

_LOWEST = np.float32(-87.9)  # where the power of two below becomes zero
_LOG2E, _LN2_HIGH, _LN2_LOW = (
    np.float32(1.44269504),
    np.float32(0.693359375),
    np.float32(-2.12194440e-4),
)
_HALF, _ONE, _TWO = np.float32(0.5), np.float32(1), np.float32(2)


@inner
def exp(x):
    """e**x to 2 ulp by a degree 5 polynomial (Cephes expf); overflows to inf, keeps NaN."""
    x = _LOWEST if x < _LOWEST else x
    n = np.floor(x * _LOG2E + _HALF)
    n = np.float32(128) if n > np.float32(128) else n
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + _ONE
    return p * bits_to_float((np.int32(n) + np.int32(127)) << np.int32(23))


@inner
def sigmoid(x):
    """1 / (1 + e**-x)."""
    return _ONE / (_ONE + exp(-x))


@inner
def tanh(x):
    """Odd and exact at both ends: 1 - 2 / (1 + e**2x)."""
    return _ONE - _TWO / (_ONE + exp(_TWO * x))


@inner
def erf(x):
    """Error function, absolute error 1.5e-7 (Abramowitz and Stegun 7.1.26)."""
    a = abs(x)
    t = _ONE / (_ONE + np.float32(0.3275911) * a)
    p = np.float32(1.061405429)
    p = p * t - np.float32(1.453152027)
    p = p * t + np.float32(1.421413741)
    p = p * t - np.float32(0.284496736)
    p = p * t + np.float32(0.254829592)
    y = _ONE - p * t * exp(-a * a)
    return y if x >= 0 else -y


@inner
def silu(x, alpha):
    return x * sigmoid(alpha * x)


@inner
def gelu(x, alpha):
    return _HALF * x * (_ONE + erf(x * np.float32(0.70710678)))


@inner
def gelu_tanh(x, alpha):
    inner = np.float32(0.79788456) * (x + np.float32(0.044715) * x * x * x)
    return _HALF * x * (_ONE + tanh(inner))


@inner
def relu(x, alpha):
    return x if not x < 0 else np.float32(0)  # written so that NaN passes


@inner
def relu2(x, alpha):
    y = x if not x < 0 else np.float32(0)
    return y * y


@inner
def softcap(x, cap):
    return cap * tanh(x / cap)


def _loop(act):
    """gate = act(min(gate, limit)) * (clamp(up) + offset), element by element."""

    @inner
    def loop(gate, up, params):
        alpha, limit = np.float32(params.alpha), np.float32(params.limit)
        offset = np.float32(params.offset)
        for i in range(gate.size):
            g, u = gate[i], up[i]
            g = limit if g > limit else g
            u = limit if u > limit else u
            u = -limit if u < -limit else u
            gate[i] = act(g, alpha) * (u + offset)

    return loop


_silu_loop, _gelu_loop, _gelu_tanh_loop = _loop(silu), _loop(gelu), _loop(gelu_tanh)
_relu_loop, _relu2_loop = _loop(relu), _loop(relu2)


@inner
def _softcap_loop(gate, up, params):
    gate_cap, up_cap = np.float32(params.alpha), np.float32(params.limit)
    for i in range(gate.size):
        gate[i] = softcap(gate[i], gate_cap) * sigmoid(gate[i]) * softcap(up[i], up_cap)


@inner
def apply_gate(params, gated, gate, up):
    """Overwrite `gate` [32] float32 by the formula of `Gate`; without a gate, by act(gate)."""
    if not gated:
        up[:] = np.float32(1)
    if params.kind == SILU:
        _silu_loop(gate, up, params)
    elif params.kind == GELU:
        _gelu_loop(gate, up, params)
    elif params.kind == GELU_TANH:
        _gelu_tanh_loop(gate, up, params)
    elif params.kind == RELU:
        _relu_loop(gate, up, params)
    elif params.kind == RELU2:
        _relu2_loop(gate, up, params)
    else:
        _softcap_loop(gate, up, params)
