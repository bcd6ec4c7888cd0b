"""How close a wrapped model is to the unwrapped one: the measurements behind `test_families.py`."""

import copy
import functools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import families
import torch
from torch import Tensor
from transformers import PreTrainedModel

import hybrimoe

TOKENS = 64
LOOSE = 5e-4
"""NMSE of bfloat16 logits beyond which the rounding of the model itself is looked at."""


@dataclass(frozen=True)
class Parity:
    """One family. Errors are wrapped against unwrapped.

    float32, padded, single: largest violation of |a - b| <= 1e-4 + 1e-4 |b|, as a share of the
    right side: at most 1 is within it. greedy: equal tokens of 64, None without generate.
    bfloat16: NMSE of logits. rounding, wrapped_rounding: NMSE of the unwrapped and of the wrapped
    bfloat16 model against the same weights computed in float32. restored: bit-equal after unwrap.
    """

    name: str
    layers: int
    float32: float
    padded: float
    single: float
    greedy: int | None
    bfloat16: float
    rounding: float
    wrapped_rounding: float
    restored: bool

    def __str__(self) -> str:
        greedy = "no generate" if self.greedy is None else f"{self.greedy}/{TOKENS} greedy"
        return (
            f"{self.name:50} float32 {self.float32:.3f} padded {self.padded:.3f} single "
            f"{self.single:.3f} of tolerance, {greedy:12} bfloat16 NMSE {self.bfloat16:.1e} "
            f"(rounding: unwrapped {self.rounding:.1e}, wrapped {self.wrapped_rounding:.1e})"
        )


@functools.cache
def measure(name: str) -> Parity:
    """Build the family's tiny model in both dtypes, wrap it natively and compare."""
    model = families.build(name)
    given = families.inputs(name, model)
    padded = given | {"attention_mask": left_padding(given)}
    single = {key: value[:1, -1:] for key, value in given.items()}
    before = [families.logits(model, case) for case in (given, padded, single)]
    tokens = _greedy(name, model, padded)
    with wrapped(model):
        layers = len(model.hybrimoe.layers)
        after = [families.logits(model, case) for case in (given, padded, single)]
        again = _greedy(name, model, padded)
    real = padded["attention_mask"].bool()
    before[1], after[1] = before[1][real], after[1][real]
    errors = [violation(a, b) for a, b in zip(after, before)]
    equal = None if tokens is None else int((tokens == again).sum(1).min()) - given_length(given)
    restored = torch.equal(families.logits(model, given), before[0])
    return Parity(name, layers, *errors, equal, *_halves(name), restored)


def _halves(name: str) -> tuple[float, float, float]:
    model = families.build(name, torch.bfloat16)
    exact = copy.deepcopy(model).float()
    given, given32 = families.inputs(name, model), families.inputs(name, exact)
    wanted, before = families.logits(exact, given32), families.logits(model, given)
    with wrapped(model):
        after = families.logits(model, given)
    return nmse(after, before), nmse(before, wanted), nmse(after, wanted)


@contextmanager
def wrapped(model: PreTrainedModel, **settings: object) -> Iterator[PreTrainedModel]:
    """The model wrapped within the block."""
    yield hybrimoe.wrap(model, **settings)
    hybrimoe.unwrap(model)


def left_padding(given: Mapping[str, Tensor]) -> Tensor:
    """An attention mask whose first sequence has three padded positions on the left."""
    some = next(iter(given.values()))
    mask = torch.ones(some.shape[:2], dtype=torch.int64)
    mask[0, :3] = 0
    return mask


def given_length(given: Mapping[str, Tensor]) -> int:
    return next(iter(given.values())).shape[1]


def violation(got: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> float:
    """Largest |got - wanted| over tolerance * (1 + |wanted|); NaN where one of them is not finite."""
    error = (got - wanted).abs() / (tolerance * (1 + wanted.abs()))
    return float(error.max())


def nmse(got: Tensor, wanted: Tensor) -> float:
    """Squared error over squared reference."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).square().sum() / wanted.square().sum())


def _greedy(name: str, model: PreTrainedModel, given: Mapping[str, Tensor]) -> Tensor | None:
    if not families.generates(name):
        return None
    return model.generate(**given, max_new_tokens=TOKENS, do_sample=False)
