"""Three layers of the bundled model on an emulated accelerator that can fail at any operation."""

import warnings

import torch
from transformers import AutoModelForCausalLM

import hybrimoe
from hybrimoe import session
from paths import TINY_MOE

LAYERS, EXPERTS, SLOT = 3, 32, 147456  # bytes of an expert in float32
GIB = 1 << 30


def load_small():
    """The first three layers of tiny-moe, bare."""
    return AutoModelForCausalLM.from_pretrained(
        TINY_MOE, dtype=torch.float32, num_hidden_layers=LAYERS
    ).eval()


def tokens(model, length=7, count=6):
    """Greedy tokens of a batch of two: one prefill and some decode steps."""
    ids = torch.randint(10, 4000, (2, length), generator=torch.Generator().manual_seed(0))
    return model.generate(ids, max_new_tokens=count, do_sample=False).tolist()


def wrap_on(monkeypatch, model, accelerator, **settings):
    """Wrap, and what it warned of."""
    monkeypatch.setattr(session, "open_accelerator", lambda config: accelerator)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        hybrimoe.wrap(model, **{"device": "emulated"} | settings)
    return [str(warning.message) for warning in caught]


class Fails:
    """Raises an error at the k-th operation of a kind, and from then on if `times` is large."""

    def __init__(self, operation, k=0, error=None, times=1):
        self.operation, self.left, self.times = operation, k, times
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        self.raised = 0

    def __call__(self, operation):
        if operation != self.operation:
            return
        self.left -= 1
        if self.left < 0 and self.raised < self.times:
            self.raised += 1
            raise self.error
