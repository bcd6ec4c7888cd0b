"""Compiling is in no speed, what a model needs is compiled ahead, and nobody waits in silence."""

import io
import subprocess
import sys
import time

import numba
import pytest
import torch
from numba.core import event

from hybrimoe.modules import warming
from hybrimoe.modules.warming import Need, needs_for, warm
from hybrimoe.runtime.counters import Stats
from hybrimoe.simd import stopwatch as compiling
from hybrimoe.simd.stopwatch import Stopwatch, stopwatch
from paths import TINY_MOE

FIRST_PASS = """
import hybrimoe, torch
from numba.core.dispatcher import Dispatcher
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained({folder!r}, num_hidden_layers=3).eval()
hybrimoe.wrap(model, weights="int4", device={device!r}, **{settings})
every = list(Dispatcher._memo.values())
compiled = lambda: {{(d.py_func.__qualname__, s) for d in every for s in d.signatures}}
before = compiled()
ids = torch.arange(10, 22)[None]
model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False)
print("ran", [name for name, _ in compiled() - before])
"""


class Compiles:
    """Stands for numba while it compiles for some seconds of a made-up clock."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(compiling.time, "perf_counter", lambda: self.now)

    def run(self, watch, *seconds):
        """Functions within each other, the outermost last."""
        for _ in seconds:
            watch.on_start(None)
        for each in seconds:
            self.now += each
            watch.on_end(None)


@pytest.fixture
def watch():
    watch = Stopwatch()
    yield watch
    event.unregister("numba:compile", watch)


def test_nested_functions_count_once_and_the_clock_stands_still(watch, monkeypatch):
    numba_ = Compiles(monkeypatch)
    numba_.run(watch, 2.0, 3.0)
    numba_.now += 1.0
    assert watch.seconds == 5.0
    assert watch.clock() == 1.0
    watch.on_start(None)
    numba_.now += 7.0
    assert watch.clock() == 1.0  # while it compiles, too


def test_numba_is_heard(watch):
    @numba.njit
    def twice(x):
        return 2 * x

    started = time.perf_counter()
    twice(1)
    assert 0 < watch.seconds <= time.perf_counter() - started
    before = watch.seconds
    twice(2)
    assert watch.seconds == before


def test_a_pass_does_not_count_what_it_compiled(monkeypatch):
    numba_, stats = Compiles(monkeypatch), Stats()
    stats.enter(torch.nn.Identity(), (), {})
    numba_.run(stopwatch, 30.0)
    numba_.now += 0.5
    stats.leave(torch.nn.Identity(), (), {}, None)
    assert (stats.prefill_s, stats.compile_s) == (0.5, 30.0)


def test_a_long_wait_is_explained_once_and_a_short_one_not(watch, monkeypatch, capsys):
    numba_ = Compiles(monkeypatch)
    with watch.saying("short", since=watch.seconds):
        numba_.run(watch, 0.5)
    with watch.saying("long", since=watch.seconds):
        numba_.run(watch, 0.5, 0.6, 2.0)
    assert capsys.readouterr().err == "long\n"


def test_each_step_is_named_while_it_compiles(monkeypatch, capsys):
    numba_ = Compiles(monkeypatch)
    steps = [Need("experts", "int4", "float32"), Need("norm", "", "float32")]
    monkeypatch.setattr(warming, "run_once", lambda need: numba_.run(stopwatch, 2.0))
    warm([*steps, steps[0]])
    what = f"compiling kernels for int4 on {warming.ISA_NAMES[warming.HOST_ISA]}"
    lines = [f"hybrimoe: {what}, once per machine: {number} of 2" for number in (1, 2)]
    assert capsys.readouterr().err.splitlines() == lines


def test_only_what_a_model_runs_is_needed():
    kinds = [("int4", "bfloat16"), ("q4_k", "bfloat16")]
    alone = [Need("experts", "int4", "bfloat16"), Need("experts", "q4_k", "bfloat16")]
    assert needs_for(kinds, None, shared=False) == alone
    assert needs_for(kinds[:1], "int8", shared=False)[1:] == [
        Need("linear", "int8", "bfloat16"),
        Need("linear", "int8", "bfloat16"),
        Need("norm", "", "bfloat16"),
    ]
    shared = [Need("experts", "int4", "float32"), Need("policies")]
    assert needs_for(kinds[:1], None, shared=True) == shared


@pytest.mark.parametrize(
    ("device", "settings"), [("cpu", {"linear": "int4"}), ("emulated", {"vram": 0.5})]
)
def test_the_first_pass_of_a_wrapped_model_compiles_nothing(device, settings):
    code = FIRST_PASS.format(folder=str(TINY_MOE), device=device, settings=settings)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=280, check=True
    )
    assert done.stdout.splitlines()[-1] == "ran []"


class Broken:
    """A standard error that nobody reads any more."""

    def write(self, text):
        raise BrokenPipeError(32, "Broken pipe")


def closed():
    stream = io.StringIO()
    stream.close()
    return stream


@pytest.mark.parametrize("stderr", [None, closed(), Broken()], ids=["none", "closed", "broken"])
def test_a_line_that_nobody_can_read_fails_no_compilation(stderr, watch, monkeypatch, capsys):
    numba_ = Compiles(monkeypatch)
    monkeypatch.setattr(sys, "stderr", stderr)
    with watch.saying("long", since=watch.seconds):
        numba_.run(watch, 0.5, 2.0)
    assert (watch.seconds, watch.clock()) == (2.5, 0.0)
    assert capsys.readouterr().out == ""


POLICIES = [Need("experts", "int4", "float32"), Need("policies")]


def beside(monkeypatch, seconds: int) -> subprocess.Popen:
    """A process in place of the one that compiles the policies."""
    code = f"import time; time.sleep({seconds})"
    process = subprocess.Popen([sys.executable, "-c", code])
    monkeypatch.setattr(warming, "_policies_aside", lambda wanted: process)
    return process


def test_an_interrupted_wait_leaves_no_process_behind(monkeypatch):
    process = beside(monkeypatch, 60)

    def interrupted(need):
        raise KeyboardInterrupt

    monkeypatch.setattr(warming, "run_once", interrupted)
    with pytest.raises(KeyboardInterrupt):
        warm(POLICIES)
    assert process.returncode is not None


def test_a_wait_for_the_process_beside_is_not_silent(monkeypatch, capsys):
    process = beside(monkeypatch, 1)
    monkeypatch.setattr(warming, "SOON", 0.05)
    monkeypatch.setattr(warming, "run_once", lambda need: None)
    warm(POLICIES)
    assert process.returncode == 0
    assert capsys.readouterr().err.endswith("once per machine: 2 of 2\n")


def test_a_frozen_application_is_not_started_again(monkeypatch):
    started = []
    monkeypatch.setattr(warming.plan_split._cache, "holds_any", lambda: False, raising=False)
    monkeypatch.setattr(warming.subprocess, "Popen", lambda *a, **_: started.append(a))
    monkeypatch.setattr(warming.launch, "cores", 2)
    warming._policies_aside(POLICIES)
    assert len(started) == 1
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    assert warming._policies_aside(POLICIES) is None
    assert len(started) == 1
