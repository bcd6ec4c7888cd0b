"""`Runtime`, which a wrapped model carries as `model.hybrimoe`, and what completes it."""

from __future__ import annotations

import json
import logging
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn

from hybrimoe.attachments import Attachment, Hooks
from hybrimoe.attempts import Attempts
from hybrimoe.calibration.pool_cost import cost_of
from hybrimoe.config import Config
from hybrimoe.errors import ConfigError
from hybrimoe.files import write_atomically
from hybrimoe.models.adapters import FoundExperts, top_k_of
from hybrimoe.models.bytes import cache_bytes
from hybrimoe.models.places import holder_of
from hybrimoe.models.releases import warn_if_untested
from hybrimoe.models.routers import probes_of
from hybrimoe.modules.counts import Counts
from hybrimoe.modules.frozen import FrozenNotice
from hybrimoe.modules.fused_norm import FusedNorm, find_norms
from hybrimoe.modules.lora import Folding
from hybrimoe.modules.packed_linear import PackedLinear, find_linears
from hybrimoe.modules.pooled_experts import PooledExperts
from hybrimoe.modules.protection import Protection
from hybrimoe.modules.replacement import PackedModule, refuse_copy, refuse_pickle
from hybrimoe.modules.shared_experts import EarlyExperts
from hybrimoe.modules.warming import needs_of, warm
from hybrimoe.policy.timeline import perfetto
from hybrimoe.report import Report
from hybrimoe.runtime.coordinator import Hybrid
from hybrimoe.runtime.counters import Stats
from hybrimoe.runtime.devices.base import Accelerator
from hybrimoe.runtime.devices.open import (
    bring_back_dense,
    check_device,
    move_dense,
    open_accelerator,
)
from hybrimoe.runtime.disk.open import WeightsOf, open_tier
from hybrimoe.runtime.inputs import RouterLookahead
from hybrimoe.runtime.pool import ExpertPool
from hybrimoe.simd.threads import usable_cores
from hybrimoe.sources.packed.linears import StoredLinear

logger = logging.getLogger("hybrimoe")


class Runtime:
    """What `model.hybrimoe` is: the configuration, the pool and the counters of a wrapped model."""

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        found: list[FoundExperts],
        weights_of: WeightsOf | None = None,
    ) -> None:
        check_device(config)
        warn_if_untested()
        self.config = config
        self._model = weakref.ref(model)
        self.pool = ExpertPool()
        self.folding = Folding()
        self.pool.tier = open_tier(config, model, found, weights_of)
        self.layers: list[PooledExperts] = []
        self.linears: list[PackedLinear] = []
        self.norms: list[FusedNorm] = []
        self.hybrid: Hybrid | None = None
        self.origin: Path | None = None  # the folder that it was loaded from, where that is known
        self._counters = Stats()
        self.threads = config.threads or min(torch.get_num_threads(), usable_cores())
        self._attached: list[Attachment] = []
        self.attach(Hooks(lambda: self._watch_passes(model)))

    def report(self) -> Report:
        """What happened since the last reset, and where the time went."""
        return Report.of(
            *(self.config, self.layers, self._counters, self.pool.nbytes, self.threads),
            *(self.hybrid, self.pool.tier),
        )

    def stats(self) -> dict[str, Any]:
        """The report's numbers as a plain dict."""
        return self.report().to_dict()

    def reset_stats(self) -> None:
        """Start counting anew."""
        self._counters.reset()
        if self.pool.tier is not None:
            self.pool.tier.reset()
        if self.hybrid is not None:
            self.hybrid.reset()

    def export_trace(self, path: str | os.PathLike[str]) -> None:
        """Write measured and predicted spans as a Chrome trace, for ui.perfetto.dev.

        Needs `hybrimoe.wrap(model, trace=True)` with an accelerator, or with experts on disk, whose
        reads are the LINK of "disk"; raises ConfigError otherwise.
        """
        tier, spans = self.pool.tier, self.hybrid.spans() if self.hybrid else {}
        if self.hybrid is None and tier is None:
            raise ConfigError("export_trace needs an accelerator; every expert runs on the CPU")
        if tier is not None:
            spans["disk"] = tier.spans()
        events = [event for name, found in spans.items() for event in perfetto(found, name)]
        write_atomically(Path(path), json.dumps({"traceEvents": events}).encode())

    def attach(self, attachment: Attachment) -> None:
        """Add something to the model, which `undo` takes away before all that was there earlier."""
        self._attached.append(attachment)  # first: an interrupted half is taken away, too
        attachment.attach()

    def make_room(self) -> None:
        """Reserve the disk space of experts that do not stay in RAM; raises StorageError."""
        if self.pool.tier is not None:
            self.pool.tier.backing.make_room(self.pool.tier.sizes.file_bytes)

    def pack(self, experts: FoundExperts, weights: str | None = None) -> PooledExperts:
        """Add a layer to the pool; one on the meta device gets memory that is still to be filled.

        weights: a format of its own, where it has one.
        """
        # fmt: off
        layer = PooledExperts(experts, weights or self.config.weights, self.pool, self.threads,
                              self._counters)
        # fmt: on
        self.layers.append(layer)
        layer.folding = self.folding
        self.folding.layers.append(layer)
        return layer

    @property
    def packed(self) -> list[PooledExperts | PackedLinear | FusedNorm]:
        """All modules that stand for the model's own."""
        return [*self.layers, *self.linears, *self.norms]

    def pack_linears(self, model: nn.Module, weights: str) -> None:
        """Pack the dense layers too, each in its place, and fuse the norms between them.

        Those that `adopt` put there stay as they were saved.
        """
        if not self.linears:
            for found in find_linears(model, weights, [layer.name for layer in self.layers]):
                self._install(PackedLinear(found, self.pool.workspace, self.threads))
        for norm in list(find_norms(model)):
            self.norms.append(FusedNorm(norm))
            self.attach(self.norms[-1])

    def adopt(self, stored: Sequence[StoredLinear]) -> None:
        """Put dense layers into their places that were read packed."""
        for linear in stored:
            self._install(linear.packed(workspace=self.pool.workspace, threads=self.threads))

    def _install(self, layer: PackedLinear) -> None:
        self.linears.append(layer)
        self.attach(layer)

    def share(self, model: nn.Module, accelerator: Accelerator) -> None:
        """From now on, the policies divide the experts between the CPU and an accelerator."""
        # Only where the accelerator's memory decides: counting takes a second on large models.
        counts = self.config.vram is None and accelerator.free_bytes() is not None
        kv = cache_bytes(model, self.config.max_new_tokens) if counts else 0
        cost = cost_of(self.pool, accelerator, self.threads, self.config.deterministic)
        self.hybrid = Hybrid(
            self.pool, self.config, accelerator, cost, top_k_of(model), self.threads, kv
        )
        self.hybrid.probes = probes_of(model, [layer.name for layer in self.layers])
        self.attach(self.hybrid)
        for layer in self.layers:
            layer.hybrid = self.hybrid
        if accelerator.measured:  # elsewhere nothing would run meanwhile
            self.launch_early(model)

    def launch_early(self, model: nn.Module) -> None:
        """From now on, shared experts run beside the routed ones."""
        for layer in self.layers:
            layer.early = EarlyExperts.beside(model, layer.name)
            self.attach(layer.early)

    def foresee(self, model: nn.Module) -> None:
        """From now on, routers are asked early for what to read from the disk."""
        probes = probes_of(model, [layer.name for layer in self.layers])
        lookahead = RouterLookahead(probes, [layer.packed.experts for layer in self.layers])
        self.attach(lookahead)
        for layer in self.layers:
            layer.lookahead = lookahead

    def guard(self, model: nn.Module) -> None:
        """Refuse from now on what would break the experts, and count them where models are counted."""
        names = [layer.name for layer in self.layers]
        self.attach(Protection(model, names, {layer.dtype for layer in self.layers}))
        self.attach(Counts(model, names))
        what = "experts and packed dense layers" if self.linears else "experts"
        notice = FrozenNotice(model, names[0], what)
        for layer in self.layers:
            layer.watch = notice

    @property
    def in_place(self) -> list[PooledExperts | PackedLinear | FusedNorm]:
        """Those of `packed` that stand in the model."""
        return [part for part in self.packed if holder_of(part.found, part)]

    def undo(self) -> Attempts:
        """Put the model's own modules back, with their weights, whatever the accelerator or the disk
        says. What is still `in_place` afterwards could not be read; trying again may help.
        """
        attempts = Attempts()
        for attachment in reversed(self._attached):
            attachment.detach(attempts)
        if not self.in_place:
            attempts.let_go(self.close)
        return attempts

    def abandon(self) -> None:
        """The model is given up half loaded: take away all but its modules, and close the files."""
        attempts = Attempts()
        for attachment in reversed(self._attached):
            if not isinstance(attachment, PackedModule):
                attachment.detach(attempts)
        attempts.let_go(self.close)

    def leave(self) -> None:
        """Be `model.hybrimoe` no more; a PEFT model around it only passes the name on."""
        model = self._model()
        assert model is not None
        del model.hybrimoe

    def close(self) -> None:
        """End the threads and close the files of experts on disk; nobody may need them any more."""
        if self.pool.tier is not None:
            self.pool.tier.close()

    def _watch_passes(self, model: nn.Module) -> list[Any]:
        return [
            model.register_forward_pre_hook(self._counters.enter, with_kwargs=True),
            model.register_forward_pre_hook(self._begin),
            model.register_forward_hook(self._counters.leave, with_kwargs=True),
            model.register_forward_hook(self._end),
        ]

    def _begin(self, *_: Any) -> None:
        """Forward pre-hook of the model."""
        if self.hybrid is not None:
            self.hybrid.begin(self._counters.passing)

    def _end(self, *_: Any) -> None:
        """Forward hook of the model."""
        if self.hybrid is not None:
            self.hybrid.end()

    def __repr__(self) -> str:
        size = self.pool.nbytes / 2**20
        return f"<hybrimoe.Runtime: {len(self.layers)} layers, {size:.1f} MiB of experts>"

    def __deepcopy__(self, memo: Any) -> NoReturn:
        refuse_copy()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        refuse_pickle()


def complete(runtime: Runtime, model: nn.Module) -> None:
    """All experts are in the pool and in the model: open the accelerator and hand out the runtime."""
    accelerator = open_accelerator(runtime.config)
    warm(needs_of(runtime.layers, runtime.config.linear, shared=accelerator is not None))
    try:
        if runtime.pool.tier is not None:
            runtime.pool.tier.backing.open_direct()
        if accelerator is not None:
            move_dense(model, accelerator.compute_device)  # first: experts get what is left
            runtime.share(model, accelerator)
        if runtime.config.linear is not None:
            runtime.pack_linears(model, runtime.config.linear)
        runtime.attach(runtime.folding)
        if accelerator is None and runtime.pool.tier is not None:
            runtime.foresee(model)  # its hooks on norms come last: a norm with hooks is not fused
        runtime.guard(model)
    except BaseException as error:
        if accelerator is not None:
            attempts = Attempts()
            attempts.take(bring_back_dense, model)
            for failure in attempts.errors:
                error.add_note(str(failure))
        raise
    model.hybrimoe = runtime  # type: ignore[assignment]
    logger.info("wrapped %s: %s", type(model).__name__, runtime)
