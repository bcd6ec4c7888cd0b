"""On a GPU, memory that runs short, is refused, or should come back."""

import gc
import warnings

import numpy as np
import pytest
import torch
from tiny_gpu_models import make_model, nmse, on_gpu, outputs, wrapped

from hybrimoe.errors import InsufficientMemoryError
from hybrimoe.runtime.devices.cuda import TorchAccelerator

pytestmark = on_gpu


@pytest.fixture
def accelerator():
    return TorchAccelerator()


class Tight(TorchAccelerator):
    """From `armed` on, launching experts may not take more memory than torch holds at that time."""

    armed = False
    limit = None

    def experts(self, *arguments):
        if not self.armed:
            return super().experts(*arguments)
        torch.cuda.empty_cache()
        if self.limit is None:
            self.limit = torch.cuda.memory_reserved()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(self.limit / total)
        try:
            return super().experts(*arguments)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)


def test_out_of_memory_while_generating_gives_up_slots_and_finishes(monkeypatch):
    model = make_model(hidden=512, inner=512, layers=4)  # 200 MB of experts
    wanted = outputs(model, batch=4, length=128)
    tight = Tight()
    with wrapped(model, monkeypatch, tight, vram=1.0, preset="ondemand"):
        tight.armed = True
        with pytest.warns(RuntimeWarning, match="expert slots"):
            logits, tokens = outputs(model, batch=4, length=128)
        memory = model.hybrimoe.stats()["hybrid"]["memory"]

    assert memory["shrinks"] >= 1
    assert memory["slots"] < memory["slots_at_first"]
    assert nmse(logits, wanted[0]) < 1e-6
    assert torch.equal(tokens, wanted[1])


def test_a_slab_that_does_not_fit_is_a_typed_error(accelerator):
    slots = 2 * torch.cuda.get_device_properties(0).total_memory >> 20
    with pytest.raises(InsufficientMemoryError, match="out of memory"):
        accelerator.allocate(slots, 1 << 20)

    assert float(torch.ones(3, device="cuda").sum()) == 3


def test_memory_refused_for_pinning_is_a_typed_error_and_nothing_else_fails(accelerator):
    array = np.zeros(1 << 20, np.uint8)
    accelerator.pin(array)
    with pytest.raises(InsufficientMemoryError, match="page-lock"):
        accelerator.pin(array)  # the driver registers no page twice
    total = torch.ones(3, device="cuda").sum()
    torch.cuda.synchronize()
    accelerator.unpin(array)

    assert float(total) == 3


def test_without_pinned_memory_results_are_the_same(monkeypatch, accelerator):
    def refuse(array):
        raise InsufficientMemoryError("no page may be locked", array.nbytes)

    model = make_model()
    wanted = outputs(model)
    monkeypatch.setattr(accelerator, "pin", refuse)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        with wrapped(model, monkeypatch, accelerator, preset="ondemand"):
            logits, tokens = outputs(model)
            assert model.hybrimoe.stats()["hybrid"]["memory"]["pinned_bytes"] == 0

    torch.testing.assert_close(logits, wanted[0], rtol=1e-4, atol=1e-4)
    assert torch.equal(tokens, wanted[1])


def test_fifty_cycles_leave_no_memory_behind():
    model, used = make_model(), []
    for _ in range(50):
        with wrapped(model, vram=0.5):
            outputs(model, steps=2)
        gc.collect()
        used.append(torch.cuda.memory_allocated())

    assert used[-1] <= used[1]  # the first cycles load libraries, whose workspaces stay


def test_slots_beyond_two_gigabytes_are_reached():
    """Offsets into the slab need 64 bits."""
    from hybrimoe.formats.gate import Gate
    from hybrimoe.formats.layout import expert_layout
    from hybrimoe.kernels.gpu import torch_experts
    from hybrimoe.kernels.gpu.pairs import Slots, pairs_of

    if torch.cuda.mem_get_info()[0] < 8 << 30:
        pytest.skip("needs 8 GiB of free device memory")
    accelerator = TorchAccelerator()
    layout = expert_layout("int4", 128, 96, True, False)
    slot_bytes, last = 1 << 20, 5000
    accelerator.allocate(last, slot_bytes)
    rng = np.random.default_rng(0)
    blob = rng.integers(0, 100, layout.expert_bytes).astype(np.uint8)
    blob[1::2] &= 0x3B  # as float16 scales, positive and below one
    accelerator.slab[last - 1, : blob.size] = torch.from_numpy(blob).cuda()
    stretched = layout._replace(expert_bytes=slot_bytes)
    for tokens in (1, 200):
        x = torch.from_numpy(rng.standard_normal((tokens, 128), np.float32))
        table, weights = np.full((tokens, 1), last - 1), np.ones((tokens, 1), np.float32)
        shards = np.zeros((last + 1, 2), np.int32)
        shards[:, 1] = layout.shards
        pairs, out = pairs_of(table, weights, shards), torch.zeros(tokens, 128, device="cuda")
        slots = Slots("int4", stretched, Gate(0), accelerator.slab)
        put = lambda array: torch.from_numpy(array).cuda()  # noqa: E731
        accelerator.kernels.run(slots, pairs, x.cuda(), out, put)
        wanted = torch.zeros(tokens, 128)
        one = Slots("int4", layout, Gate(0), torch.from_numpy(blob)[None])
        first = pairs._replace(slot=np.zeros_like(pairs.slot))
        torch_experts.run(one, first, x, wanted, torch.from_numpy)
        assert nmse(out.cpu(), wanted) < 1e-8
