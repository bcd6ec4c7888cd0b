"""A packed matrix against NumPy on what its format keeps, over shapes, formats and dtypes."""

import numpy as np
import pytest
import reference
import torch

from hybrimoe.errors import RoutingError
from hybrimoe.kernels.cpu import run_layer as moe
from hybrimoe.kernels.cpu.linear import run_linear
from hybrimoe.kernels.cpu.workspace import Workspace
from hybrimoe.modules.packed_linear import pack_matrix
from hybrimoe.simd.isa import runs_here

TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
CASES = [("int4", "float32"), ("int8", "float32"), ("int4", "bfloat16"), ("int8", "float16")]


def make_matrix(fmt, outputs, inputs, bias, seed=0):
    """A packed matrix, and the weight and bias that it holds."""
    generator = torch.Generator().manual_seed(seed)
    linear = torch.nn.Linear(inputs, outputs, bias=bias)
    linear.weight.data = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    kept = reference.stored(fmt, linear.weight.data.numpy())
    return pack_matrix(fmt, linear), kept, linear.bias.detach().numpy() if bias else 0.0


def run(matrix, x, dtype, threads=2, isa=None):
    bits = reference.to_bits(dtype, x)
    out = reference.to_bits(dtype, np.full((len(x), matrix.shape[0]), np.nan))
    run_linear(matrix, bits, out, Workspace(), dtype, threads, isa)
    return reference.from_bits(dtype, out)


def rounded(x):
    """Activations as the integer formats see them: 127 levels per group of 32."""
    padded = np.zeros((len(x), -(-x.shape[1] // 32) * 32), np.float32)
    padded[:, : x.shape[1]] = x
    groups = padded.reshape(len(x), -1, 32)
    scale = np.maximum(np.abs(groups).max(2, keepdims=True), 1e-30) / 127
    return (np.rint(groups / scale) * scale).reshape(padded.shape)[:, : x.shape[1]]


@pytest.mark.parametrize(("fmt", "dtype"), CASES)
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 32), (33, 50), (200, 96), (17, 300)])
@pytest.mark.parametrize("tokens", [1, 2, 7, 20])
def test_a_packed_matrix_computes_what_it_holds(fmt, dtype, outputs, inputs, tokens):
    matrix, weight, bias = make_matrix(fmt, outputs, inputs, bias=tokens != 2)
    x = np.random.default_rng(tokens).standard_normal((tokens, inputs)).astype(np.float32)
    x = reference.from_bits(dtype, reference.to_bits(dtype, x))
    got, expected = run(matrix, x, dtype), rounded(x) @ weight.T + bias
    error = np.sum((got - expected) ** 2) / np.sum(expected**2)
    assert error < (1e-5 if dtype == "float32" else 2e-5)


@pytest.mark.parametrize("fmt", ["int4", "int8"])
def test_threads_and_batch_change_no_bit(monkeypatch, fmt):
    monkeypatch.setattr("hybrimoe.kernels.cpu.linear.SMALL", 0)
    matrix, _, _ = make_matrix(fmt, 200, 96, bias=True)
    x = np.random.default_rng(0).standard_normal((11, 96)).astype(np.float32)
    alone = np.concatenate([run(matrix, row[None], "float32", threads=1) for row in x])
    for threads in (1, 2, 3):
        assert np.array_equal(run(matrix, x, "float32", threads), alone)


@pytest.mark.parametrize("isa", [isa for isa in moe.ISA_TAGS if runs_here(isa)])
def test_every_instruction_set_agrees(isa):
    matrix, _, _ = make_matrix("int4", 48, 64, bias=False)
    x = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    np.testing.assert_allclose(
        run(matrix, x, "float32", isa=isa), run(matrix, x, "float32"), rtol=1e-5, atol=1e-6
    )


def test_nan_and_infinity_survive():
    matrix, _, _ = make_matrix("int8", 32, 32, bias=False)
    for value in (np.nan, np.inf):
        x = np.ones((2, 32), np.float32)
        x[1, 3] = value
        got = run(matrix, x, "float32")
        assert np.isfinite(got[0]).all()
        assert not np.isfinite(got[1]).any()


@pytest.mark.parametrize(
    ("shape", "message"),
    [((2, 31), "x must be"), ((2, 33), "x must be")],
)
def test_a_shape_that_does_not_fit_is_refused_before_anything_runs(shape, message):
    matrix, _, _ = make_matrix("int8", 32, 32, bias=False)
    with pytest.raises(RoutingError, match=message):
        run(matrix, np.ones(shape, np.float32), "float32")


def test_one_workspace_serves_matrices_and_prompts_of_all_sizes():
    workspace = Workspace()
    for outputs, inputs, tokens in ((48, 64, 3), (16, 300, 40), (48, 64, 3), (200, 32, 7)):
        matrix, weight, _ = make_matrix("int8", outputs, inputs, bias=False)
        x = np.random.default_rng(tokens).standard_normal((tokens, inputs)).astype(np.float32)
        out = np.full((tokens, outputs), np.nan, np.float32)
        run_linear(matrix, x, out, workspace)
        expected = rounded(x) @ weight.T
        assert np.sum((out - expected) ** 2) / np.sum(expected**2) < 1e-5


def test_prompts_of_many_lengths_share_one_buffer():
    workspace, (matrix, _, _) = Workspace(), make_matrix("int8", 32, 64, bias=False)
    for tokens in range(200, 0, -1):
        out = np.empty((tokens, 32), np.float32)
        run_linear(matrix, np.ones((tokens, 64), np.float32), out, workspace)
    kept = sum(buffer.nbytes for buffer in workspace._buffers.values())
    assert kept < 200 * 2 * 40 + (1 << 14)
