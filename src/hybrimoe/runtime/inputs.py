"""What a layer is called with, brought to the host in one transfer with all that policies read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hybrimoe.attachments import Hooks
from hybrimoe.attempts import Attempts
from hybrimoe.kernels.cpu.run_layer import PackedLayer, check_arguments
from hybrimoe.models.routers import RouterProbe, look_ahead
from hybrimoe.policy.router_output import NO_LOGITS, Scorings, read_forecast, read_load
from hybrimoe.policy.routing import Forecast, Load
from hybrimoe.runtime.devices.base import Accelerator


class Call(NamedTuple):
    """The inputs of the layer that runs now, in host memory and where the model computes.

    early: launches what else of the model may run meanwhile, or None.
    """

    x: np.ndarray  # [T, D] float32
    ids: np.ndarray  # [T, K] int64
    weights: np.ndarray  # [T, K] float32
    hidden: Tensor  # [T, D] on the compute device
    early: Callable[[], None] | None = None


class FetchedInputs(NamedTuple):
    """What one transfer brings of a call; on the host but for `hidden`, until the next transfer."""

    hidden: Tensor  # [T, D] where the model computes
    inputs: tuple[Tensor, Tensor, Tensor]  # ids [T, K], weights [T, K], hidden states [T, D]
    logits: Tensor | None  # [T, E]
    ahead: list[tuple[int, Tensor, Tensor]]  # of later layers: which, ids [T, K], logits [T, E]


class LayerInputs:
    """Reads the routers of all layers, and fetches everything of one call at once.

    sizes: experts of each layer.
    """

    def __init__(self, accelerator: Accelerator, sizes: list[int]) -> None:
        self.accelerator, self.sizes = accelerator, sizes
        self.experts = max(sizes)  # loads have as many scores as the policies' books
        self.probes: list[RouterProbe] = []
        self.scorings = Scorings(len(sizes))
        self._hooks = Hooks(lambda: [hook for probe in self.probes for hook in probe.watch()])

    def watch(self, probes: list[RouterProbe]) -> None:
        """From now on, read these routers, one per layer."""
        self.probes = probes
        self._hooks.attach()

    def detach(self, attempts: Attempts) -> None:
        """Read no router any more."""
        self._hooks.detach(attempts)
        self.probes = []

    def take(self, layer: int, inputs: tuple[Tensor, Tensor, Tensor], depth: int) -> FetchedInputs:
        """Bring one call of a layer to the host: hidden states [T, D], ids [T, K], weights [T, K].

        depth: layers to forecast; none where the routers do not show themselves.
        """
        hidden, ids, weights = inputs
        logits, ahead = self._ask(layer, ids, depth) if self.probes else (None, [])
        said = [tensor for _, *pair in ahead for tensor in pair]
        shown = [] if logits is None else [logits]
        fetched = self.accelerator.fetch([ids, weights, hidden, *shown, *said])
        rest = fetched[3 + len(shown) :]
        targets = [target for target, _, _ in ahead]
        return FetchedInputs(
            hidden,
            (fetched[0], fetched[1], fetched[2]),
            None if logits is None else fetched[3],
            list(zip(targets, rest[::2], rest[1::2])),
        )

    def read(
        self,
        layer: int,
        packed: PackedLayer,
        taken: FetchedInputs,
        early: Callable[[], None] | None = None,
    ) -> tuple[Call, Load, list[Forecast]]:
        """What was taken, as the policies read it; RoutingError before anything of it is used."""
        ids, weights, hidden = taken.inputs
        host_ids, host_weights = as_array(ids, torch.int64), as_array(weights)
        on_host = plain(hidden, torch.float32)
        x: np.ndarray = on_host.numpy()
        check_arguments(packed, x, host_ids, host_weights, x, "float32")
        on_cpu = taken.hidden.device.type == "cpu"
        there = on_host if on_cpu else taken.hidden.detach().contiguous()
        call = Call(x, host_ids, host_weights, there, early)
        scores = NO_LOGITS if taken.logits is None else as_array(taken.logits)
        how = self.scorings.of(layer, scores, host_ids, host_weights)
        load = read_load(layer, host_ids, host_weights, self.experts, scores, how)
        forecasts = [
            read_forecast(target, as_array(chosen, torch.int64), as_array(values), how)
            for target, chosen, values in taken.ahead
        ]
        return call, load, forecasts

    def _ask(
        self, layer: int, ids: Tensor, depth: int
    ) -> tuple[Tensor | None, list[tuple[int, Tensor, Tensor]]]:
        probe = self.probes[layer]
        try:
            place, logits = probe.take(ids, self.sizes[layer])
            if logits is None or not depth:
                return logits, []
            return logits, look_ahead(self.probes, layer, place, depth, self.sizes)
        finally:
            probe.forget()


def as_array(tensor: Tensor, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """A contiguous array of host memory; a view where dtype and layout allow."""
    array: np.ndarray = plain(tensor, dtype).numpy()
    return array


def plain(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous, in `dtype`, without gradients; the tensor itself where it is so already."""
    # Each torch call costs microseconds in decode, so only those that are needed are made.
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    return tensor


DEPTH = 1
"""Layers to look ahead: while one computes, a disk brings about what the next one lacks."""


class RouterLookahead:
    """Asks routers early, so that the disk is read before experts are needed.

    probes: one per layer. sizes: experts of each layer.
    """

    def __init__(self, probes: list[RouterProbe], sizes: list[int]) -> None:
        self.probes, self.sizes = probes, sizes
        self._scorings = Scorings(len(probes))
        self._hooks = Hooks(lambda: [hook for probe in self.probes for hook in probe.watch()])

    def attach(self) -> None:
        """Read the routers from now on."""
        self._hooks.attach()

    def forecasts(self, layer: int, ids: Tensor, weights: Tensor) -> list[Forecast]:
        """Forecasts of the layers after one that was called with ids [T, K] and weights [T, K].

        None where its router does not show itself, or where so many tokens come that the next layer
        will ask for most of its experts.
        """
        place, logits = self.probes[layer].take(ids, self.sizes[layer])
        if logits is None or 2 * ids.numel() > self.sizes[layer]:
            return []
        ahead = look_ahead(self.probes, layer, place, DEPTH, self.sizes)
        called = _on_host(logits), _on_host(ids, torch.int64), _on_host(weights)
        how = self._scorings.of(layer, *called)
        return [
            read_forecast(target, _on_host(chosen, torch.int64), _on_host(values), how)
            for target, chosen, values in ahead
        ]

    def forget(self, layer: int) -> None:
        """The layer has run: let go of what its router was called with."""
        self.probes[layer].forget()

    def detach(self, attempts: Attempts) -> None:
        """Read no router any more."""
        self._hooks.detach(attempts)


def _on_host(tensor: Tensor, dtype: torch.dtype = torch.float32) -> np.ndarray:
    return as_array(tensor if tensor.device.type == "cpu" else tensor.cpu(), dtype)
