"""The routers of a model: what they asked for, and what later ones would ask for already now.

A router is not known by its class but by what it returns: a tuple that holds the very expert ids
its experts are then called with. Where none does, there are no scores beyond those ids, and no
forecasts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

NAMES = ("gate", "router")


class Seat:
    """The router beside one layer's experts, and what it was last called with and returned."""

    def __init__(self, block: nn.Module) -> None:
        children = dict(block.named_children())
        self.router = next((children[name] for name in NAMES if name in children), None)
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.output: Any = None

    def watch(self) -> list[Any]:
        """Remember every call from now on; returns the hook to remove."""
        if self.router is None:
            return []
        return [self.router.register_forward_hook(self._seen, with_kwargs=True)]

    def take(self, ids: Tensor, experts: int) -> tuple[int, Tensor | None]:
        """Where the router's output holds these ids, -1 for nowhere, and its logits [T, E]."""
        output, self.output = self.output, None
        if not isinstance(output, tuple):
            return -1, None
        tensors = [x if isinstance(x, Tensor) else None for x in output]
        place = next((i for i, x in enumerate(tensors) if _same(x, ids)), -1)
        return place, _logits(output, ids.shape[0], experts) if place >= 0 else None

    def _seen(self, router: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self.args, self.kwargs, self.output = args, kwargs, output


def look_ahead(
    seats: Sequence[Seat], layer: int, place: int, depth: int, experts: int
) -> list[tuple[int, Tensor, Tensor]]:
    """(layer, ids [T, K], logits [T, E]) that the next routers say to this layer's router input.

    Only routers of this one's class are asked: another one may read something else. Their hooks
    are passed by, so that nobody counts these calls as routing.
    """
    here = seats[layer]
    found = []
    for target in range(layer + 1, min(layer + 1 + depth, len(seats))):
        router = seats[target].router
        if router is None or type(router) is not type(here.router) or router.training:
            break
        output = router.forward(*here.args, **here.kwargs)
        ids = output[place]
        logits = _logits(output, ids.shape[0], experts)
        if logits is None:
            break
        found.append((target, ids, logits))
    return found


def _same(found: Tensor | None, ids: Tensor) -> bool:
    return (
        found is not None
        and found.shape == ids.shape
        and not found.is_floating_point()
        and torch.equal(found, ids)
    )


def _logits(output: Sequence[Any], tokens: int, experts: int) -> Tensor | None:
    """The first output with one number per token and expert."""
    for x in output:
        if isinstance(x, Tensor) and x.is_floating_point() and x.shape == (tokens, experts):
            return x.detach().float()
    return None
