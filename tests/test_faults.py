"""Faults at any point of a generation: right tokens or a typed error, and a model that still works."""

import os
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import hybrimoe
from hybrimoe.errors import DeviceLostError, InsufficientMemoryError
from hybrimoe.runtime.devices import open as accelerators
from hybrimoe.runtime.devices.emulated import EmulatedAccelerator
from paths import TINY_MOE
from small_model import Fails, load_small, tokens, wrap_on

OPERATIONS = ["copy", "experts", "fetch", "wait"]
NUMBERS = [0, 1, 2, 5, 11, 16]


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


@pytest.fixture
def accelerator(monkeypatch, model):
    accelerator = EmulatedAccelerator()
    wrap_on(monkeypatch, model, accelerator, vram=0.5, preset="ondemand")
    return accelerator


def at_rest(model):
    """Whether no slot is in use and the table says the same forwards and backwards."""
    hybrid = model.hybrimoe.hybrid
    cache, content = hybrid.cache, hybrid.executor.content
    for layer, row in enumerate(cache.slot):
        for expert in (row >= 0).nonzero()[0]:
            assert cache.owner[row[expert]].tolist() == [layer, expert]
            assert content[row[expert]][:2] == (layer, expert)
    assert (cache.owner[:, 0] >= 0).sum() == cache.occupied.sum()
    return not cache.references.any() and not hybrid.lock.locked()


class Stops(Exception):
    """What a user's own code raises."""


@pytest.mark.parametrize("k", NUMBERS)
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("error", [KeyboardInterrupt, Stops, RuntimeError])
def test_an_error_of_the_moment_leaves_a_model_that_gives_the_right_tokens(
    model, accelerator, expected, error, operation, k
):
    accelerator.fault = fails = Fails(operation, k, error())
    with pytest.raises(error):
        tokens(model)
    assert fails.raised == 1
    assert not model.hybrimoe.hybrid.cache.references.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tokens(model) == expected
    assert at_rest(model)
    assert model.hybrimoe.stats()["hybrid"]["slots"] == 48


def test_a_second_interrupt_while_recovering_does_no_harm(model, accelerator, expected):
    accelerator.fault = Fails("copy", 40, KeyboardInterrupt(), times=1)
    with pytest.raises(KeyboardInterrupt):
        tokens(model)
    for k in (0, 20, 47):  # of the 48 copies that fill the slots anew
        accelerator.fault = Fails("copy", k, KeyboardInterrupt())
        with pytest.raises(KeyboardInterrupt):
            tokens(model)
    assert tokens(model) == expected
    assert at_rest(model)


@pytest.mark.parametrize("k", [0, 3, 8])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("again", OPERATIONS)
def test_memory_and_then_an_interrupt_while_giving_up_slots(
    model, accelerator, expected, operation, k, again
):
    out, stop = Fails(operation, k), Fails(again, 0, KeyboardInterrupt())

    def fault(name):
        if out.raised:
            stop(name)
        out(name)

    accelerator.fault = fault
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(KeyboardInterrupt):
            tokens(model)
    assert tokens(model) == expected
    assert at_rest(model)
    assert model.hybrimoe.stats()["hybrid"]["slots"] == 42


@pytest.mark.parametrize("k", NUMBERS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_lost_device_stays_lost_and_unwrap_still_restores(
    model, accelerator, expected, operation, k
):
    lost = DeviceLostError("the emulated device fell off the bus")
    accelerator.fault = Fails(operation, k, lost)
    for _ in range(3):
        with pytest.raises(DeviceLostError, match="bus"):
            tokens(model)
    assert not model.hybrimoe.hybrid.cache.references.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hybrimoe.unwrap(model)
    assert accelerator.pinned == {}
    assert tokens(model) == expected


def test_a_device_lost_while_slots_are_given_up_is_lost_too(model, accelerator, expected):
    out = Fails("experts", 5)
    gone = Fails("allocate", 0, DeviceLostError("the emulated device fell off the bus"))

    def fault(name):
        out(name)
        gone(name)

    accelerator.fault = fault
    for _ in range(2):
        with pytest.raises(DeviceLostError, match="bus"):
            tokens(model)
    hybrimoe.unwrap(model)
    assert tokens(model) == expected


def test_what_was_lost_with_the_device_is_said_after_the_experts_are_back(
    monkeypatch, model, accelerator
):
    def move(model, device):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patched:
        patched.setattr(accelerators, "move_dense", move)
        with pytest.raises(DeviceLostError, match="experts are restored"):
            hybrimoe.unwrap(model)
    assert not hasattr(model, "hybrimoe")
    assert model.model.layers[0].mlp.experts.down_proj.numel() > 0


# What ends a generation from outside.


class After(StoppingCriteria):
    """Stops, or fails, after some tokens."""

    def __init__(self, count, error=None):
        self.left, self.error = count, error

    def __call__(self, input_ids, scores, **kwargs):
        self.left -= 1
        if self.left <= 0 and self.error:
            raise self.error
        return torch.full((len(input_ids),), self.left <= 0)


class Drops(BaseStreamer):
    """A client that goes away."""

    def put(self, value):
        raise Stops("the connection is closed")

    def end(self):
        pass


@pytest.mark.parametrize("preset", ["hybrimoe", "adapmoe", "ondemand"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stopping_early_holds_no_slot(monkeypatch, model, expected, preset, count):
    accelerator = EmulatedAccelerator(bandwidth=5e8)  # so that prefetches are still on the wire
    wrap_on(monkeypatch, model, accelerator, vram=0.25, preset=preset)
    ids = torch.tensor([[row[:7]] for row in expected]).squeeze(1)
    for _ in range(3):
        stopped = model.generate(
            ids, max_new_tokens=6, do_sample=False, stopping_criteria=[After(count)]
        )
        assert stopped.tolist() == [row[: 7 + count] for row in expected]
        assert at_rest(model)
        with pytest.raises(Stops):
            model.generate(ids, max_new_tokens=6, stopping_criteria=[After(count, Stops())])
        assert at_rest(model)
    with pytest.raises(Stops):
        model.generate(ids[:1], max_new_tokens=6, do_sample=False, streamer=Drops())
    assert at_rest(model)
    assert tokens(model) == expected


INTERRUPTED = """
import os, random, signal, sys, threading, time, warnings
import torch, transformers, hybrimoe
from hybrimoe.runtime.devices import open as accelerators
from hybrimoe import session
from hybrimoe.runtime.devices.emulated import EmulatedAccelerator
transformers.utils.logging.set_verbosity_error()
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], num_hidden_layers=3).eval()
session.open_accelerator = lambda config: EmulatedAccelerator(bandwidth=2e9)
ids = torch.arange(10, 40)[None]
model = hybrimoe.wrap(model, device="emulated", vram=0.5, preset=sys.argv[2])

def tokens(count):
    return model.generate(ids, max_new_tokens=count, do_sample=False, min_new_tokens=count).tolist()

wanted, began = tokens(6), time.perf_counter()
tokens(30)
usual, rng, met, slowest = time.perf_counter() - began, random.Random(0), 0, 0.0
for _ in range(6):
    sent = []

    def send():
        sent.append(time.perf_counter())
        os.kill(os.getpid(), signal.SIGINT)

    timer = threading.Timer(rng.uniform(0, usual), send)
    timer.start()
    try:
        tokens(300)
    except KeyboardInterrupt:
        met += 1
        slowest = max(slowest, time.perf_counter() - sent[0])
    timer.join()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if tokens(6) != wanted:
            sys.exit(3)
    if model.hybrimoe.hybrid.cache.references.any():
        sys.exit(4)
print(met, slowest)
sys.exit(0 if met >= 5 else 5)
"""


@pytest.mark.skipif(os.name == "nt", reason="a process cannot send itself Ctrl-C there")
@pytest.mark.parametrize("preset", ["hybrimoe", "ondemand"])
def test_ctrl_c_at_random_times_leaves_a_model_that_gives_the_right_tokens(preset):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(TINY_MOE), preset],
        env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]


# The table itself.


def test_memory_that_is_short_on_the_cpu_alone_is_the_callers_error(model, accelerator):
    """With nothing left to give up, there is nothing to try again."""
    accelerator.fault = Fails("experts", times=10**9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tokens(model)
    hybrid = model.hybrimoe.hybrid

    def fail(*_):
        raise InsufficientMemoryError("no room for the sums")

    hybrid.engine.step = fail
    with pytest.raises(
        InsufficientMemoryError, match="no expert is on emulated, and still: no room"
    ):
        tokens(model)
