"""What must hold on a GPU before any of its times mean something."""

import contextlib
import gc
import itertools
import random

import numpy as np
import torch

import hybrimoe
from gpu_models import build, reshare, wrapped
from gpu_sections import Section
from hybrimoe import session
from hybrimoe.kernels.gpu import torch_experts
from hybrimoe.kernels.gpu.pairs import Slots, pairs_of
from hybrimoe.policy.presets import PRESETS
from hybrimoe.runtime.devices.cuda import TorchAccelerator
from hybrimoe.runtime.devices.emulated import EmulatedAccelerator
from machine import random_layer

E, K, D, F = 32, 4, 128, 96  # as in the tiny models: the same kernels are compiled once
TOKENS = (1, 8, 40, 300, 1024)  # pairs, pairs, tiles of 16, of 32 and of 64
CASES = [  # format, dtype of activations, biases
    ("int4", "bfloat16", False), ("int4", "float32", False), ("int8", "bfloat16", False),
    ("bfloat16", "bfloat16", False), ("float16", "float16", True), ("float32", "float32", True),
    ("int4", "float16", True), ("int8", "float32", False), ("bfloat16", "float32", False),
]  # fmt: skip
BOUNDS = {"float32": 1e-10, "float16": 1e-5, "bfloat16": 1e-4}
"""NMSE that arithmetic in a dtype may cost on a GPU."""
EMULATED_BOUND = 2e-4
"""The emulated accelerator rounds activations to int8, as the CPU does."""
RESIDENCIES = ("floor", 0.25, 0.5, 1.0)


def check_kernels(section: Section, device: str, counts: tuple[int, ...] = TOKENS) -> None:
    """Every format, every dtype, every number of tokens, with some experts divided: NMSE."""
    accelerator = TorchAccelerator() if device == "cuda" else EmulatedAccelerator()
    for case, tokens in itertools.product(CASES, counts):
        section.attempt(
            f"{case} {tokens} tokens", _check_kernel, section, accelerator, device, case, tokens
        )
    accelerator.allocate(0, 0)


def _check_kernel(section: Section, accelerator, device: str, case, tokens: int) -> None:
    fmt, dtype, bias = case
    found = kernel_error(accelerator, device, fmt, dtype, bias, tokens)
    bound = BOUNDS[dtype] if device == "cuda" else EMULATED_BOUND
    name = f"{fmt} with {dtype}, {tokens} tokens{', biases' if bias else ''}"
    section.check(name, found <= bound, nmse=found, bound=bound)


def kernel_error(accelerator, device: str, fmt: str, dtype: str, bias: bool, tokens: int) -> float:
    """NMSE of one launch against torch's float32 on the same stored weights."""
    layer = random_layer(fmt, E, D, F, bias)
    layout, rng = layer.layout, np.random.default_rng(tokens)
    accelerator.allocate(E, layout.expert_bytes)
    copies = [accelerator.copy(layer.blobs[e], e, 0, ()) for e in range(E)]
    x = torch.from_numpy(rng.standard_normal((tokens, D), np.float32)).to(getattr(torch, dtype))
    slots = np.argsort(rng.random((tokens, E)), 1)[:, :K].astype(np.int64)
    slots[rng.random(slots.shape) < 0.1] = E  # the CPU's
    weights = rng.random(slots.shape, np.float32)
    shards = np.zeros((E + 1, 2), np.int32)
    shards[:E, 1] = rng.integers(1, layout.shards + 1, E)
    there = x.to("cuda" if device == "cuda" else "cpu")
    out = torch.full((tokens, D), torch.nan, device=there.device)
    accelerator.wait(accelerator.experts(layer, there, slots, weights, shards, out, copies))
    wanted = torch.zeros(tokens, D)
    packed = Slots(fmt, layout, layer.gate, torch.from_numpy(layer.blobs))
    torch_experts.run(packed, pairs_of(slots, weights, shards), x.float(), wanted, torch.from_numpy)
    return nmse(out.cpu(), wanted)


def nmse(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Squared error relative to the wanted squares; NaN if anything is."""
    wanted = wanted.double()
    return float((found.double() - wanted).square().sum() / wanted.square().sum())


@torch.no_grad()
def outputs(model, steps: int = 6):
    """Logits of a prompt, and greedy tokens of four sequences, on the CPU."""
    ids = torch.arange(3, 43).reshape(4, 10) * 7 % 500
    ids = ids.to(model.get_input_embeddings().weight.device)
    mask = torch.ones_like(ids)
    logits = model(ids, attention_mask=mask).logits
    tokens = model.generate(
        ids, attention_mask=mask, max_new_tokens=steps, do_sample=False, pad_token_id=0
    )
    return logits.cpu(), tokens.cpu()


def check_models(section: Section, device: str, residencies=RESIDENCIES) -> None:
    """Every preset at every residency against the plain model; packed formats against the CPU."""
    for weights in ("int8", "int4"):
        section.attempt(weights, _check_packed, section, device, weights)
    for name in ("qwen3-30b-a3b", "deepseek-v2-lite"):
        model = build(name, tiny=True, dtype=torch.float32)
        wanted = outputs(model)
        with wrapped(model, device=device, vram=1.0):
            for preset, residency in itertools.product(PRESETS, residencies):
                section.attempt(
                    f"{name} {preset} {residency}",
                    *(_check_preset, section, model, name, preset, residency, wanted),
                )


def _check_preset(section: Section, model, name: str, preset: str, residency, wanted) -> None:
    experts = len(model.hybrimoe.layers[0].packed.blobs)
    vram = 1 / experts if residency == "floor" else residency  # one slot per layer
    reshare(model, preset=preset, vram=vram)
    logits, tokens = outputs(model)
    close = torch.allclose(logits, wanted[0], rtol=1e-3, atol=1e-3)
    same = torch.equal(tokens, wanted[1])
    what = f"{name} {preset} at {residency}"
    section.check(what, close and same, nmse=nmse(logits, wanted[0]), same_tokens=same)


def _check_packed(section: Section, device: str, weights: str) -> None:
    found = []
    for settings in ({"device": "cpu"}, {"device": device, "vram": 0.5}):
        model = build("qwen3-30b-a3b", tiny=True, dtype=torch.float32)
        hybrimoe.wrap(model, weights=weights, **settings)
        found.append(outputs(model)[0])
    error = nmse(found[1], found[0])
    section.check(f"{weights} as on the CPU", error <= 1e-3, nmse=error)


@contextlib.contextmanager
def racing(device: str, seed: int, wait: bool = True):
    """Within the block, `wrap` opens an accelerator whose streams run early or late by a seed.

    wait: False forgets what copies and launches must wait for.
    """
    accelerator = EmulatedAccelerator(seed=seed) if device != "cuda" else TorchAccelerator()
    draw, opened = random.Random(seed), session.open_accelerator
    for name in ("copy", "experts"):
        setattr(accelerator, name, _delayed(accelerator, name, device, draw, wait))
    session.open_accelerator = lambda config: accelerator
    try:
        yield accelerator
    finally:
        session.open_accelerator = opened


def _delayed(accelerator, name: str, device: str, draw: random.Random, wait: bool):
    original = getattr(accelerator, name)

    def call(*arguments):
        if device == "cuda":
            stream = accelerator.copies if name == "copy" else torch.cuda.current_stream()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(draw.choice((0, 0, 20_000, 200_000, 1_000_000)))
        return original(*(arguments if wait else (*arguments[:-1], ())))

    return call


def check_races(section: Section, device: str, seeds: int) -> None:
    """Delays on either stream change no bit; and they would, if a wait were missing."""
    model = build("qwen3-30b-a3b", tiny=True, dtype=torch.float32)
    first: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for preset, seed in itertools.product(("ondemand", "hybrimoe"), range(seeds)):
        section.attempt(
            f"{preset} seed {seed}", _check_race, section, model, device, preset, seed, first
        )
    section.attempt("control", _check_control, section, model, device, first)


def _check_race(section: Section, model, device: str, preset: str, seed: int, first) -> None:
    found = _race(model, device, preset, seed)
    wanted = first.setdefault(preset, found)
    same = all(torch.equal(a, b) for a, b in zip(found, wanted))
    section.check(f"{preset} seed {seed}", same)


def _check_control(section: Section, model, device: str, first) -> None:
    logits = [_race(model, device, "ondemand", seed, wait=False)[0] for seed in range(4)]
    wrong = sum(not torch.equal(found, first["ondemand"][0]) for found in logits)
    section.check("without its waits the same run goes wrong", wrong > 0, wrong=wrong)


def _race(model, device: str, preset: str, seed: int, wait: bool = True):
    settings = {"device": device, "vram": 0.25, "preset": preset, "deterministic": True}
    with racing(device, seed, wait), wrapped(model, **settings):
        return outputs(model)


def check_leaks(section: Section, device: str, cycles: int) -> None:
    """Wrapping, generating and unwrapping gives all device memory back, every time."""
    model, grown = build("qwen3-30b-a3b", tiny=True, dtype=torch.float32), []
    wanted, base = outputs(model), None
    for cycle in range(cycles):
        if section.out_of_time(f"cycle {cycle} and later"):
            break
        with wrapped(model, device=device, vram=0.5):
            outputs(model, steps=2)
        gc.collect()
        used = torch.cuda.memory_allocated() if device == "cuda" else 0
        base = used if base is None else base  # the first cycle loads libraries that stay
        grown.append(used - base)
    section.row(cycles=len(grown), device_bytes_grown=max(grown[-5:]))
    section.check("no device memory is left behind", max(grown[-5:]) <= 0, grown=grown[-5:])
    logits, tokens = outputs(model)
    section.check(
        "the model is as before", torch.equal(logits, wanted[0]) and torch.equal(tokens, wanted[1])
    )
