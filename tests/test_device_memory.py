"""Expert slots within what the accelerator has: at the start, out of memory, and under pressure."""

import warnings
from types import SimpleNamespace

import pytest
import torch

import hybrimoe
from hybrimoe import session
from hybrimoe.errors import InsufficientMemoryError
from hybrimoe.policy.presets import PRESETS
from hybrimoe.runtime.devices import open as accelerators
from hybrimoe.runtime.devices.emulated import EmulatedAccelerator
from hybrimoe.runtime.slot_budget import SPARE
from small_model import GIB, LAYERS, SLOT, Fails, load_small, tokens, wrap_on


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


# The first slab.


def test_a_slab_that_is_refused_is_made_smaller_with_one_warning(monkeypatch, model, expected):
    caught = wrap_on(monkeypatch, model, EmulatedAccelerator(30 * SLOT), vram=0.5)
    memory = model.hybrimoe.stats()["hybrid"]["memory"]

    assert len(caught) == 1
    assert f"emulated keeps {memory['slots']} of 48 expert slots" in caught[0]
    assert memory["slots"] == 30 - SPARE
    assert (memory["slots_at_first"], memory["shrinks"]) == (48, 1)
    assert tokens(model) == expected


def test_less_than_a_slot_per_layer_fails_where_a_budget_was_given(monkeypatch, model, expected):
    accelerator = EmulatedAccelerator(4 * SLOT)
    with pytest.raises(InsufficientMemoryError, match="one per layer") as caught:
        wrap_on(monkeypatch, model, accelerator, vram=0.5)

    assert caught.value.need == LAYERS * SLOT
    assert not hasattr(model, "hybrimoe")
    assert accelerator.pinned == {}
    assert tokens(model) == expected


@pytest.mark.parametrize("capacity", [4 * SLOT, GIB + (1 << 20)])
def test_less_than_a_slot_per_layer_leaves_the_cpu_where_none_was_given(
    monkeypatch, model, expected, capacity
):
    caught = wrap_on(monkeypatch, model, EmulatedAccelerator(capacity))
    assert len(caught) == 1
    assert "no expert slots (CPU only)" in caught[0]
    assert tokens(model) == expected
    shared = model.hybrimoe.stats()["hybrid"]
    assert (shared["slots"], shared["gpu_experts"]) == (0, 0)
    assert shared["cpu_experts"] > 0


def test_a_slab_that_the_device_refuses_of_itself_is_no_torch_error(monkeypatch, model, expected):
    """What was free when it was counted may be gone when it is allocated."""
    fails = Fails("allocate", times=1)
    accelerator = EmulatedAccelerator(2 * GIB, fault=fails)
    caught = wrap_on(monkeypatch, model, accelerator)

    assert len(caught) == 1
    assert "CUDA out of memory" in caught[0]
    assert tokens(model) == expected


def test_a_dense_part_that_does_not_fit_is_a_typed_error():
    def to(device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    parameter = SimpleNamespace(data=SimpleNamespace(to=to), nbytes=8)
    with pytest.raises(InsufficientMemoryError, match="without its experts takes 8 bytes"):
        session.move_dense(SimpleNamespace(parameters=lambda: [parameter]), "cuda")


def test_a_dense_part_that_did_not_fit_is_brought_back(monkeypatch, model, expected):
    accelerator, moves = EmulatedAccelerator(), []
    accelerator.compute_device = "cuda"

    def move(model, device):
        moves.append(device)
        if device == "cuda":
            raise InsufficientMemoryError("the model without its experts does not fit")

    for caller in (session, accelerators):
        monkeypatch.setattr(caller, "move_dense", move)
    with pytest.raises(InsufficientMemoryError):
        wrap_on(monkeypatch, model, accelerator)
    assert moves == ["cuda", "cpu"]
    assert not hasattr(model, "hybrimoe")
    assert tokens(model) == expected


# Out of memory while generating.

NUMBERS = [0, 1, 2, 3, 7, 12, 16]


@pytest.mark.parametrize("k", NUMBERS)
@pytest.mark.parametrize("operation", ["copy", "experts", "fetch", "wait"])
@pytest.mark.parametrize("preset", ["hybrimoe", "ondemand"])
def test_out_of_memory_at_any_operation_gives_up_slots_and_no_token(
    monkeypatch, model, expected, preset, operation, k
):
    accelerator = EmulatedAccelerator(seed=k)
    wrap_on(monkeypatch, model, accelerator, vram=0.5, preset=preset)
    accelerator.fault = fails = Fails(operation, k)
    with pytest.warns(RuntimeWarning, match="of 48 expert slots: CUDA out of memory") as caught:
        assert tokens(model) == expected
    assert fails.raised == len(caught) == 1
    assert tokens(model) == expected

    hybrid = model.hybrimoe.hybrid
    memory = hybrid.to_dict()["memory"]
    assert (memory["slots_at_first"], memory["slots"], memory["shrinks"]) == (48, 42, 1)
    assert "Tried to allocate" in memory["reason"]
    assert len(accelerator.slab) == 42 + SPARE
    assert not hybrid.cache.references.any()
    assert hybrid.cache.resident(0).any()


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_shrinks_to_the_floor_and_then_to_the_cpu(
    monkeypatch, model, expected, preset
):
    """R32: with one slot per layer a prompt activates far more experts than there are slots."""
    accelerator, seen, wanted = EmulatedAccelerator(), [36], [row[:9] for row in expected]
    wrap_on(monkeypatch, model, accelerator, vram=36 * SLOT, preset=preset)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while len(seen) < 2 or seen[-1] < seen[-2]:
            accelerator.fault = Fails("experts")
            assert tokens(model, count=2) == wanted
            seen.append(model.hybrimoe.stats()["hybrid"]["slots"])
    assert model.hybrimoe.stats()["hybrid"]["memory"]["shrinks"] == len(caught) == len(seen) - 2
    # These two use an accelerator not at all, or for whole layers of 32 experts.
    last = {"cpu": [36, 36], "llamacpp": [28, 28]}.get(preset, [LAYERS, 0, 0])
    assert seen[-len(last) :] == last


def test_memory_that_never_comes_back_ends_on_the_cpu_within_one_pass(monkeypatch, model, expected):
    accelerator = EmulatedAccelerator()
    wrap_on(monkeypatch, model, accelerator, vram=1.0)
    accelerator.fault = Fails("experts", times=10**9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tokens(model) == expected
    assert "CPU only" in str(caught[-1].message)
    assert len(caught) <= 10
    assert len(accelerator.slab) == 0
    assert tokens(model) == expected


@pytest.mark.parametrize("refused", [1, 2, 3, 10**9])
def test_a_smaller_slab_may_be_refused_too(monkeypatch, model, expected, refused):
    accelerator = EmulatedAccelerator()
    wrap_on(monkeypatch, model, accelerator, vram=0.5)
    out, allocate = Fails("experts"), Fails("allocate", times=refused)

    def fault(operation):
        out(operation)
        allocate(operation)

    accelerator.fault = fault
    with pytest.warns(RuntimeWarning) as caught:
        assert tokens(model) == expected
    slots = model.hybrimoe.stats()["hybrid"]["slots"]
    assert len(caught) == 1
    assert slots == 0 if refused > 3 else LAYERS <= slots < 42


def test_what_was_learnt_outlives_a_shrink(monkeypatch, model):
    accelerator = EmulatedAccelerator()
    wrap_on(monkeypatch, model, accelerator, vram=0.5)
    tokens(model)
    cache = model.hybrimoe.hybrid.cache
    steps = cache.books.steps.copy()
    accelerator.fault = Fails("experts")
    with pytest.warns(RuntimeWarning):
        tokens(model)

    assert cache.books.steps.tolist() == (2 * steps).tolist()  # and a retry is not a second step


def test_a_layer_that_failed_counts_its_hits_and_misses_once(monkeypatch, model):
    def count(fault):
        accelerator = EmulatedAccelerator()
        wrap_on(monkeypatch, model, accelerator, vram=0.5, preset="ktransformers")
        accelerator.fault = fault
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tokens(model)
        shared = model.hybrimoe.stats()["hybrid"]
        hybrimoe.unwrap(model)
        return shared["hits"] + shared["misses"] + shared["late"]

    assert count(Fails("experts", 5)) == count(None)


# Pressure.


def test_a_growing_kv_cache_takes_slots_and_never_more_than_there_is(monkeypatch, model, expected):
    """4096 tokens of a KV cache a thousand times the tiny model's, 64 to a pass."""
    kv = 4096 * 700_000
    accelerator = EmulatedAccelerator(3 * GIB)
    caught = wrap_on(monkeypatch, model, accelerator, vram=1.0)
    assert caught == []
    passes, least = [], []

    def grow(*_):
        accelerator.ballast += kv // 64
        passes.append(1)

    def look(*_):
        least.append(accelerator.free_bytes())

    hooks = [model.register_forward_pre_hook(grow, prepend=True), model.register_forward_hook(look)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        while len(passes) < 64:
            assert tokens(model) == expected
    for hook in hooks:
        hook.remove()
    memory = model.hybrimoe.stats()["hybrid"]["memory"]

    assert memory["shrinks"] == len(caught) > 0
    assert "left for the rest of the model" in memory["reason"]
    assert memory["slots"] >= LAYERS
    assert memory["slots"] < 96


def test_pressure_gives_up_what_is_missing_and_stops_at_the_floor(monkeypatch, model, expected):
    capacity = GIB + (96 + SPARE) * SLOT
    accelerator = EmulatedAccelerator(capacity)
    wrap_on(monkeypatch, model, accelerator, vram=1.0)
    memory = model.hybrimoe.hybrid.memory
    assert memory.high == GIB
    accelerator.ballast = GIB // 2  # half of the workspace may go before anything is done
    tokens(model)
    assert memory.slots == 96
    accelerator.ballast += 10 * SLOT
    with pytest.warns(RuntimeWarning, match="left for the rest of the model"):
        assert tokens(model) == expected
    assert memory.slots == LAYERS  # half a GiB would be 3641 slots
    assert len(accelerator.slab) == LAYERS + SPARE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerator.ballast += 10 * SLOT
        assert tokens(model) == expected
    assert memory.slots == LAYERS


def test_nothing_is_allocated_per_token(monkeypatch, model):
    operations = []
    wrap_on(monkeypatch, model, EmulatedAccelerator(fault=operations.append), vram=0.5)
    tokens(model)
    assert operations.count("allocate") == 1
    operations.clear()
    tokens(model, count=20)
    tokens(model, length=40, count=3)

    assert operations.count("experts") > 20
    assert operations.count("allocate") == 0
