"""What the next layer will ask for, said by its own router, where the CPU runs every expert."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from hybrimoe.policy.router_output import Scorings, read_forecast
from hybrimoe.policy.routing import Forecast
from hybrimoe.runtime.intake import as_array
from hybrimoe.runtime.routers import Seat, look_ahead

DEPTH = 1
"""Layers to look ahead: while one computes, a disk brings about what the next one lacks."""


class Foresight:
    """Asks routers early, so that the disk is read before experts are needed.

    seats: one per layer. sizes: experts of each layer.
    """

    def __init__(self, seats: list[Seat], sizes: list[int]) -> None:
        self.seats, self.sizes = seats, sizes
        self._scorings = Scorings(len(seats))
        self._hooks: list[Any] = [hook for seat in seats for hook in seat.watch()]

    def forecasts(self, layer: int, ids: Tensor, weights: Tensor) -> list[Forecast]:
        """Forecasts of the layers after one that was called with ids [T, K] and weights [T, K].

        None where its router does not show itself, or where so many tokens come that the next layer
        will ask for most of its experts.
        """
        place, logits = self.seats[layer].take(ids, self.sizes[layer])
        if logits is None or 2 * ids.numel() > self.sizes[layer]:
            return []
        ahead = look_ahead(self.seats, layer, place, DEPTH, self.sizes)
        called = _on_host(logits), _on_host(ids, torch.int64), _on_host(weights)
        how = self._scorings.of(layer, *called)
        return [
            read_forecast(target, _on_host(chosen, torch.int64), _on_host(values), how)
            for target, chosen, values in ahead
        ]

    def forget(self, layer: int) -> None:
        """The layer has run: let go of what its router was called with."""
        self.seats[layer].forget()

    def close(self) -> None:
        """Remove all hooks."""
        while self._hooks:
            self._hooks.pop().remove()


def _on_host(tensor: Tensor, dtype: torch.dtype = torch.float32) -> np.ndarray:
    return as_array(tensor if tensor.device.type == "cpu" else tensor.cpu(), dtype)
