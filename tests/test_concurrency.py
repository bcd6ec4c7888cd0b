"""Several threads, forked children and numba's other threading layer."""

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import hybrimoe
from adapted import bare, bits, same
from hybrimoe.errors import WrappedModelError
from paths import TINY_MOE
from test_wrap import generate

TOKENS = 6


@pytest.fixture
def eager_switching():
    """Threads give way to each other as often as the interpreter can."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(usual)


def prompt(seed: int) -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(10, 4000, (1 + seed % 2, 5 + seed), generator=random)}


@pytest.mark.usefixtures("eager_switching")
def test_threads_that_generate_at_once_get_what_they_get_alone(model):
    hybrimoe.wrap(model)
    prompts = [prompt(seed) for seed in range(12)]
    wanted = [generate(model, each, max_new_tokens=TOKENS) for each in prompts]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda each: generate(model, each, max_new_tokens=TOKENS), prompts))

    assert got == wanted


@pytest.mark.usefixtures("eager_switching")
def test_threads_that_launch_at_once_get_what_they_get_alone(model32: nn.Module):
    layers = hybrimoe.wrap(model32).hybrimoe.layers
    calls = []
    for seed in range(40):
        random = torch.Generator().manual_seed(seed)
        tokens = 1 + seed % 20
        hidden = torch.randn(tokens, 192, generator=random)
        ids = torch.randint(32, (tokens, 4), generator=random)
        calls.append((layers[seed % 12], hidden, ids, torch.rand(tokens, 4, generator=random)))
    wanted = [layer(*args) for layer, *args in calls]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            got = list(pool.map(lambda call: call[0](*call[1:]), calls))
            assert all(torch.equal(a, b) for a, b in zip(got, wanted))


@pytest.mark.parametrize("settings", [{}, {"ram": 0.6}])
def test_unwrap_waits_for_the_layer_that_another_thread_computes(monkeypatch, settings):
    model, plain = bare(), bare()
    first = plain.model.layers[0].mlp.experts
    hybrimoe.wrap(model, device="emulated", vram=0.3, **settings)
    memory, layer = model.hybrimoe.hybrid.memory, model.hybrimoe.layers[0]
    args = torch.randn(3, 64), torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.rand(3, 2)
    inside, go_on, run = threading.Event(), threading.Event(), memory.run

    def slow(*given):
        inside.set()
        assert go_on.wait(60)
        return run(*given)

    monkeypatch.setattr(memory, "run", slow)
    with ThreadPoolExecutor(2) as pool:
        computed = pool.submit(layer, *args)
        assert inside.wait(60)
        unwrapped = pool.submit(hybrimoe.unwrap, model)
        time.sleep(0.2)
        early = unwrapped.done()
        go_on.set()
        assert not early
        torch.testing.assert_close(computed.result(60), first(*args), rtol=1e-4, atol=1e-5)
        unwrapped.result(60)
    assert same(bits(model), bits(plain))
    with pytest.raises(WrappedModelError, match="while this pass ran"):
        layer(*args)


LOAD = """
import os, sys, threading, time
import torch, transformers, hybrimoe
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
hybrimoe.wrap(model, threads=2)
ids = torch.arange(10, 40)[None]

def tokens():
    return model.generate(ids, max_new_tokens=4, do_sample=False).tolist()

wanted = tokens()
"""

# A thread that was joined still gives back its memory in MKL. A child forked at that moment gets
# MKL's lock held, and its first matrix product waits for ever. So the fork waits for their end.
THREADS = """
def tasks():
    return len(os.listdir("/proc/self/task")) if os.path.isdir("/proc/self/task") else 0

before, results = tasks(), []
workers = [threading.Thread(target=lambda: results.append(tokens())) for _ in range(3)]
for worker in workers:
    worker.start()
for worker in workers:
    worker.join()
while tasks() > before:
    time.sleep(0.01)
if results != [wanted] * 3:
    sys.exit(3)
"""

FORK = """
child = os.fork()
if child == 0:
    torch.set_num_threads(1)  # as a DataLoader's worker does: torch's own threads died, too
    os._exit(0 if tokens() == wanted else 4)
same = tokens() == wanted
_, status = os.waitpid(child, 0)
sys.exit(os.waitstatus_to_exitcode(status) or (0 if same else 5))
"""


def run(code: str, **environment: str) -> None:
    subprocess.run(
        [sys.executable, "-c", LOAD + code, str(TINY_MOE)],
        env=os.environ | environment,
        timeout=120,
        check=True,
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_threads_and_then_a_forked_child_and_its_parent_all_generate(layer):
    run(THREADS + FORK, NUMBA_THREADING_LAYER=layer)
