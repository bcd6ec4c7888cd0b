"""What `TorchAccelerator` hands to its kernels, on a CUDA that is not there."""

import numpy as np
import pytest
import torch

import fake_cuda
from hybrimoe.formats.gate import Gate
from hybrimoe.formats.layout import expert_layout
from hybrimoe.kernels.cpu.run_layer import PackedLayer
from hybrimoe.kernels.gpu import torch_experts
from hybrimoe.kernels.gpu.pairs import Slots, pairs_of
from hybrimoe.models.weights import ExpertWeights, pack
from hybrimoe.runtime.devices.cuda import TorchAccelerator

D, F, E = 64, 96, 4


@pytest.fixture
def accelerator(monkeypatch):
    fake_cuda.install(monkeypatch)
    accelerator = TorchAccelerator("cpu")
    accelerator.kernels = torch_experts
    return accelerator


@pytest.fixture(scope="module")
def layer():
    make = torch.Generator().manual_seed(0)
    up, down = (torch.randn(shape, generator=make) / 8 for shape in ((E, 2, F, D), (E, D, F)))
    layout = expert_layout("int4", D, F, True, False)
    blobs = np.zeros((E, layout.expert_bytes), np.uint8)
    pack("int4", layout, ExpertWeights(up, down, Gate(0)), blobs)
    return PackedLayer("int4", layout, Gate(0), D, blobs)


@pytest.mark.parametrize("slots", [6, 3000])
def test_experts_in_wide_slots_are_computed_by_one_transfer(accelerator, layer, slots, monkeypatch):
    layout, staged = layer.layout, []
    accelerator.allocate(slots, layout.expert_bytes + 64)
    copies = [accelerator.copy(layer.blobs[e], slots - 1 - e, 0, ()) for e in range(E)]
    put = accelerator.staging.put
    monkeypatch.setattr(
        accelerator.staging, "put", lambda arrays: staged.extend(arrays) or put(arrays)
    )
    table = np.array([[0, 2], [3, -1], [-1, -1]])  # experts; -1 is the CPU's
    ids = np.where(table < 0, slots, slots - 1 - table)
    weights = np.arange(1, 7, dtype=np.float32).reshape(3, 2)
    shards = np.zeros((slots + 1, 2), np.int32)
    shards[slots - E : slots, 1] = layout.shards - 1
    x, out = torch.randn(3, D), torch.full((3, D), torch.nan)
    accelerator.experts(layer, x, ids, weights, shards, out, copies)

    wanted, packed = torch.zeros(3, D), torch.from_numpy(layer.blobs)
    limits = np.array([[0, layout.shards - 1]] * E + [[0, 0]], np.int32)
    pairs = pairs_of(np.where(table < 0, E, table), weights, limits)
    slab = Slots(layer.fmt, layout, layer.gate, packed)
    torch_experts.run(slab, pairs, x, wanted, torch.from_numpy)
    assert len(staged) == 1
    assert staged[0].nbytes < 100  # what three pairs take, whatever the number of slots
    torch.testing.assert_close(out, wanted, rtol=1e-5, atol=1e-5)
