"""Page-locked host memory: exact, in chunks, refused without harm, and given back."""

import mmap

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import hybrimoe
from hybrimoe.errors import DeviceLostError, InsufficientMemoryError
from hybrimoe.formats.layout import expert_layout
from hybrimoe.runtime.devices.emulated import EmulatedAccelerator
from hybrimoe.runtime.devices.pinning import Pinned, chunks
from hybrimoe.runtime.pages import allocate_blobs
from small_model import LAYERS, Fails, load_small, tokens, wrap_on


@pytest.fixture(scope="module")
def plain():
    return load_small()


@pytest.fixture
def model(plain):
    yield plain
    hybrimoe.unwrap(plain)


@pytest.fixture(scope="module")
def expected(plain):
    return tokens(plain)


@given(st.integers(1, 100), st.integers(1, 2000).map(lambda n: 64 * n), st.integers(1, 1 << 22))
@settings(max_examples=40, deadline=None)
def test_chunks_are_whole_experts_on_pages_of_their_own(experts, size, largest):
    blobs = np.frombuffer(mmap.mmap(-1, experts * size), np.uint8).reshape(experts, size)
    found = list(chunks(blobs, largest))
    ends = [chunk.ctypes.data + chunk.nbytes for chunk in found]

    assert sum(chunk.nbytes for chunk in found) == blobs.nbytes  # nothing is rounded up
    assert [chunk.ctypes.data for chunk in found] == [blobs.ctypes.data, *ends[:-1]]
    assert all(chunk.shape[1] == size for chunk in found)
    assert all(chunk.ctypes.data % mmap.PAGESIZE == 0 for chunk in found)
    page = mmap.PAGESIZE // np.gcd(mmap.PAGESIZE, size)  # experts until a page ends with one
    assert all(chunk.nbytes <= max(largest, page * size) for chunk in found)


@given(
    st.sampled_from(["int4", "int8", "bfloat16", "float32"]),
    st.integers(1, 64).map(lambda n: 32 * n),
    st.integers(1, 64).map(lambda n: 32 * n),
    st.integers(1, 16),
)
@settings(max_examples=30, deadline=None)
def test_an_arena_is_at_most_three_hundredths_or_a_page_larger(fmt, hidden, inner, experts):
    layout = expert_layout(fmt, hidden, inner, True, False)
    blobs = allocate_blobs(experts, layout)
    memory = blobs
    while isinstance(memory, np.ndarray):
        memory = memory.base
    whole = memory.nbytes if isinstance(memory, memoryview) else len(memory)

    assert sum(chunk.nbytes for chunk in chunks(blobs)) == blobs.nbytes == whole
    assert -(-whole // mmap.PAGESIZE) * mmap.PAGESIZE <= max(1.03 * whole, whole + mmap.PAGESIZE)


def test_an_empty_layer_is_not_registered():
    assert list(chunks(np.zeros((0, 64), np.uint8))) == []
    assert list(chunks(np.zeros((4, 0), np.uint8))) == []


REFUSED = InsufficientMemoryError("the system refuses to page-lock 4718592 bytes")


@pytest.mark.parametrize("k", range(LAYERS))
def test_a_layer_whose_memory_is_not_page_locked_works_the_same(monkeypatch, model, expected, k):
    accelerator = EmulatedAccelerator(fault=Fails("pin", k, REFUSED))
    caught = wrap_on(monkeypatch, model, accelerator, vram=0.5)
    blobs = [layer.blobs for layer in model.hybrimoe.pool.layers]

    assert len(caught) == 1
    assert "13.5 MiB of experts stay pageable" in caught[0]
    assert "refuses to page-lock" in caught[0]
    locked = [array for index, array in enumerate(blobs) if index != k]
    assert accelerator.pinned == {array.ctypes.data: array.nbytes for array in locked}
    memory = model.hybrimoe.stats()["hybrid"]["memory"]
    assert memory["pinned_bytes"] == sum(array.nbytes for array in locked)
    assert tokens(model) == expected
    hybrimoe.unwrap(model)
    assert accelerator.pinned == {}


def test_one_warning_however_many_layers_are_refused(monkeypatch, model, expected):
    accelerator = EmulatedAccelerator(fault=Fails("pin", 0, REFUSED, times=10**9))
    assert len(wrap_on(monkeypatch, model, accelerator, vram=0.5)) == 1
    assert accelerator.pinned == {}
    assert tokens(model) == expected


@pytest.mark.parametrize("k", range(6))
def test_a_refusal_midway_undoes_the_chunks_of_its_layer_alone(k):
    layers = [
        np.frombuffer(mmap.mmap(-1, 3 * mmap.PAGESIZE), np.uint8).reshape(3, mmap.PAGESIZE)
        for _ in range(2)
    ]
    accelerator = EmulatedAccelerator(fault=Fails("pin", k, REFUSED))
    pinned = Pinned(accelerator)
    refused = pinned.pin(layers, largest=mmap.PAGESIZE)
    whole = layers[1 - k // 3]

    assert "stay pageable" in refused
    assert sorted(accelerator.pinned) == [row.ctypes.data for row in whole]
    pinned.unpin()
    assert accelerator.pinned == {}
    assert pinned.nbytes == 0


def test_host_memory_is_unlocked_when_wrap_fails(monkeypatch, model, expected):
    lost = DeviceLostError("the emulated device fell off the bus")
    accelerator = EmulatedAccelerator(fault=Fails("copy", 5, lost))
    with pytest.raises(DeviceLostError, match="bus"):
        wrap_on(monkeypatch, model, accelerator, vram=0.5)
    assert accelerator.pinned == {}
    assert not hasattr(model, "hybrimoe")
    assert tokens(model) == expected
