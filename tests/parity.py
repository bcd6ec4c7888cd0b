"""How close a wrapped model is to the unwrapped one: the measurements behind `test_families.py`."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import families
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import hybrimoe

TOKENS = 64
CLOSE = 5e-4
"""NMSE of bfloat16 logits within which two models compute the same."""
measured: "list[Parity]" = []


@dataclass(frozen=True)
class Parity:
    """One family, wrapped against unwrapped.

    float32, padded, single: largest violation of |a - b| <= 1e-4 + 1e-4 |b|, as a share of the
    right side: at most 1 is within it. greedy: equal tokens of 64, None without generate.
    bfloat16: NMSE of logits; bfloat16_routed: the same while the wrapped model takes the experts
    that the unwrapped one took. rounding, wrapped_rounding: NMSE of the unwrapped and of the
    wrapped bfloat16 model against the same weights computed in float32: large where rounding
    alone makes a router choose other experts. restored: logits are bit-equal after unwrap.
    """

    name: str
    layers: int
    float32: float
    padded: float
    single: float
    greedy: int | None
    bfloat16: float
    bfloat16_routed: float
    rounding: float
    wrapped_rounding: float
    restored: bool

    def __str__(self) -> str:
        greedy = "no generate" if self.greedy is None else f"{self.greedy}/{TOKENS} greedy"
        return (
            f"{self.name:46} float32 {max(self.float32, self.padded, self.single):.3f} of tolerance, "
            f"{greedy:12}, bfloat16 NMSE {self.bfloat16:.1e}, same experts "
            f"{self.bfloat16_routed:.1e}; to float32: unwrapped {self.rounding:.1e}, wrapped "
            f"{self.wrapped_rounding:.1e}"
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
    errors = [
        violation(after[0], before[0]),
        violation(after[1][real], before[1][real]),
        violation(after[2], before[2]),
    ]
    greedy = None if tokens is None else int((tokens == again)[:, -TOKENS:].sum(1).min())
    restored = torch.equal(families.logits(model, given), before[0])
    result = Parity(name, layers, *errors, greedy, *_bfloat16(name), restored)
    measured.append(result)
    return result


def _bfloat16(name: str) -> tuple[float, float, float, float]:
    model = families.build(name, torch.bfloat16)
    exact = copy.deepcopy(model).float()
    given = families.inputs(name, model)
    wanted = families.logits(exact, families.inputs(name, exact))
    with routing(families.experts(model)) as taken:
        before = families.logits(model, given)
    with wrapped(model):
        after = families.logits(model, given)
        with routing(model.hybrimoe.layers, replay=taken):
            routed = families.logits(model, given)
    return nmse(after, before), nmse(routed, before), nmse(before, wanted), nmse(after, wanted)


@contextmanager
def wrapped(model: PreTrainedModel, **settings: Any) -> Iterator[PreTrainedModel]:
    """The model wrapped within the block."""
    yield hybrimoe.wrap(model, **settings)
    hybrimoe.unwrap(model)


@contextmanager
def routing(
    experts: list[nn.Module], replay: list[tuple[Tensor, ...]] | None = None
) -> Iterator[list[tuple[Tensor, ...]]]:
    """Record what the routers ask for, call by call, or make them ask for what was recorded."""
    record: list[tuple[Tensor, ...]] = []
    calls = iter(replay or [])

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if replay is not None:
            return (args[0], *next(calls))
        record.append(args[1:])
        return None

    hooks = [module.register_forward_pre_hook(hook) for module in experts]
    try:
        yield record
    finally:
        for handle in hooks:
            handle.remove()


def left_padding(given: Mapping[str, Tensor], padded: int = 3) -> Tensor:
    """An attention mask whose first sequence has some padded positions on the left."""
    mask = torch.ones(next(iter(given.values())).shape[:2], dtype=torch.int64)
    mask[0, :padded] = 0
    return mask


def violation(got: Tensor, wanted: Tensor, tolerance: float = 1e-4) -> float:
    """Largest |got - wanted| over tolerance * (1 + |wanted|); NaN where one is not finite."""
    return float(((got - wanted).abs() / (tolerance * (1 + wanted.abs()))).max())


def nmse(got: Tensor, wanted: Tensor) -> float:
    """Squared error over squared reference."""
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).square().sum() / wanted.square().sum())


def single_thread(function: Callable[[], Any]) -> Any:
    """Call a function with one torch thread: tiny models only wait for a second one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return function()
    finally:
        torch.set_num_threads(threads)


def _greedy(name: str, model: PreTrainedModel, given: Mapping[str, Tensor]) -> Tensor | None:
    if not families.generates(name):
        return None
    return model.generate(**given, max_new_tokens=TOKENS, do_sample=False)
