"""Record the routing of a running model, wrapped or plain, into a `RoutingTrace`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybrimoe.errors import ConfigError, TraceError
from hybrimoe.models.adapters import FoundExperts, find_experts
from hybrimoe.models.passes import read_pass
from hybrimoe.models.routers import look_ahead, probes_of
from hybrimoe.modules.pooled_experts import PooledExperts
from hybrimoe.policy.router_output import read_forecast
from hybrimoe.policy.routing import Forecast
from hybrimoe.policy.timeline import Array
from hybrimoe.runtime.inputs import as_array
from hybrimoe.simulation.recorder import TraceRecorder
from hybrimoe.simulation.trace import RoutingTrace

DEPTH = 3
"""Layers that forecasts look ahead, as the paper does."""
MAX_DEPTH = 4


@contextmanager
def record(model: nn.Module, *, depth: int = DEPTH) -> Iterator[RoutingTrace]:
    """Record what the routers of a model ask for while the block runs.

    with hybrimoe.record(model) as trace:
        model.generate(**inputs)
    trace.save("routing.npz")

    The trace is empty until the block ends. Every call of the model is a step: a decode step if each
    sequence has a past and brings few tokens (`passes.Pass`), else a prefill step; and a new sequence
    where none has a past. A batch is one step of several tokens. Scores are the weights the experts
    were called with, and where the router's logits can be read, those of as many other experts on
    the same scale.
    depth: layers of forecasts to keep: what the routers of the next layers say to this layer's
        input at that moment. Models whose routers cannot be run early give none.
    """
    if not 0 <= depth <= MAX_DEPTH:
        raise ConfigError(f"depth must lie in [0, {MAX_DEPTH}], got {depth}")
    found = _experts(model)
    recording = _Recording(model, found, depth)
    trace = recording.empty()
    hooks = recording.watch(model)
    try:
        yield trace
    finally:
        for hook in hooks:
            hook.remove()
        recording.finish(trace)


class _Layer(NamedTuple):
    ids: Array  # [T, R], best first
    scores: Array  # [T, R]
    top_k: int
    forecasts: list[Forecast]


class _Recording:
    """One step's layers until it is complete, and the steps before it."""

    def __init__(
        self, model: nn.Module, found: list[tuple[FoundExperts, nn.Module]], depth: int
    ) -> None:
        self.found, self.depth = found, depth
        self.probes = probes_of(model, [experts.name for experts, _ in found])
        self.sizes = [_sizes(*layer)[0] for layer in found]
        self.experts = max(self.sizes)
        self.model = model_name(model)
        self.shape = expert_shape(model, found)
        self.step: dict[int, _Layer] = {}
        self.again: set[int] = set()  # layers that ran more than once in this step
        self.prefill, self.sequence = True, -1
        self.recorder: TraceRecorder | None = None

    def watch(self, model: nn.Module) -> list[Any]:
        """Install all hooks and return them."""
        hooks: list[Any] = [hook for probe in self.probes for hook in probe.watch()]
        for layer, (_, module) in enumerate(self.found):
            hooks.append(module.register_forward_pre_hook(self._routed(layer), with_kwargs=True))
        hooks.append(model.register_forward_pre_hook(self._enter, with_kwargs=True))
        hooks.append(model.register_forward_hook(self._leave))
        return hooks

    def empty(self) -> RoutingTrace:
        """A trace of no steps."""
        recorder = TraceRecorder(len(self.found), self.experts, 1, model=self.model)
        return recorder.trace()

    def finish(self, trace: RoutingTrace) -> None:
        """Fill the trace that the caller has with what was recorded."""
        if self.recorder is None:
            return
        recorded = self.recorder.trace()
        for item in fields(recorded):
            object.__setattr__(trace, item.name, getattr(recorded, item.name))
        object.__setattr__(trace, "shape", self.shape)

    def _enter(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        self.step, self.again = {}, set()  # what an interrupted pass left behind is no step
        entered = read_pass(model, args, kwargs)
        self.prefill = not entered.is_decode
        self.sequence += entered.is_new

    def _routed(self, layer: int) -> Any:
        def seen(module: nn.Module, args: Any, kwargs: Any) -> None:
            _, ids, weights = (*args, *kwargs.values())[:3]
            if layer in self.step:
                self.again.add(layer)
            with torch.no_grad():
                self.step[layer] = self._read(layer, ids, weights)

        return seen

    def _read(self, layer: int, ids: Tensor, weights: Tensor) -> _Layer:
        place, logits = self.probes[layer].take(ids, self.sizes[layer])
        order = weights.float().argsort(dim=1, descending=True, stable=True)
        best, scores = ids.gather(1, order), weights.float().gather(1, order)
        forecasts: list[Forecast] = []
        if logits is not None:
            best, scores = _with_others(best, scores, logits.float())
            ahead = look_ahead(self.probes, layer, place, self.depth, self.sizes)
            forecasts = [
                read_forecast(target, as_array(chosen.cpu(), torch.int64), as_array(said.cpu()))
                for target, chosen, said in ahead
            ]
        self.probes[layer].forget()
        return _Layer(best.cpu().numpy(), scores.cpu().numpy(), ids.shape[1], forecasts)

    def _leave(self, model: nn.Module, args: Any, output: Any) -> None:
        step, self.step = self.step, {}
        if not step:
            return
        if self.again:
            names = [self.found[layer][0].name for layer in sorted(self.again)]
            raise TraceError(
                f"a pass ran {', '.join(names)} more than once: the layers of this model are looped, "
                "and a trace holds each layer once per pass"
            )
        missing = set(range(len(self.found))) - set(step)
        sizes = {layer.ids.shape[0] for layer in step.values()}
        ways = {layer.top_k for layer in step.values()}
        if missing or len(sizes) > 1 or len(ways) > 1:
            raise TraceError(
                f"a pass ran {len(step)} of {len(self.found)} layers of experts with "
                f"{sorted(sizes)} tokens and top-k {sorted(ways)}; a trace needs all layers alike"
            )
        if self.recorder is None:
            self.recorder = self._recorder(ways.pop(), step)
        self.recorder.step(self.prefill, max(self.sequence, 0), sizes.pop())
        for layer, seen in sorted(step.items()):
            self.recorder.record(layer, seen.ids, seen.scores, seen.forecasts)

    def _recorder(self, top_k: int, step: dict[int, _Layer]) -> TraceRecorder:
        depth = self.depth if any(layer.forecasts for layer in step.values()) else 0
        return TraceRecorder(
            *(len(self.found), self.experts, top_k),
            ranks=min(layer.ids.shape[1] for layer in step.values()),
            depth=depth,
            width=min(4 * top_k, self.experts),
            model=self.model,
        )


def model_name(model: nn.Module) -> str:
    """The last part of where a model came from, else its type."""
    config = getattr(model, "config", None)
    path = str(getattr(config, "_name_or_path", "")).rstrip("/")
    return path.rsplit("/", 1)[-1] or str(getattr(config, "model_type", type(model).__name__))


def expert_shape(
    model: nn.Module, found: list[tuple[FoundExperts, nn.Module]]
) -> tuple[int, int, int]:
    """Hidden and intermediate size of an expert, and the other weights of one layer."""
    sizes = [_sizes(experts, module) for experts, module in found]
    _, matrices, inner, hidden = sizes[0]
    routed = sum((m + 1) * e * f * d for e, m, f, d in sizes)
    wrapped = hasattr(model, "hybrimoe")
    inputs = getattr(model, "get_input_embeddings", lambda: None)()
    outputs = getattr(model, "get_output_embeddings", lambda: None)()
    tables = {id(p): p.numel() for t in (inputs, outputs) if t is not None for p in t.parameters()}
    total = sum(p.numel() for p in model.parameters()) - sum(tables.values())
    dense = max((total - (0 if wrapped else routed)) // len(found), 1)
    return hidden, max(inner * (matrices + 1) // 3, 1), dense


def _sizes(experts: FoundExperts, module: nn.Module) -> tuple[int, int, int, int]:
    """Experts, matrices besides the down projection, intermediate and hidden size of one layer."""
    if isinstance(module, PooledExperts):
        packed = module.packed
        return len(packed.blobs), packed.layout.matrices, packed.layout.inner, packed.hidden
    spec = experts.spec
    return spec.experts, 2 if spec.gated else 1, spec.inner, spec.hidden


def _experts(model: nn.Module) -> list[tuple[FoundExperts, nn.Module]]:
    """Each layer's experts and the module that computes them now."""
    runtime = getattr(model, "hybrimoe", None)
    if runtime is None:
        return [(experts, experts.module) for experts in find_experts(model)]
    return [(layer.found, layer) for layer in runtime.layers]


def _with_others(best: Tensor, scores: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Append the K next best experts, their probabilities scaled as the activated ones' are."""
    chance = logits.softmax(1)
    scale = scores.sum(1, keepdim=True) / chance.gather(1, best).sum(1, keepdim=True)
    others = chance.scatter(1, best, -1.0)
    more = min(best.shape[1], logits.shape[1] - best.shape[1])
    value, index = others.topk(more, dim=1)
    return torch.cat([best, index], 1), torch.cat([scores, value * scale], 1)
