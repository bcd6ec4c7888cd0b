"""What wrapping costs in memory, measured on whole processes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paths import TINY_MOE

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="RssAnon is read from /proc"
)

COMMON = """
import gc, json, os, sys, threading, time, weakref, warnings
from pathlib import Path
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
import torch, transformers, hybrimoe
warnings.simplefilter("ignore")
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

def anonymous():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
"""

WRAP = """
def build(layers, hidden):
    config = transformers.MixtralConfig(
        num_hidden_layers=layers, hidden_size=hidden, intermediate_size=hidden, vocab_size=64,
        num_local_experts=16, num_attention_heads=4, num_key_value_heads=4,
    )
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM._from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    return model

def measure(weights):
    hybrimoe.wrap(build(1, 64), weights=weights)  # compiles, which takes memory of its own
    model = build(5, 1024)
    experts = model.model.layers[0].mlp.experts
    layer = sum(parameter.nbytes for parameter in experts.parameters())
    del experts
    gc.collect()
    before, samples, done = anonymous(), [], threading.Event()

    def sample():
        while not done.is_set():
            samples.append(anonymous())
            time.sleep(0.001)

    sampler = threading.Thread(target=sample)
    sampler.start()
    hybrimoe.wrap(model, weights=weights)
    done.set()
    sampler.join()
    gc.collect()
    return {
        "layer": layer, "samples": len(samples), "peak": max(samples) - before,
        "after": anonymous() - before, "pool": model.hybrimoe.pool.nbytes,
    }

print(json.dumps({weights: measure(weights) for weights in ("native", "int4")}))
"""

CYCLES = """
def load():
    return transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], num_hidden_layers=2)

def cycle(model, ids):
    hybrimoe.wrap(model)
    model.generate(ids, max_new_tokens=2, do_sample=False)
    hybrimoe.unwrap(model)

def state():
    gc.collect()
    return anonymous(), threading.active_count(), len(os.listdir("/proc/self/fd")), \\
        len(os.listdir("/proc/self/task"))

model, ids = load(), torch.arange(8)[None]
for _ in range(5):
    cycle(model, ids)
before = state()
for _ in range(50):
    cycle(model, ids)
after = state()
hybrimoe.wrap(model)
model.generate(ids, max_new_tokens=2, do_sample=False)
references = [weakref.ref(thing) for thing in
    (model, model.hybrimoe, model.hybrimoe.pool, model.hybrimoe.layers[0])]
del model
gc.collect()
print(json.dumps({
    "growth": [b - a for a, b in zip(before, after)],
    "alive": sum(reference() is not None for reference in references),
}))
"""


def run(code: str, *arguments: str) -> dict:
    """The last line that a fresh process prints, as JSON."""
    command = [sys.executable, "-c", COMMON + code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def used() -> dict:
    """Bytes of one layer, of the pool, and how memory grew while and after wrap, per format.

    Each tensor has 32 MiB or more: malloc may keep smaller ones for itself when they are freed.
    """
    return run(WRAP)


@pytest.mark.parametrize("weights", ["native", "int4"])
def test_wrap_holds_at_most_one_layer_more_than_the_model(used, weights):
    assert used[weights]["layer"] == 16 * 3 * 1024 * 1024 * 2
    assert used[weights]["samples"] > 20
    assert used[weights]["peak"] <= 1.1 * used[weights]["layer"]


@pytest.mark.parametrize(("weights", "saved"), [("native", 0), ("int4", 3.5)])
def test_after_wrap_the_process_is_smaller_by_what_the_format_saves(used, weights, saved):
    layer, pool = used[weights]["layer"], used[weights]["pool"]

    assert 5 * layer - pool >= saved * layer
    assert used[weights]["after"] <= pool - 5 * layer + 0.1 * layer


def test_fifty_cycles_leave_no_memory_threads_or_files_behind():
    result = run(CYCLES, str(TINY_MOE))
    memory, threads, files, tasks = result["growth"]

    assert memory <= 5 * 2**20
    assert (threads, files, tasks) == (0, 0, 0)
    assert result["alive"] == 0
