"""The module that stands where a model's routed experts stood."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hybrimoe.kernels.cpu.run_layer import BlankPairsError, PackedLayer, check_arguments, run_layer
from hybrimoe.models import weights as formats
from hybrimoe.models.adapters import FoundExperts
from hybrimoe.models.pairs import check_kinds, each_alone, without_blanks
from hybrimoe.models.places import exchange
from hybrimoe.models.spec import ExpertSpec
from hybrimoe.models.weights import ExpertWeights
from hybrimoe.modules import compile_ops as opaque
from hybrimoe.modules.frozen import refuse_training
from hybrimoe.modules.gradients import Differentiable, differentiate_apart
from hybrimoe.modules.lora import Folding, LayerAdapters
from hybrimoe.modules.replacement import PackedModule
from hybrimoe.modules.shared_experts import EarlyExperts
from hybrimoe.modules.stand_ins import StandIn
from hybrimoe.runtime.coordinator import Hybrid
from hybrimoe.runtime.counters import Stats
from hybrimoe.runtime.disk.job import Job
from hybrimoe.runtime.inputs import RouterLookahead
from hybrimoe.runtime.pages import allocate_blobs, checksum
from hybrimoe.runtime.pool import ExpertPool
from hybrimoe.simd.stopwatch import stopwatch


class PooledExperts(PackedModule):
    """Computes `experts(hidden_states, ids, weights)` from the pool.

    The original module is kept aside, with empty parameters, and comes back by `restore`.
    """

    def __init__(
        self, found: FoundExperts, weights: str, pool: ExpertPool, threads: int, stats: Stats
    ) -> None:
        super().__init__()
        described, spec = found.views(), found.spec
        self.name, self.threads, self.stats, self.pool = found.name, threads, stats, pool
        self.post_norm = described.post_norm
        self.hybrid: Hybrid | None = None  # who shares the work with an accelerator, if anyone
        self.lookahead: RouterLookahead | None = (
            None  # who says ahead of time what to read from a disk
        )
        self.folding: Folding | None = None  # who packs layers anew when adapters change
        self.early: EarlyExperts | None = None  # what of the block may run meanwhile
        self.watch: Callable[[str, int, bool], None] = lambda *_: None  # told of training
        # Kept out of nn.Module's registry: its parameters are not parameters of the model now.
        self.__dict__["original"] = found.module
        self.__dict__["found"] = found
        self.borrowing = threading.Lock()
        self.number = opaque.register(self)
        self.shapes = {name: getattr(found.module, name).shape for name in spec.parameters}
        self.dtype = spec.dtype
        self.packed_names = tuple(self.shapes)
        self.packed_numbers = sum(shape.numel() for shape in self.shapes.values())
        self.native_bytes = self.packed_numbers * self.dtype.itemsize
        # On the meta device there is nothing to pack yet: who loads the model fills the blobs.
        self.is_filled = not described.up.is_meta
        self.is_lossless = formats.is_lossless(spec.fmt(weights))
        self.stand_ins: dict[str, StandIn] = {}
        self.adapters = LayerAdapters(self, found)
        if self.is_filled:
            folded = self.adapters.at_first()
            layer = pack_layer(spec, weights, self.described(folded) if folded else described)
        else:
            layer = reserve(spec, weights)
        self.index = pool.add(layer)
        if self.is_filled:
            self.seal()
        self.train(found.module.training)

    @property
    def packed(self) -> PackedLayer:
        """This layer's experts in the pool."""
        return self.pool.layer(self.index)

    @property
    def packed_bytes(self) -> int:  # type: ignore[override]
        """What the experts of this layer take in the pool; none if they are on disk."""
        blobs = self.packed.blobs
        return blobs.nbytes if blobs.strides[0] else 0

    def attach(self) -> None:
        """Take the original's place in its parent and drop its weights."""
        exchange(self.found, self.original, self)
        self.train(self.original.training)  # a loader says so after it has built the model
        self.adapters.adopt()
        for name in self.shapes:
            parameter = getattr(self.original, name)
            parameter.data = torch.empty(0, dtype=self.dtype)

    def restore(self) -> None:
        """Undo `attach`: weights back into the original, the original back into the model.

        Weights that an interrupted `attach` has not dropped stay as they are.
        """
        parameters = {name: getattr(self.original, name) for name in self.shapes}
        dropped = [name for name, p in parameters.items() if p.shape != self.shapes[name]]
        tensors = self.adapters.plain() if dropped else {}
        for name in dropped:
            parameters[name].data = tensors[name]
        self.original.train(self.training)
        exchange(self.found, self, self.original)
        self.pool.release(self.index)

    def seal(self) -> None:
        """The blobs are complete: remember what they hold."""
        self.is_filled, self.checksum = True, checksum(self.packed.blobs)
        self.pool.spill(self.index)

    def is_intact(self) -> bool:
        """Whether the packed bytes are still those that `wrap` wrote."""
        return checksum(self.pool.blobs(self.index)) == self.checksum

    def rewritten(self, blobs: np.ndarray | None, total: int) -> None:
        """The packed weights have changed; None, on disk: they are the former ones again."""
        self.checksum = total
        self.pool.rewrite(self.index, blobs)

    def unpacked(self, blobs: np.ndarray | None = None) -> dict[str, Tensor]:
        """The weights as the original's parameters hold them: exact where the format is lossless.

        Deltas of adapters are part of them. blobs: instead of the pool's.
        """
        tensors = {
            name: torch.empty(shape, dtype=self.dtype) for name, shape in self.shapes.items()
        }
        packed = self.packed
        blobs = self.pool.blobs(self.index) if blobs is None else blobs
        formats.unpack(packed.fmt, packed.layout, blobs, self.described(tensors))
        return tensors

    def reference(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The original's own arithmetic in float32 on the stored weights; needs one layer of memory."""
        tensors = {name: tensor.float() for name, tensor in self.unpacked().items()}
        return self.call_original(tensors, hidden.float(), ids, weights.float())

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """hidden_states [T, D], top_k_index [T, K], top_k_weights [T, K] -> [T, D]."""
        args = hidden_states, top_k_index, top_k_weights
        if torch.compiler.is_compiling():
            learns = self.training and torch.is_grad_enabled()
            return opaque.experts(*args, self.number, learns)
        if torch.is_grad_enabled():
            trained = self.adapters.trained()
            if trained or hidden_states.requires_grad or top_k_weights.requires_grad:
                if self.training:
                    self.watch(self.name, self.index, bool(trained))
                out: Tensor = Differentiable.apply(self, *args, *trained)
                return out
        return self.compute(*args)

    def compiled(self, hidden: Tensor, ids: Tensor, weights: Tensor, learns: bool) -> Tensor:
        """`compute`, called from a compiled graph; learns: while it trains, with gradients."""
        if learns:
            self.watch(self.name, self.index, bool(self.adapters.trained()))
        return self.compute(hidden, ids, weights)

    def gradients(
        self, grad: Tensor, hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Of hidden states and routing weights, with the adapters that are active now.

        A compiled graph keeps tensors only between its two ways, so it cannot say which were.
        """
        if self.adapters.trained():
            refuse_training(self.name)
        self._follow()
        return differentiate_apart(self, self.adapters.folded, grad, hidden, ids, weights)

    def compute(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """`forward` without gradients; RoutingError before anything has changed."""
        self._follow()
        try:
            return self._routed(hidden, ids, weights)
        except BlankPairsError:
            return without_blanks(self._routed, self.packed.experts, hidden, ids, weights)

    def _follow(self) -> None:
        """Have the pool hold the deltas of the adapters that are active now."""
        if self.adapters.is_stale() and self.folding is not None:
            self.folding.follow()

    def _routed(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """`compute` where every pair names an expert."""
        check_kinds(self.name, hidden, ids)
        if self.post_norm is None:
            return self._launch(hidden, ids, weights)
        # The norm sees each expert's own output, so every routed pair becomes a token of its own.
        tokens, k = ids.shape
        alone = each_alone(ids, weights, self.packed.experts)
        y = self._launch(hidden.repeat_interleave(k, 0), *alone)
        y = self.post_norm(y).view(tokens, k, -1)  # [T, K, D]
        return (y * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)

    def _launch(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self.hybrid is not None:
            return self._shared(hidden, ids, weights)
        started = stopwatch.clock()
        experts = _numpy(ids if ids.dtype == torch.int64 else ids.to(torch.int64))
        weights = weights if weights.dtype == torch.float32 else weights.to(torch.float32)
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        arrays = (_numpy(hidden), experts, _numpy(weights), _numpy(out))
        how = (self.pool.workspace, formats.NATIVE[hidden.dtype], self.threads)
        if self.pool.tier is None:
            run_layer(self.packed, *arrays, *how)
        else:
            self._run_from_disk(Job(self.index, self.packed, *arrays, *how), ids, weights)
        self.stats.record(self.index, experts, stopwatch.clock() - started)
        return out

    def _run_from_disk(self, job: Job, ids: Tensor, weights: Tensor) -> None:
        tier, lookahead = self.pool.tier, self.lookahead
        assert tier is not None
        assert lookahead is not None
        try:
            check_arguments(job.layer, job.x, job.ids, job.weights, job.out, job.dtype)
            tier.run(job, lambda: lookahead.forecasts(self.index, ids, weights))
        finally:
            lookahead.forget(self.index)

    def _shared(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The layer on CPU and accelerator together, by the engine's plan; sums in float32."""
        assert self.hybrid is not None
        if not ids.numel():
            return torch.zeros_like(hidden)
        started = stopwatch.clock()
        early = self.early.launch if self.early is not None else None
        out, load = self.hybrid.forward(self.index, (hidden, ids, weights), early)
        seconds = stopwatch.clock() - started
        self.stats.add(self.index, len(ids), ids.numel(), load.experts.size, seconds)
        return out.to(hidden.dtype)

    def described(self, tensors: dict[str, Tensor]) -> ExpertWeights:
        """`ExpertWeights` views on other tensors of the original's shapes."""
        with self.borrowing, _Borrowed(self.original, tensors):
            return self.found.views()

    def call_original(
        self, tensors: dict[str, Tensor], hidden: Tensor, ids: Tensor, weights: Tensor
    ) -> Tensor:
        """The original's own arithmetic on these weights."""
        blank = ids == self.packed.experts  # not every implementation leaves these out
        ids, weights = ids.masked_fill(blank, 0), weights.masked_fill(blank, 0)
        with self.borrowing, _Borrowed(self.original, tensors):
            out: Tensor = self.original(hidden, ids, weights)
        return out

    def stand_in(self, name: str) -> StandIn:
        """What shows the shape and the type of a packed parameter, always the same object."""
        if name not in self.stand_ins:
            self.stand_ins[name] = StandIn.of(name, self.shapes[name], self.dtype)
        return self.stand_ins[name]

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Its own, and a stand-in for each packed one, by which PEFT finds what it may target.

        The model's `named_parameters` does not ask here: to it, experts have none. The order is the
        original's, as the names of what an adapter saves depend on it.
        """
        prefix = kwargs.get("prefix", args[0] if args else "")
        yield from super().named_parameters(*args, **kwargs)
        for name in filter(self.shapes.__contains__, self.original._parameters):
            yield f"{prefix}.{name}" if prefix else name, self.stand_in(name)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in self.__dict__.get("shapes", {}):
                raise AttributeError(
                    f"{name} is packed in model.hybrimoe.pool; hybrimoe.unwrap(model) restores it"
                ) from None
            return getattr(self.__dict__["original"], name)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in self.adapters.plain().items():
            destination[prefix + name] = tensor

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        packed = self.packed
        experts, size = packed.blobs.shape
        return f"{experts} experts as {packed.fmt}, {size / 2**20:.2f} MiB each"


class _Borrowed:
    """Within the block, the original module holds other tensors as its parameters."""

    def __init__(self, module: nn.Module, tensors: dict[str, Tensor]) -> None:
        self.parameters = {name: getattr(module, name) for name in tensors}
        self.tensors = tensors

    def __enter__(self) -> None:
        self.saved = {name: p.data for name, p in self.parameters.items()}
        self.wanted_grad = {name: p.requires_grad for name, p in self.parameters.items()}
        for name, parameter in self.parameters.items():
            parameter.requires_grad_(False)
            parameter.data = self.tensors[name]

    def __exit__(self, *_: object) -> None:
        for name, parameter in self.parameters.items():
            parameter.data = self.saved[name]
            parameter.requires_grad_(self.wanted_grad[name])


def pack_layer(spec: ExpertSpec, weights: str, described: ExpertWeights) -> PackedLayer:
    """Pack the experts of one layer into memory of their own."""
    layer = reserve(spec, weights)
    formats.pack(layer.fmt, layer.layout, described, layer.blobs)
    return layer


def reserve(spec: ExpertSpec, weights: str) -> PackedLayer:
    """Memory for the experts of one layer, all zero."""
    layout = spec.layout(weights)
    blobs = allocate_blobs(spec.experts, layout)
    return PackedLayer(spec.fmt(weights), layout, spec.gate, spec.hidden, blobs)


def _numpy(tensor: Tensor) -> np.ndarray:
    # Each torch call costs microseconds in decode, so only those that are needed are made.
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.device.type != "cpu":
        tensor = tensor.cpu()
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    return formats.bits(tensor)
