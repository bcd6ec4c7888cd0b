"""The comparison with the pure modes: what is tried, when, and who wins."""

import time

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hybrimoe
from hybrimoe import session
from hybrimoe.policy.cache import Cache
from hybrimoe.policy.contest import CHOSEN, Guard, ModeTrial, kind_of
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.engine import Engine
from hybrimoe.policy.prediction import SimExecutor
from hybrimoe.policy.presets import preset
from hybrimoe.policy.profiles import profile, shape
from hybrimoe.policy.routing import Load
from hybrimoe.runtime.devices.emulated import EmulatedAccelerator
from paths import TINY_MOE

LAYERS, EXPERTS, TOP_K = 3, 8, 2
QUICK = ModeTrial(warm_up=2, rounds=3, period=20)


def cost() -> CostModel:
    return profile("desktop").cost(shape("mixtral-8x7b"))


def guard_of(trial: ModeTrial = QUICK) -> Guard:
    policies = preset("hybrimoe")
    cache = Cache(policies.ranking, 6, LAYERS, EXPERTS, TOP_K)
    cache.fill()
    engine = Engine(policies, cache, cost(), SimExecutor(cost()))
    return Guard(engine, decode=trial, prefill=trial)


def load(layer: int) -> Load:
    experts = np.arange(4, 4 + TOP_K, dtype=np.int32)
    return Load(layer, experts, np.ones(TOP_K, np.int32), np.zeros(EXPERTS, np.float32))


def passes(guard: Guard, seconds: dict[str, float], count: int, tokens: int = 1) -> list[str]:
    """The modes of so many forward passes, each of which takes its mode's seconds."""
    modes, now = [], 0.0
    for _ in range(count):
        guard.begin(now, tokens, is_decode=tokens == 1)
        mode = next(n for n, p in guard.modes.items() if p is guard.engine.policies)
        for layer in range(LAYERS):
            guard.plan(load(layer), guard.engine.cost)
        modes.append(mode)
        now += seconds[mode] * tokens
        guard.end(now)
    return modes


ALIKE = {"resident": 1.0, "accelerator": 1.0, "cpu": 1.0}


def test_pure_modes_run_only_after_the_warm_up_and_take_turns():
    guard = guard_of(ModeTrial(warm_up=2, rounds=3, drop_above=1e9, skip_above=1e9))
    modes = passes(guard, {CHOSEN: 1.0, **ALIKE}, 2 + 4 * 3)
    assert modes[:2] == [CHOSEN] * 2
    assert modes[2:] == [CHOSEN, "resident", "accelerator", "cpu"] * 3


def test_a_tie_goes_to_the_hybrid():
    guard = guard_of()
    assert passes(guard, {CHOSEN: 1.0, **ALIKE}, 19)[-1] == CHOSEN


def test_a_pure_mode_wins_by_more_than_the_margin():
    guard = guard_of(ModeTrial(warm_up=2, rounds=3, drop_above=1e9, skip_above=1e9))
    assert passes(guard, {CHOSEN: 1.0, **ALIKE, "cpu": 0.98}, 20)[-1] == CHOSEN
    guard = guard_of(ModeTrial(warm_up=2, rounds=3, drop_above=1e9, skip_above=1e9))
    assert passes(guard, {CHOSEN: 1.0, **ALIKE, "cpu": 0.9}, 20)[-1] == "cpu"
    found = guard.to_dict()["decode"]
    assert found["chosen"] == "cpu"
    assert found["compared_ms"]["cpu"] == pytest.approx(900)


def test_one_slow_pass_does_not_decide():
    guard, seconds = guard_of(), {CHOSEN: 1.0, **ALIKE}
    passes(guard, seconds, 2)
    passes(guard, seconds | {CHOSEN: 50.0}, 1)
    assert passes(guard, seconds, 17)[-1] == CHOSEN


def test_what_the_cost_model_rules_out_is_not_tried():
    guard = guard_of(ModeTrial(warm_up=2, rounds=3, skip_above=1.5))
    modes = passes(guard, {CHOSEN: 1.0, **ALIKE}, 20)
    assert "accelerator" not in modes  # every expert over the link, token after token
    assert "cpu" in modes


def test_what_is_far_behind_after_one_round_drops_out():
    guard = guard_of(ModeTrial(warm_up=2, rounds=3, skip_above=1e9))
    modes = passes(guard, {CHOSEN: 1.0, **ALIKE, "cpu": 2.0}, 20)
    assert modes.count("cpu") == 1
    assert modes.count("resident") == 3


def test_the_question_is_asked_again_and_the_answer_may_change():
    guard = guard_of(ModeTrial(warm_up=2, rounds=3, drop_above=1e9, skip_above=1e9, period=5))
    assert passes(guard, {CHOSEN: 1.0, **ALIKE, "cpu": 0.5}, 15)[-1] == "cpu"
    assert passes(guard, {CHOSEN: 1.0, **ALIKE, "cpu": 2.0}, 20)[-1] == CHOSEN


def test_decode_and_prefill_are_judged_apart():
    guard = guard_of(ModeTrial(warm_up=2, rounds=3, drop_above=1e9, skip_above=1e9))
    passes(guard, {CHOSEN: 1.0, **ALIKE, "cpu": 0.5}, 16)
    assert passes(guard, {CHOSEN: 1.0, **ALIKE}, 1, tokens=500) == [CHOSEN]
    assert guard.to_dict()[kind_of(500, False)]["chosen"] == CHOSEN


def test_short_and_long_prompts_are_judged_apart():
    """A token of a long prompt takes a fraction of the time: compared, the mode it ran in would win."""
    guard = guard_of(ModeTrial(warm_up=2, rounds=2, drop_above=1e9, skip_above=1e9))
    seconds = {CHOSEN: 1.0, **dict.fromkeys(ALIKE, 1.5)}
    for _ in range(12):  # in turn, so that every second mode would be seen on long prompts only
        passes(guard, seconds, 1, tokens=30)
        passes(guard, {mode: 0.01 * s for mode, s in seconds.items()}, 1, tokens=3000)
    found = guard.to_dict()
    kinds = [kind_of(30, False), kind_of(3000, False)]
    assert [found[kind]["chosen"] for kind in kinds] == [CHOSEN, CHOSEN]
    assert all(len(found[kind]["compared_ms"]) == 4 for kind in kinds)


def test_every_number_of_tokens_is_of_one_kind():
    sizes = (1, 16, 17, 64, 65, 256, 257, 1024, 1025, 10**6)
    names = [kind_of(tokens, is_decode) for is_decode in (True, False) for tokens in sizes]
    assert [names.index(name) // 2 for name in names] == [n // 2 for n in range(20)]


def test_a_large_batch_of_decode_is_no_prompt():
    guard = guard_of(ModeTrial(warm_up=2, rounds=3, drop_above=1e9, skip_above=1e9))
    for now in range(20):
        guard.begin(float(now), 32, is_decode=True)
        guard.end(now + 0.5)
    assert len(guard.to_dict()["decode of 17 to 64 tokens"]["compared_ms"]) == 4
    assert kind_of(32, False) not in guard.to_dict()


def test_a_pass_without_an_end_does_not_count():
    guard = guard_of(ModeTrial(warm_up=2, rounds=3, drop_above=1e9, skip_above=1e9))
    for _ in range(50):
        guard.begin(0.0, 1, is_decode=True)
    assert not guard.to_dict()["decode"]["compared_ms"]


class Slow(EmulatedAccelerator):
    """An accelerator whose clock counts, and that is slower than any CPU."""

    measured = True

    def wait(self, event):
        time.sleep(0.02)
        super().wait(event)


def test_a_model_on_a_slow_accelerator_ends_up_on_the_cpu_with_the_same_tokens(monkeypatch):
    monkeypatch.setattr(session, "cost_of", lambda *_: cost_of_tiny())
    monkeypatch.setattr(session, "open_accelerator", lambda config: Slow(1 << 40))
    tokenizer = AutoTokenizer.from_pretrained(TINY_MOE)
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()
    inputs = tokenizer("def main(", return_tensors="pt")
    settings = {"max_new_tokens": 60, "do_sample": False}
    expected = model.generate(**inputs, **settings)

    hybrimoe.wrap(model, device="emulated", vram=0.25)
    tokens = model.generate(**inputs, **settings)

    assert torch.equal(tokens, expected)
    assert model.hybrimoe.stats()["hybrid"]["guard"]["decode"]["chosen"] == "cpu"
    assert "chosen: cpu" in str(model.hybrimoe.report())


@pytest.mark.parametrize("settings", [{"preset": "ondemand"}, {"deterministic": True}])
def test_what_the_user_chose_is_not_questioned(monkeypatch, settings):
    monkeypatch.setattr(session, "cost_of", lambda *_: cost_of_tiny())
    monkeypatch.setattr(session, "open_accelerator", lambda config: Slow(1 << 40))
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()
    hybrimoe.wrap(model, device="emulated", vram=0.25, **settings)
    assert model.hybrimoe.hybrid.guard is None


def cost_of_tiny() -> CostModel:
    numbers = cost().to_dict() | {"expert_bytes": 147456, "gpu_read": 1e-4, "cpu_expert": 1e-4}
    return CostModel.from_dict(numbers | {"cpu_expert_contended": 1e-4, "shards": 2})
