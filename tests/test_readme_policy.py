"""The README's policies run as they are printed, and are never replaced."""

import re
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hybrimoe

ROOT = Path(__file__).parents[1]
TINY = Path(__file__).parent / "assets" / "tiny-moe"
BLOCK = re.compile(r"<!-- policy -->\n```python\n(.*?)```\n<!-- /policy -->", re.DOTALL)
EXAMPLES = BLOCK.findall((ROOT / "README.md").read_text())


@pytest.fixture(scope="module")
def inputs():
    return AutoTokenizer.from_pretrained(TINY)(["In the beginning"], return_tensors="pt")


@torch.no_grad()
def generate(model, inputs):
    return model.generate(**inputs, max_new_tokens=8, do_sample=False)


def test_there_is_an_example_of_at_most_twenty_lines():
    assert EXAMPLES
    assert all(len([line for line in e.splitlines() if line.strip()]) <= 20 for e in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_runs_as_it_is_printed_and_decides(inputs, example):
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()
    expected = generate(model, inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(compile(example, "README.md", "exec"), {"model": model, "__name__": "readme"})
        assert torch.equal(generate(model, inputs), expected)
    shared = model.hybrimoe.stats()["hybrid"]
    assert shared["replaced"] == {}
    assert shared["gpu_experts"] > 0
    given = model.hybrimoe.config
    assert [p for p in (given.scheduler, given.cache, given.prefetcher) if p is not None]
    hybrimoe.unwrap(model)
