"""How fast: all presets and their rivals on models of real shapes, and how honest the costs are."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import accelerate
import numpy as np
import torch
from accelerate.hooks import remove_hook_from_module

from gpu_models import SHAPES, Passes, build, reshare, synchronize, wrapped
from gpu_sections import Section
from hybrimoe.models.adapters import find_experts
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.presets import PRESETS
from hybrimoe.policy.timeline import Lane, Span
from hybrimoe.simd.threads import launch
from machine import ReadBandwidth

LANES = ("CPU", "GPU", "LINK")


class Sizes(NamedTuple):
    """How much to measure."""

    prefills: tuple[int, ...] = (32, 128, 512, 1024)
    batches: tuple[int, ...] = (1, 8)
    steps: int = 20
    warm: int = 40  # the guard of the default preset has decided by then
    repeats: int = 3
    residencies: tuple[float, ...] = (0.25, 0.5, 0.75)
    copy_bytes: int = 1 << 30
    settle: int = 9  # prompts in which the guard of the default preset compares and decides


TINY = Sizes((8, 20), (1, 2), 3, 2, 1, (0.5,), 1 << 20, 1)
FEW = {"batches": (1,), "prefills": (512,), "steps": 2, "warm": 1, "repeats": 1}
"""For accelerate: a pass copies gigabytes from pageable memory, and few of them say enough."""


class Rates(NamedTuple):
    """Bytes per second of the three memories' paths, each alone."""

    host: float
    link: float
    device: float


def measure_rates(section: Section, device: str, sizes: Sizes) -> Rates:
    """What the bandwidth bound is made of."""
    host = ReadBandwidth(launch.threads(), max(sizes.copy_bytes >> 20, 16))
    for _ in range(5):
        host.sample()
    on_gpu = device == "cuda"
    source = torch.empty(sizes.copy_bytes, dtype=torch.uint8, pin_memory=on_gpu)
    first = torch.empty_like(source, device="cuda" if on_gpu else "cpu")
    second = torch.empty_like(first)
    link = sizes.copy_bytes / _seconds(lambda: first.copy_(source, non_blocking=True))
    memory = 2 * sizes.copy_bytes / _seconds(lambda: second.copy_(first))
    rates = Rates(host.gb_s * 1e9, link, memory)
    section.row(host_gb_s=rates.host / 1e9, link_gb_s=link / 1e9, device_gb_s=memory / 1e9)
    return rates


def _seconds(action: Callable[[], Any], repeats: int = 5) -> float:
    action()
    synchronize()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        synchronize()
        found.append(time.perf_counter() - start)
    return float(np.median(found))


def measure_model(
    section: Section, name: str, device: str, tiny: bool, sizes: Sizes, rates: Rates | None
) -> None:
    """One model: transformers, hybrimoe in bfloat16 and in int4, and accelerate with what is left."""
    model, there = build(name, tiny), "cuda" if device == "cuda" else "cpu"
    layers = {"measured": model.config.num_hidden_layers, "of": SHAPES[name].whole}
    section.content["layers"] = layers
    section.attempt("transformers", _plain, section, model, there, sizes)
    for weights, presets in (("native", ("hybrimoe",)), ("int4", tuple(PRESETS))):
        section.attempt(
            f"hybrimoe {weights}",
            *(_presets, section, model, device, weights, presets, sizes, rates),
        )
    for residency in sorted(sizes.residencies, key=lambda r: abs(r - 0.5)):
        what = f"accelerate at {residency}"
        section.attempt(what, _offloaded, section, model, there, residency, sizes)


def _plain(section: Section, model, there: str, sizes: Sizes) -> None:
    """The ceiling: everything on the GPU, by transformers alone."""
    model.to(there)
    try:
        _measure(section, model, sizes, runner="transformers, all on the GPU", weights="native")
    finally:
        model.to("cpu")


def _offloaded(section: Section, model, there: str, residency: float, sizes: Sizes) -> None:
    """accelerate's CPU offload: the experts of some layers stay, those of others come when called."""
    modules = [found.module for found in find_experts(model)]
    away = modules[round(residency * len(modules)) :]
    try:
        for module in away:
            accelerate.cpu_offload(module, execution_device=torch.device(there))
        for module in model.modules():
            if not hasattr(module, "_hf_hook"):
                _move_own(module, there)
        few = sizes._replace(**FEW) if sizes.steps > FEW["steps"] * 2 else sizes
        _measure(section, model, few, runner="accelerate", weights="native", residency=residency)
    finally:
        for module in away:
            remove_hook_from_module(module, recurse=True)
        model.to("cpu")


def _move_own(module: torch.nn.Module, there: str) -> None:
    """Move a module's own tensors, not its children's."""
    for parameter in module.parameters(recurse=False):
        parameter.data = parameter.data.to(there)
    for name, buffer in module.named_buffers(recurse=False):
        module._buffers[name] = buffer.to(there)


def _presets(
    section: Section, model, device: str, weights: str, presets: tuple[str, ...],
    sizes: Sizes, rates: Rates | None,
) -> None:  # fmt: skip
    with wrapped(model, device=device, vram=0.25, weights=weights):
        if weights == "int4":
            section.attempt("costs", measure_costs, section, model, sizes)
        for preset in presets:
            for residency in sizes.residencies if preset != "cpu" else sizes.residencies[:1]:
                about = {"weights": weights, "preset": preset, "residency": residency}
                what = f"{weights} {preset} {residency}"
                section.attempt(what, _preset, section, model, sizes, rates, about)


def _preset(
    section: Section, model, sizes: Sizes, rates: Rates | None, about: dict[str, Any]
) -> None:
    reshare(model, preset=about["preset"], vram=about["residency"], trace=False)
    if model.hybrimoe.hybrid.guard is not None:
        for length in sizes.prefills:
            Passes(model, seed=1).prefill(length, sizes.settle)
    _measure(section, model, sizes, rates, runner="hybrimoe", **about)


def _measure(
    section: Section, model, sizes: Sizes, rates: Rates | None = None, **about: Any
) -> None:
    """One row: milliseconds of a prompt and of a step, for all sizes."""
    passes, times, notes = Passes(model), {}, {}
    for batch in sizes.batches:
        times[f"decode_{batch}_ms"] = 1e3 * passes.decode(batch, sizes.steps, sizes.warm)
        if rates is not None:
            notes |= _notes(model, batch, sizes.steps, times[f"decode_{batch}_ms"] / 1e3, rates)
    for length in sizes.prefills:
        times[f"prefill_{length}_ms"] = 1e3 * passes.prefill(length, sizes.repeats)
    section.row(**about, **times, **notes)


def _notes(model, batch: int, steps: int, seconds: float, rates: Rates) -> dict[str, Any]:
    """Hits, and the share of the bandwidth bound that decode reached since the last reset."""
    stats = model.hybrimoe.stats()["hybrid"]
    size = model.hybrimoe.pool.layers[0].layout.expert_bytes
    hits, others = stats["hits"] / steps, (stats["misses"] + stats["late"]) / steps
    dense = sum(p.nbytes for p in model.parameters())
    dense -= model.get_input_embeddings().weight.nbytes
    on_device = (dense + hits * size) / rates.device
    # Missing experts are read from host memory, by the CPU or over the link, at best by both.
    bound = max(on_device, others * size / (rates.host + rates.link))
    guard = stats["guard"]
    return {
        f"mode_{batch}": guard["decode"]["chosen"] if guard else "-",
        f"hit_rate_{batch}": stats["hit_rate"],
        f"uploads_{batch}": stats["uploads"] / steps,
        f"bound_share_{batch}": bound / seconds,
    }


def measure_costs(section: Section, model, sizes: Sizes) -> None:
    """Predicted against measured: spans of every lane, and whole layers."""
    reshare(model, preset="hybrimoe", vram=0.5, trace=True)
    hybrid, passes = model.hybrimoe.hybrid, Passes(model)
    for what, run in (
        ("decode", lambda: passes.decode(1, sizes.steps, sizes.warm)),
        ("prefill", lambda: passes.prefill(sizes.prefills[-1], sizes.repeats)),
    ):
        layers = _watch(hybrid)
        model.hybrimoe.reset_stats()
        run()
        synchronize()
        spans = hybrid.spans()["measured"]
        errors = {lane: _errors(hybrid.cost, spans, Lane[lane]) for lane in LANES}
        errors["layer"] = [abs(predicted / measured - 1) for predicted, measured in layers]
        medians = {
            f"{name}_median_error": float(np.median(found)) if found else None
            for name, found in errors.items()
        }
        counts = {f"{name}_spans": len(found) for name, found in errors.items()}
        section.row(runner="costs", phase=what, **medians, **counts)


def _watch(hybrid) -> list[tuple[float, float]]:
    """(predicted, measured) seconds of every layer from now on."""
    found, memory, meter = [], hybrid.memory, hybrid.meter
    run, ended = type(memory).run.__get__(memory), type(meter).ended.__get__(meter)
    predicted = []

    def watched_run(*arguments):
        plan = run(*arguments)
        predicted.append(plan.makespan)
        return plan

    def watched_ended(layer, seconds, *rest):
        found.append((predicted.pop(), seconds))
        ended(layer, seconds, *rest)

    memory.run, meter.ended = watched_run, watched_ended
    return found


def _errors(cost: CostModel, spans: list[Span], lane: Lane) -> list[float]:
    """Relative errors of the cost model for the spans of one lane."""
    mine = [span for span in spans if span.lane is lane and span.seconds > 0]
    return [abs(_predict(cost, span) / span.seconds - 1) for span in mine]


def _predict(cost: CostModel, span: Span) -> float:
    if span.lane is Lane.LINK:
        return cost.link(span.bytes)
    each = span.tokens / max(span.experts, 1e-9)
    if span.lane is Lane.CPU:
        return cost.cpu_first + span.experts * cost.cpu(each, first=False)
    return span.experts * cost.gpu(each)
