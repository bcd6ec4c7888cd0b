"""A policy of the user's that raises or returns nonsense never changes a token."""

import contextlib
import dataclasses
import math
import random
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

import hybrimoe
from hybrimoe.errors import PolicyError
from hybrimoe.policy.plan import Plan
from hybrimoe.policy.prefetchers import Impact, Prefetcher
from hybrimoe.policy.rankings import MRS, Ranking
from hybrimoe.policy.schedulers import Scheduler, Split

TINY = Path(__file__).parent / "assets" / "tiny-moe"


@pytest.fixture(scope="module")
def inputs():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    return tokenizer(["def main(", "In the beginning"], return_tensors="pt", padding=True)


@pytest.fixture(scope="module")
def plain():
    return AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32).eval()


@pytest.fixture
def model(plain):
    yield plain
    hybrimoe.unwrap(plain)


@pytest.fixture(scope="module")
def expected(plain, inputs):
    return generate(plain, inputs)


@torch.no_grad()
def generate(model, inputs, tokens=5):
    return model.generate(**inputs, max_new_tokens=tokens, do_sample=False)


class Chaos:
    """Decides call by call, by a seed, whether to be right, to raise, or to make something up."""

    def __init__(self, seed: int, rate: float) -> None:
        self.random, self.rate = random.Random(seed), rate
        self.faults = 0

    def on(self, right, wrong):
        """The right answer, or one of those in `wrong`, which are thunks."""
        if self.random.random() >= self.rate:
            return right
        self.faults += 1
        return self.random.choice([*wrong, *RAISING])()


def raising(error):
    def act():
        raise error

    return act


RAISING = [
    raising(e) for e in (ValueError("no"), KeyError(3), MemoryError(), StopIteration(), Exception())
]
ANYTHING = [lambda: None, lambda: 7, lambda: "plan", lambda: [], lambda: np.zeros((3, 3), object)]


class ChaoticScheduler(Scheduler):
    def __init__(self, chaos: Chaos) -> None:
        self.chaos = chaos

    def plan(self, load, ready, timeline, cost):
        good = Split().plan(load, ready, timeline, cost)
        rng = np.random.default_rng(self.chaos.random.randrange(1 << 30))
        field = self.chaos.random.choice(["gpu", "cpu", "copies", "shards"])
        noise = rng.integers(-3, 40, rng.integers(0, 9)).astype(rng.choice([np.int32, np.int64]))
        wrong = [
            lambda: good._replace(**{field: noise}),
            lambda: good._replace(**{field: getattr(good, field).astype(float)}),
            lambda: good._replace(**{field: np.repeat(getattr(good, field), 2)}),
            lambda: good._replace(**{field: None}),
            lambda: good._replace(
                makespan=self.chaos.random.choice([math.nan, -1.0, math.inf, ""])
            ),
            lambda: Plan(noise, noise, noise, noise, 0.0),
        ]
        load.experts[:], ready[:], timeline.free[:] = 0, 0, 0  # its arguments are its own
        return self.chaos.on(good, [*wrong, *ANYTHING])

    def gains(self, load, ready, timeline, cost, arrival=0.0):
        right = np.ones(ready.size)
        wrong = [lambda: right * math.nan, lambda: -right, lambda: right[:-1], lambda: right > 0]
        return self.chaos.on(right, [*wrong, *ANYTHING])


@dataclasses.dataclass(frozen=True)
class ChaoticRanking(Ranking):
    chaos: Chaos = dataclasses.field(kw_only=False, default=None)

    def observe(self, books, load):
        books.score = self.chaos.on(books.score + 1, [lambda: books.score[:1], *ANYTHING])
        books.rate = None

    def worth(self, books):
        score = books.score.copy()
        wrong = [lambda: score * math.nan, lambda: score[1:], lambda: score.astype(np.float32)]
        return self.chaos.on(score, [*wrong, *ANYTHING])


@dataclasses.dataclass(frozen=True)
class ChaoticPrefetcher(Prefetcher):
    chaos: Chaos = dataclasses.field(kw_only=False, default=None)

    def wanted(self, forecasts, cache, scheduler, timeline, cost):
        right = Impact(gated=False).wanted(forecasts, cache, scheduler, timeline, cost)
        layer = forecasts[0].layer
        wrong = [
            lambda: [(layer, 99)],
            lambda: [(layer, -1)],
            lambda: [(layer - 1, 0)],
            lambda: [(layer, 0), (layer, 0)],
            lambda: [(layer, 0.5)],
            lambda: [layer],
        ]
        cache.slot[:] = 0
        return self.chaos.on(right, [*wrong, *ANYTHING[:3]])


MAKERS = {
    "scheduler": ChaoticScheduler,
    "cache": lambda chaos: ChaoticRanking(
        scope="model", backfill=True, admission=chaos.random.random() < 0.5, chaos=chaos
    ),
    "prefetcher": lambda chaos: ChaoticPrefetcher(depth=1 + chaos.random.randrange(3), chaos=chaos),
}


@given(
    seed=st.integers(0, 1 << 20),
    kinds=st.sets(st.sampled_from(sorted(MAKERS)), min_size=1),
    rate=st.sampled_from([0.01, 0.1, 1.0]),
    strict=st.booleans(),
)
@settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_random_plug_ins_end_in_the_plain_models_tokens_or_in_a_named_error(
    model, inputs, expected, seed, kinds, rate, strict
):
    chaos = {kind: Chaos(seed + i, rate) for i, kind in enumerate(sorted(kinds))}
    given_policies = {kind: MAKERS[kind](chaos[kind]) for kind in chaos}
    hybrimoe.unwrap(model)
    settings = {"device": "emulated", "vram": 0.25, "strict": strict} | given_policies
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if strict and any(c.rate == 1.0 for c in chaos.values()):
            with pytest.raises(PolicyError, match=r"^Chaotic.* broke its contract"):
                generate(hybrimoe.wrap(model, **settings), inputs)
            return
        with contextlib.suppress(PolicyError) if strict else contextlib.nullcontext():
            tokens = generate(hybrimoe.wrap(model, **settings), inputs)
    if strict and sum(c.faults for c in chaos.values()):
        return
    assert torch.equal(tokens, expected)
    replaced = model.hybrimoe.stats()["hybrid"]["replaced"]
    assert len([w for w in caught if "takes its place" in str(w.message)]) == len(replaced)
    assert len(replaced) == sum(c.faults > 0 for c in chaos.values())
    assert not (strict and replaced)
    assert all(what in str(model.hybrimoe.report()) for what in replaced.values())


class Interrupts(Split):
    """Is interrupted by the user in its twentieth plan."""

    calls = 0

    def plan(self, load, ready, timeline, cost):
        Interrupts.calls += 1
        if Interrupts.calls == 20:
            raise KeyboardInterrupt
        return super().plan(load, ready, timeline, cost)


def test_an_interruption_is_the_users_and_the_next_call_is_right(model, inputs, expected):
    Interrupts.calls = 0
    hybrimoe.wrap(model, device="emulated", vram=0.25, scheduler=Interrupts())
    with pytest.raises(KeyboardInterrupt):
        generate(model, inputs)
    assert torch.equal(generate(model, inputs), expected)
    assert model.hybrimoe.stats()["hybrid"]["replaced"] == {}


def test_a_good_policy_of_ones_own_is_never_replaced(model, inputs, expected):
    class Mine(Split):
        pass

    class Worth(MRS):
        pass

    hybrimoe.wrap(
        model,
        device="emulated",
        vram=0.25,
        scheduler=Mine(),
        cache=Worth(scope="model", backfill=True, admission=True),
        prefetcher=type("Ahead", (Impact,), {})(),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        assert torch.equal(generate(model, inputs), expected)
    assert model.hybrimoe.stats()["hybrid"]["replaced"] == {}
