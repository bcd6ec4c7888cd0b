"""The reference itself, against torch and by hand."""

import numpy as np
import pytest
import reference
import torch
from kernel_cases import CLAMPED, MADE, QUANTIZED, make_batch, make_weights
from torch.nn import functional

from hybrimoe.formats.gate import NAMES, SOFTCAP, Gate
from hybrimoe.formats.layout import expert_layout

TORCH = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "relu": functional.relu,
    "relu2": lambda x: functional.relu(x) ** 2,
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bits_of_halves_equal_those_of_torch(dtype):
    rng = np.random.default_rng(0)
    values = (rng.standard_normal(20_000) * 10.0 ** rng.integers(-9, 9, 20_000)).astype(np.float32)
    values[:5] = 0, np.inf, -np.inf, 65520, 3.4e38
    wanted = torch.from_numpy(values).to(getattr(torch, dtype))
    bits = reference.to_bits(dtype, values)
    assert np.array_equal(bits, wanted.view(torch.uint16).numpy())
    assert np.array_equal(reference.from_bits(dtype, bits), wanted.float().numpy())
    assert np.isnan(
        reference.from_bits(dtype, reference.to_bits(dtype, np.float32([np.nan])))
    ).all()


@pytest.mark.parametrize("name", TORCH)
def test_activations_equal_those_of_torch(name):
    x = np.linspace(-30, 30, 4001)
    wanted = TORCH[name](torch.from_numpy(x)).numpy()
    got = reference.apply_gate(Gate(NAMES.index(name)), x)
    np.testing.assert_allclose(got, wanted, rtol=1e-12, atol=1e-12)


def test_the_clamped_gate_is_that_of_gpt_oss():
    gate, up = torch.randn(2, 1000, dtype=torch.float64) * 8
    clamped = gate.clamp(max=7.0)
    wanted = (up.clamp(-7.0, 7.0) + 1) * clamped * torch.sigmoid(clamped * 1.702)
    got = reference.apply_gate(CLAMPED, gate.numpy(), up.numpy())
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-12)


def test_softcap_bounds_both_sides():
    x = np.linspace(-1000, 1000, 101)
    y = reference.apply_gate(Gate(SOFTCAP, 2.0, 3.0), x, x)
    assert np.abs(y).max() <= 6


def test_the_largest_int4_weight_becomes_minus_eight():
    weights = np.linspace(-1, 2, 32, dtype=np.float32)
    for sign in (1, -1):
        ints, scales = reference.quantize("int4", sign * weights)
        assert ints.tolist()[-1] == -8
        assert scales.tolist() == [-sign * 0.25]


@pytest.mark.parametrize(("fmt", "steps"), [("int4", 16), ("int8", 254)])
def test_quantization_errs_by_half_a_step_or_a_clipped_one(fmt, steps):
    weights = make_weights("float32", 64, 128).up
    largest = np.abs(weights.reshape(-1, 32)).max(1, keepdims=True)
    error = np.abs(reference.stored(fmt, weights) - weights).reshape(-1, 32) / largest
    assert error.max() <= 1.01 * (2 / steps if fmt == "int4" else 1 / steps)
    assert np.median(error.max(1)) <= 1.01 * (1 / steps)


def test_activation_groups_carry_their_sum_and_mark_what_is_not_finite():
    x = np.random.default_rng(0).standard_normal((3, 64))
    x[1, 40] = np.inf
    ints, scales, sums = reference.quantize_activations(x)
    assert np.array_equal(sums, -8 * ints.astype(int).reshape(3, 2, 32).sum(2))
    assert np.isnan(scales).tolist() == [[False, False], [False, True], [False, False]]
    assert np.abs(reference.dequantize_float64(ints, scales) - x)[0].max() < np.abs(x).max() / 254


@pytest.mark.parametrize("fmt", MADE)
def test_unpacking_inverts_packing(fmt):
    weights = make_weights(fmt, 70, 90, bias=True)
    layout = expert_layout(fmt, 70, 90, True, True)
    parts = [part[2] for part in weights]
    up, down = reference.unpack(fmt, layout, reference.pack(fmt, layout, *parts), 70, 90)
    slack = 2e-3 if fmt in QUANTIZED else 0  # the scale is rounded a second time
    np.testing.assert_allclose(up, parts[0], rtol=slack, atol=slack)
    np.testing.assert_allclose(down, parts[1], rtol=slack, atol=slack)


def test_experts_equal_a_loop_over_tokens_in_torch():
    weights = make_weights("float32", 24, 40, bias=True)
    x, ids, routing = make_batch(7, 24, 5, 3)
    up, down, up_bias, down_bias = (torch.from_numpy(w).double() for w in weights)
    wanted = torch.zeros(7, 24, dtype=torch.float64)
    for t, token in enumerate(torch.from_numpy(x).double()):
        for e, share in zip(ids[t], routing[t]):
            gate, linear = (up[e] @ token + up_bias[e]).unbind(0)
            h = functional.silu(gate) * linear
            wanted[t] += float(share) * (down[e] @ h + down_bias[e])
    got = reference.experts(weights, Gate(NAMES.index("silu")), x, ids, routing)
    np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-10, atol=1e-12)
