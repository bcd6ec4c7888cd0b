"""How close a wrapped model is to the unwrapped one: the measurements behind `test_families.py`."""

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import families
import hybrimoe

TOKENS = 64
CLOSE = 5e-4
"""NMSE of bfloat16 logits within which two models compute the same."""
Call = tuple[Tensor, ...]
measured: "list[Parity]" = []


@dataclass(frozen=True)
class Parity:
    """One family, wrapped against unwrapped.

    float32, padded, single: largest violation of |a - b| <= 1e-4 + 1e-4 |b|, as a share of the
    right side: at most 1 is within it. greedy: equal tokens of 64, None without generate.
    restored: logits are bit-equal after unwrap. bfloat16: how its logits compare.
    """

    name: str
    layers: int
    float32: float
    padded: float
    single: float
    greedy: int | None
    restored: bool
    bfloat16: "Halves"

    def __str__(self) -> str:
        greedy = "no generate" if self.greedy is None else f"{self.greedy}/{TOKENS} greedy"
        worst = max(self.float32, self.padded, self.single)
        return f"{self.name:46} float32 {worst:.3f} of tolerance, {greedy:12}, {self.bfloat16}"


@dataclass(frozen=True)
class Halves:
    """bfloat16 logits, wrapped against unwrapped, as NMSE.

    A router that finds two experts equally good may take either after any rounding, and then the
    logits differ by far more than rounding. So: free compares the models as they are; routed, while
    the wrapped one takes the experts that the unwrapped one took. moved: tokens times layers whose
    experts have other shares in the free run; before_move: NMSE of what the first such layer got.
    unwrapped, wrapped: each model against the same weights computed in float32.
    """

    free: float
    routed: float
    moved: int
    before_move: float
    unwrapped: float
    wrapped: float

    def __str__(self) -> str:
        return (
            f"bfloat16 NMSE {self.free:.1e}, same experts {self.routed:.1e}, {self.moved} tokens "
            f"rerouted; to float32: unwrapped {self.unwrapped:.1e}, wrapped {self.wrapped:.1e}"
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
    result = Parity(name, layers, *errors, greedy, restored, _bfloat16(name))
    measured.append(result)
    return result


def _bfloat16(name: str) -> Halves:
    model = families.build(name, torch.bfloat16)
    exact = copy.deepcopy(model).float()
    given = families.inputs(name, model)
    wanted = families.logits(exact, families.inputs(name, exact))
    with calls(families.experts(model)) as taken:
        before = families.logits(model, given)
    with wrapped(model):
        layers = model.hybrimoe.layers
        with calls(layers) as retaken:
            free = families.logits(model, given)
        with calls(layers, replay=taken):
            routed = families.logits(model, given)
    errors = nmse(before, wanted), nmse(free, wanted)
    return Halves(nmse(free, before), nmse(routed, before), *_rerouted(taken, retaken), *errors)


def _rerouted(taken: list[Call], retaken: list[Call]) -> tuple[int, float]:
    moved, before_move = 0, 0.0
    for (hidden, *before), (rehidden, *after) in zip(taken, retaken, strict=True):
        change = _shares(*after) - _shares(*before)
        differ = int((change.abs().amax(1) > 1 / 16).sum())
        if differ and not moved:
            before_move = nmse(rehidden, hidden)
        moved += differ
    return moved, before_move


def _shares(ids: Tensor, weights: Tensor) -> Tensor:
    """What each expert weighs in each token, [T, E], as a share of the token's total."""
    shares = torch.zeros(len(ids), 1 + int(ids.max().clamp(min=63)))
    shares.scatter_add_(1, ids.long(), weights.float().abs())
    return shares / shares.sum(1, keepdim=True)


@contextmanager
def wrapped(model: PreTrainedModel, **settings: Any) -> Iterator[PreTrainedModel]:
    """The model wrapped within the block."""
    yield hybrimoe.wrap(model, **settings)
    hybrimoe.unwrap(model)


@contextmanager
def calls(experts: list[nn.Module], replay: list[Call] | None = None) -> Iterator[list[Call]]:
    """Record the arguments of the experts, call by call, or replay a recorded routing."""
    record: list[Call] = []
    recorded = iter(replay or [])

    def hook(module: nn.Module, args: Call) -> Call | None:
        if replay is not None:
            return (args[0], *next(recorded)[1:])
        record.append(args)
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
