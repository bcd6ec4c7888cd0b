"""K types of ggml files: blobs hold the file's own numbers, and the kernels compute with them."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from k_cases import BLOCK, HALVES, K_TYPES, make_layer, random_blocks, read_with_gguf, relay
from kernel_cases import expected, make_batch, nmse, run, share_all_work, tolerance

from hybrimoe.kernels import ggml, reference
from hybrimoe.kernels.activations import Gate
from hybrimoe.kernels.layout import QUANTIZED, expert_layout
from hybrimoe.kernels.moe import HOST_ISA
from hybrimoe.kernels.simd import ISAS, runs_here
from hybrimoe.runtime import formats
from hybrimoe.runtime.adapters import ExpertWeights

TOKENS = (1, 2, 3, 5, 8, 13, 32)
MIXED = ("q4_k+q6_k", "q4_k+int8", "int8+q5_k", "int4+int8")
CASES = [
    *[(HOST_ISA, fmt, "float32") for fmt in (*K_TYPES, *MIXED)],
    *[(isa, fmt, "float32") for isa in ISAS if runs_here(isa) and isa != HOST_ISA for fmt in K_TYPES],
    (HOST_ISA, "q4_k+q6_k", "bfloat16"),
]  # fmt: skip


@pytest.fixture(autouse=True)
def shared(monkeypatch):
    share_all_work(monkeypatch)


def unpacked(fmt, layout, blobs, inner, hidden):
    """up [E, 2, F, D] and down [E, D, F] float32 by the kernel."""
    up, down = torch.zeros(len(blobs), 2, inner, hidden), torch.zeros(len(blobs), hidden, inner)
    formats.unpack(fmt, layout, blobs, ExpertWeights(up, down, Gate(0)))
    return up.numpy(), down.numpy()


@pytest.mark.parametrize("shape", [(256, 256), (512, 768)])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_layer_equals_the_reference(case, shape):
    isa, fmt, dtype = case
    layer, weights = make_layer(fmt, *shape)
    for tokens in TOKENS:
        batch = make_batch(tokens, shape[0], 5, 1 + tokens % 4, seed=tokens)
        got = run(layer, *batch, dtype, isa=isa)
        wanted = expected(layer, weights, *batch, dtype)
        assert nmse(got, wanted) <= tolerance(fmt, dtype), tokens
