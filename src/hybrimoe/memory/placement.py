"""What of a model lies where, whether that fits, and the nearest setting that would."""

from __future__ import annotations

from dataclasses import dataclass, replace

from hybrimoe.limits import HostMemory
from hybrimoe.models.bytes import Footprint
from hybrimoe.runtime.slot_budget import SPARE, Experts, reserve, slot_count
from hybrimoe.sizes import size_text
from hybrimoe.sources.load_memory import largest_budget

SHORTEST = 256
"""Tokens of context below which a model that "fits" is of no use."""


@dataclass(frozen=True)
class Budget:
    """What may be used; bytes. vram: for expert slots, as in `Config`. gpu_free: None without a GPU.

    held: bytes of the host's need that this process has already. wraps: the model is loaded whole
    and then wrapped, instead of packed while it loads.
    """

    vram: int | float | str | None
    host: HostMemory
    gpu_free: int | None
    held: int = 0
    wraps: bool = False

    @property
    def room(self) -> int:
        """Host memory for the whole model."""
        return self.host.free + self.held


@dataclass(frozen=True)
class Placement:
    """One weight format on one machine; bytes by part.

    load_peak: host memory while the model loads. slots: experts on the GPU.
    """

    weights: str
    slots: int
    parts: dict[str, int]
    gpu: dict[str, int]
    load_peak: int
    host_fits: bool
    gpu_fits: bool

    @property
    def ram(self) -> dict[str, int]:
        """What stays in host memory; experts on the GPU are copies."""
        return {part: size for part, size in self.parts.items() if part not in self.gpu}

    @property
    def steady(self) -> int:
        """Host memory while it runs."""
        return sum(self.ram.values())

    @property
    def peak(self) -> int:
        """The most host memory it takes."""
        return max(self.load_peak, self.steady)

    @property
    def fits(self) -> bool:
        return self.host_fits and self.gpu_fits


def place(footprint: Footprint, weights: str, budget: Budget) -> Placement:
    """Put every part of a model where it goes."""
    slots, gpu = _on_gpu(footprint, weights, budget)
    loaded = footprint.wrapped_bytes if budget.wraps else footprint.streamed_bytes
    parts = {
        "dense": footprint.dense_bytes,
        "experts": footprint.packed_bytes(weights),
        "kv_cache": footprint.forward.cache_bytes,
        "activations": footprint.activation_bytes,
        "workspace": footprint.workspace_bytes(weights) + footprint.left_bytes(),
    }
    gpu_fits = budget.gpu_free is None or sum(gpu.values()) <= budget.gpu_free
    if gpu and slots < len(footprint.layers):
        gpu_fits = False  # `wrap` wants a slot per layer
    placed = Placement(weights, slots, parts, gpu, loaded(weights), False, gpu_fits)
    return replace(placed, host_fits=placed.peak <= budget.room)


def choose(placements: dict[str, Placement], weights: str | None) -> Placement:
    """The format asked for, or the most precise one that fits, or the smallest."""
    if weights is not None:
        return placements[weights]
    fitting = [placement for placement in placements.values() if placement.fits]
    return fitting[0] if fitting else [*placements.values()][-1]


def nearest(
    footprint: Footprint, placements: dict[str, Placement], chosen: Placement, budget: Budget
) -> tuple[str, dict[str, object] | None]:
    """The nearest setting that works, as a sentence and as keywords; None where nothing does."""
    context = footprint.context
    if chosen.fits:
        return "it fits", keywords(footprint, chosen.weights, budget, context)
    if chosen.host_fits:
        return _less_gpu(footprint, chosen, budget)
    for other in placements.values():
        if other.fits:
            text = f"weights={other.weights!r} fits, it needs {size_text(other.peak)}"
            return text, keywords(footprint, other.weights, budget, context)
    smallest = min(placements.values(), key=lambda placement: placement.peak)
    shorter = _shorter(footprint, smallest, budget)
    name = "" if footprint.is_prescribed else f"weights={smallest.weights!r} with "
    if shorter:
        text = f"{name}context={shorter} fits"
        return text, keywords(footprint, smallest.weights, budget, shorter)
    ram = _on_disk(footprint, smallest, budget)
    if ram is not None:
        given = keywords(footprint, smallest.weights, budget, context) | {"ram": ram}
        return f"{name}ram={ram!r} fits, with the other experts on disk", given
    smallest_is = "" if footprint.is_prescribed else f", weights={smallest.weights!r},"
    missing = size_text(smallest.peak - budget.room)
    return (
        f"no format fits: the smallest{smallest_is} needs {size_text(smallest.peak)}, so {missing} "
        "of memory are missing",
        None,
    )


def keywords(footprint: Footprint, weights: str, budget: Budget, context: int) -> dict[str, object]:
    """Arguments of `wrap` or `from_pretrained` for a plan."""
    given: dict[str, object] = {} if footprint.is_prescribed else {"weights": weights}
    if budget.vram is not None:
        given["vram"] = budget.vram
    if budget.vram is not None or budget.gpu_free is not None:
        given["max_new_tokens"] = context
    return given


def _on_gpu(footprint: Footprint, weights: str, budget: Budget) -> tuple[int, dict[str, int]]:
    """Expert slots, and what lies on the GPU; nothing where there is none."""
    if budget.vram is None and budget.gpu_free is None:
        return 0, {}
    size, forward = footprint.expert_bytes(weights), footprint.forward
    gpu = {
        "dense": footprint.dense_bytes,
        "kv_cache": forward.cache_bytes,
        "activations": footprint.activation_bytes,
    }
    experts = Experts(footprint.experts, len(footprint.layers), size)
    left = max((budget.gpu_free or 0) - footprint.dense_bytes, 0)
    kept = reserve(left, forward.cache_bytes)
    slots = slot_count(budget.vram, experts, left, kept)
    return slots, gpu | {"slots": (slots + SPARE) * size}


def _less_gpu(
    footprint: Footprint, chosen: Placement, budget: Budget
) -> tuple[str, dict[str, object] | None]:
    """The largest number of slots that fits, or no GPU at all."""
    context = footprint.context
    automatic = place(footprint, chosen.weights, replace(budget, vram=None))
    if automatic.fits and automatic.gpu:
        size = automatic.slots * footprint.expert_bytes(chosen.weights)
        smaller = replace(budget, vram=size)
        given = keywords(footprint, chosen.weights, smaller, context)
        return f"vram={size} fits: {automatic.slots} slots", given
    cpu = replace(budget, vram=None, gpu_free=None)
    if place(footprint, chosen.weights, cpu).fits:
        given = keywords(footprint, chosen.weights, cpu, context) | {"device": "cpu"}
        return "device='cpu' fits: every expert on the CPU", given
    return "neither the GPU nor the CPU alone can hold it", None


def _on_disk(footprint: Footprint, smallest: Placement, budget: Budget) -> str | None:
    """The largest `ram` of a `Config` with which the others stay on disk; None where none fits."""
    if budget.wraps or not smallest.gpu_fits:
        return None  # `wrap` needs the whole model in memory first
    running = smallest.steady - smallest.parts["experts"]
    return largest_budget(footprint, smallest.weights, budget.room, running)


def _shorter(footprint: Footprint, smallest: Placement, budget: Budget) -> int:
    """The longest context that fits, halved until it does; 0 where none does."""
    context, forward = footprint.context, footprint.forward
    while context > SHORTEST:
        context //= 2
        share = context / footprint.context
        sizes = forward._replace(
            cache_bytes=round(forward.cache_bytes * share),
            activation_bytes=round(forward.activation_bytes * share),
        )
        less = replace(footprint, context=context, forward=sizes)
        if place(less, smallest.weights, budget).fits:
            return context
    return 0
