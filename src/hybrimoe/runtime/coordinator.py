"""One engine per model: routing in, expert outputs out, policies in between."""

from __future__ import annotations

import contextlib
import math
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from torch import Tensor

from hybrimoe.attempts import Attempts
from hybrimoe.config import Config
from hybrimoe.errors import ConfigError, DeviceLostError, WrappedModelError
from hybrimoe.kernels.cpu.run_layer import PackedLayer
from hybrimoe.models.passes import DECODE_TOKENS, Pass
from hybrimoe.models.routers import RouterProbe
from hybrimoe.policy.cache import Cache
from hybrimoe.policy.contest import Guard
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.engine import Engine
from hybrimoe.policy.forecasts import Markov
from hybrimoe.policy.presets import preset
from hybrimoe.policy.routing import Forecast, Load
from hybrimoe.policy.timeline import Lane, Span, Timeline
from hybrimoe.runtime.devices.base import Accelerator
from hybrimoe.runtime.devices.pinning import Pinned
from hybrimoe.runtime.executor import TorchExecutor
from hybrimoe.runtime.inputs import LayerInputs
from hybrimoe.runtime.meter import Step
from hybrimoe.runtime.pool import ExpertPool
from hybrimoe.runtime.slot_budget import Experts, reserve, slot_count
from hybrimoe.runtime.slot_memory import SlotMemory

ENDING = (Lane.CPU, Lane.GPU, Lane.LINK)
REFINE_AFTER = 500  # measured spans, that is a few tokens' worth


@dataclass
class LayerCounts:
    """What the policies did in one layer since the last reset."""

    hits: int = 0
    misses: int = 0
    late: int = 0
    gpu_experts: int = 0
    cpu_experts: int = 0


class Hybrid:
    """Takes each layer's routing through the engine; layers must come in the model's order."""

    def __init__(
        self,
        pool: ExpertPool,
        config: Config,
        accelerator: Accelerator,
        cost: CostModel,
        top_k: int,
        threads: int | None = None,
        kv: int = 0,
    ) -> None:
        self.pool, self.accelerator, self.is_closed = pool, accelerator, False
        self.probes: list[RouterProbe] = []  # whose routers to read, one per layer
        self.lock = threading.Lock()  # the engine's books are shared by all callers
        self.policies = policies = config.policies()
        layers = [layer for layer in pool.layers if layer]
        sizes = np.array([layer.experts for layer in layers])
        top_k = min(top_k, int(sizes.max()))
        self.cost = cost
        free = accelerator.free_bytes()
        kept = reserve(free or 0, kv)
        slots = slot_count(config.vram, counted(layers), free, kept)
        self.cache = Cache(policies.ranking, slots, len(layers), sizes, top_k)
        self.executor = TorchExecutor(
            pool, self.cache, self.cost, accelerator, threads, config.trace
        )
        self.meter = self.executor.meter
        markov = Markov(len(layers), sizes, top_k, depth=max(policies.prefetcher.depth, 1))
        self.engine = Engine(
            *(policies, self.cache, self.cost, self.executor),
            timeline=Timeline(trace=config.trace),
            forecaster=markov,
            fallback=None if config.strict else preset("hybrimoe"),
        )
        # Real time decides nothing where it means nothing, or where placement must repeat itself.
        self.timed = accelerator.measured and not config.deterministic
        self.guard = Guard(self.engine) if self.timed and config.leaves_policies_open else None
        self.memory = SlotMemory(self.engine, self.executor, accelerator, len(layers))
        self.pinned = Pinned(accelerator)
        try:
            tier = pool.tier
            blobs = [layer.blobs for layer in layers] if tier is None else [tier.slab]
            refused = self.pinned.pin(blobs)
            if refused:
                warnings.warn(refused, RuntimeWarning, stacklevel=2)
            self.memory.start(config.vram, kept)
        except BaseException:
            self.close()
            raise
        self.counts = [LayerCounts() for _ in layers]
        self.meter.reset()
        self.inputs = LayerInputs(accelerator, sizes.tolist())
        self.passing: Pass | None = None  # the pass of the whole model that runs, if one does
        self._took = math.inf  # predicted seconds of the layer before

    def forward(
        self,
        layer: int,
        inputs: tuple[Tensor, Tensor, Tensor],
        early: Callable[[], None] | None = None,
    ) -> tuple[Tensor, Load]:
        """A layer's output [T, D] float32 where the model computes, and what it asked for.

        inputs: hidden states [T, D], ids [T, K] and weights [T, K]. early: launches what else may
        run while the CPU has its share.
        """
        with self.lock:
            self._ensure_open()
            executor = self.executor
            taken = self.memory.within(lambda: self.inputs.take(layer, inputs, self._depth(layer)))
            # Outside `within`: a call that is refused has touched no slot.
            read = self.inputs.read(layer, self.pool.layer(layer), taken, early)
            executor.call, load, executor.forecasts = read
            try:
                before = self.engine.timeline.now
                self._step(load, executor.forecasts, tokens=len(inputs[1]))
                self._took = self.engine.timeline.now - before
                assert executor.out is not None
                return executor.out, load
            finally:
                executor.call = executor.out = None

    def _ensure_open(self) -> None:
        if self.is_closed:
            raise WrappedModelError(
                "the accelerator was given back by an hybrimoe.unwrap while this pass ran, or by one "
                "that could not restore all experts; call it again"
            )

    def _depth(self, layer: int) -> int:
        """Layers to forecast: none if no copy would follow, because all is there or in the way."""
        engine, timeline = self.engine, self.engine.timeline
        depth = engine.policies.prefetcher.depth
        if not depth or timeline.free[Lane.LINK] > timeline.now + self._took:
            return 0
        return depth if self.cache.lacks(layer + 1, layer + 1 + depth) else 0

    def begin(self, passing: Pass | None) -> None:
        """A forward pass of the whole model starts: what it has grown by may need room."""
        with self.lock:
            self.passing = passing
            if not self.is_closed:
                self.memory.relieve()

    def end(self) -> None:
        """A forward pass of the whole model is over."""
        self.passing = None
        if self.guard is not None:
            self.guard.end(self.meter.now())

    def _step(self, load: Load, forecasts: Sequence[Forecast], tokens: int) -> None:
        """One layer through the engine, on the clock."""
        engine, meter, started = self.engine, self.meter, self.meter.now()
        if self.timed:
            engine.timeline.sync(started)
            engine.timeline.free[Lane.GPU] += self.cost.gpu_first  # no expert starts sooner
            if load.layer == 0:
                self._refine()
        if self.guard is not None and self.memory.slots:
            if load.layer == 0:
                self.guard.begin(started, tokens, self._decodes(tokens))
            self.guard.plan(load, self.cost)
        before = engine.hits, engine.misses, engine.late
        plan = self.memory.run(load, forecasts)
        self._count(load.layer, before, plan.gpu.size, plan.cpu.size)
        seconds, executor = meter.now() - started, self.executor
        planning = Span(Lane.POLICY, started, seconds - executor.spent_s, "policies", load.layer)
        meter.ran(planning)
        copied = plan.copies.size > 0
        step = Step(load.layer, started, executor.cpu_end, executor.launched, copied)
        meter.ended(step, seconds)
        if self._decodes(tokens):
            absent = engine.misses + engine.late - before[1] - before[2]
            own = self.cost.of(load.layer)
            meter.decoded(seconds, load.experts.size - absent, absent, own)

    def _decodes(self, tokens: int) -> bool:
        """Whether the pass is decode; of a part of the model called alone its size must tell."""
        return tokens <= DECODE_TOKENS if self.passing is None else self.passing.is_decode

    def _refine(self) -> None:
        """Move the cost table towards what was measured."""
        if len(self.meter.recent) < REFINE_AFTER:
            return
        self.cost = self.cost.refined(self.meter.take())
        self.engine.cost = self.executor.books.cost = self.cost

    def to_dict(self) -> dict[str, Any]:
        """Totals for the report; seconds are measured, uploads and bytes are counted."""
        engine, books, meter = self.engine, self.executor.books, self.meter
        self._settle()
        activated = engine.hits + engine.misses + engine.late
        return {
            "device": self.accelerator.name,
            "slots": self.cache.slots,
            "memory": self.memory.to_dict() | {"pinned_bytes": self.pinned.nbytes},
            "hit_rate": engine.hits / activated if activated else 0.0,
            "hits": engine.hits,
            "misses": engine.misses,
            "late": engine.late,
            "uploads": books.uploads,
            "link_bytes": int(books.link_bytes),
            "gpu_experts": sum(c.gpu_experts for c in self.counts),
            "cpu_experts": sum(c.cpu_experts for c in self.counts),
            "layer_s": float(meter.total.sum()),
            "wait_s": float(meter.wait.sum()),
            "lane_s": {lane.name: float(meter.seconds[:, lane].sum()) for lane in Lane},
            "predicted_lane_s": {lane.name: float(books.busy[lane]) for lane in Lane},
            "ended_last": {lane.name: int(meter.held_up[:, lane].sum()) for lane in ENDING},
            "bound_share": self._bound_share(),
            "guard": self.guard.to_dict() if self.guard else None,
            "replaced": dict(engine.replaced),
            "layers": [self._layer(index) for index in range(len(self.counts))],
        }

    def spans(self) -> dict[str, list[Span]]:
        """Measured and predicted spans since the last reset; ConfigError without `trace=True`."""
        self._settle()
        predicted, measured = self.engine.timeline.spans, self.meter.spans
        if predicted is None or measured is None:
            raise ConfigError("spans are kept with hybrimoe.wrap(model, trace=True) only")
        return {"predicted": predicted, "measured": measured}

    def reset(self) -> None:
        """Start counting anew; the cache keeps what it has learnt."""
        self._settle()
        engine, books = self.engine, self.executor.books
        engine.hits = engine.misses = engine.late = books.uploads = books.link_bytes = 0
        books.busy[:] = 0
        self.counts = [LayerCounts() for _ in self.counts]
        self.meter.reset()
        if engine.timeline.spans is not None:
            engine.timeline.spans.clear()

    def _settle(self) -> None:
        """Wait for what is under way, and book it."""
        with contextlib.suppress(DeviceLostError):
            self.accelerator.synchronize()
            self.meter.settle()

    def attach(self) -> None:
        """Read the routers of `probes` from now on."""
        self.inputs.watch(self.probes)

    def detach(self, attempts: Attempts) -> None:
        """`close`, and read no router any more; in this order, as a layer may still run."""
        self.close(attempts)
        self.inputs.detach(attempts)

    def close(self, attempts: Attempts | None = None) -> None:
        """Let go of the memory of both sides; the host's is about to be freed.

        A layer that another thread computes is waited for. attempts: takes what the device says
        against it, which nobody hears of otherwise.
        """
        attempts = attempts or Attempts()
        with self.lock:
            self.is_closed = True
            if attempts.let_go(self.accelerator.synchronize):  # background copies still read it
                attempts.let_go(self.accelerator.allocate, 0, 0)
            while self.pinned.nbytes:
                attempts.let_go(self.pinned.unpin)

    def _bound_share(self) -> float | None:
        """How close decode comes to reading its weights at full speed, where times mean anything."""
        meter = self.meter
        known = self.accelerator.measured and meter.decode_s > 0
        return meter.bound_s / meter.decode_s if known else None

    def _layer(self, index: int) -> dict[str, Any]:
        """One layer's counts and seconds."""
        meter = self.meter
        lanes = {f"{lane.name.lower()}_s": float(meter.seconds[index, lane]) for lane in Lane}
        whole = {"layer_s": float(meter.total[index]), "wait_s": float(meter.wait[index])}
        return asdict(self.counts[index]) | whole | lanes

    def _count(self, layer: int, before: tuple[int, int, int], gpu: int, cpu: int) -> None:
        counts = self.counts[layer]
        counts.hits += self.engine.hits - before[0]
        counts.misses += self.engine.misses - before[1]
        counts.late += self.engine.late - before[2]
        counts.gpu_experts += gpu
        counts.cpu_experts += cpu


def counted(layers: list[PackedLayer]) -> Experts:
    """What slots are counted by."""
    return Experts(
        sum(len(layer.blobs) for layer in layers),
        len(layers),
        max(layer.layout.expert_bytes for layer in layers),
    )
