"""The routers of a model: what they asked for, and what later ones would ask for already now.

A router is not known by its class but by what it returns: a tuple that holds the very expert ids
its experts are then called with. Where none does, there are no scores beyond those ids, and no
forecasts.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hybrimoe.models.input_norm import InputNorm

NAMES = ("gate", "router")
UNKNOWN, NOWHERE = -2, -1


class _Seen(threading.local):
    """The latest call of a router in this thread."""

    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}  # noqa: RUF012 (replaced, never changed)
    output: Any = None


class RouterProbe:
    """The router beside one layer's experts, and what it was last called with and returned.

    owner: the module that holds the block, where the norm before the router may be found.
    """

    def __init__(self, block: nn.Module, owner: nn.Module | None = None) -> None:
        children = dict(block.named_children())
        self.router = next((children[name] for name in NAMES if name in children), None)
        self.norm = InputNorm([block] if owner is None else [block, owner])
        self.place = UNKNOWN  # where the router's output holds the ids
        self._seen = _Seen()

    def watch(self) -> list[Any]:
        """Remember every call from now on; returns the hooks to remove."""
        if self.router is None:
            return []
        return [
            self.router.register_forward_hook(self._called, with_kwargs=True),
            *self.norm.watch(),
        ]

    def take(self, ids: Tensor, experts: int) -> tuple[int, Tensor | None]:
        """Where the router's output holds these ids, -1 for nowhere, and its logits [T, E].

        What the router was called with stays until `forget`.
        """
        output, self._seen.output = self._seen.output, None
        if not isinstance(output, tuple) or self.place == NOWHERE:
            return NOWHERE, None
        if self.place == UNKNOWN and ids.numel():
            tensors = [x if isinstance(x, Tensor) else None for x in output]
            self.place = next((i for i, x in enumerate(tensors) if _same(x, ids)), NOWHERE)
        if self.place < 0 or output[self.place].shape != ids.shape:
            return NOWHERE, None
        return self.place, _logits(output, ids.shape[0], experts)

    def forget(self) -> None:
        """Let go of the tensors of the latest call."""
        seen = self._seen
        seen.args, seen.kwargs, seen.output = (), {}, None

    def inputs(self, target: RouterProbe) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a later router would be called with, if its layer's input were this one's.

        Where both layers' norms are known, the later one's takes the place of this one's: on
        tiny-moe that recalls 0.2 to 0.3 % more of the experts.
        """
        args, kwargs = self._seen.args, self._seen.kwargs
        if args and isinstance(args[0], Tensor):
            scale = self.norm.to(target.norm, args[0])
            if scale is not None:
                return (args[0] * scale, *args[1:]), kwargs
        return args, kwargs

    def _called(self, router: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        seen = self._seen
        seen.args, seen.kwargs, seen.output = args, kwargs, output
        if self.norm.searching and args and isinstance(args[0], Tensor):
            self.norm.find(args[0])


def probes_of(model: nn.Module, paths: Sequence[str]) -> list[RouterProbe]:
    """The probes of the experts called `paths`, as in `FoundExperts.name`."""
    probes = []
    for path in paths:
        block = path.rpartition(".")[0]
        owner = model.get_submodule(block.rpartition(".")[0]) if block else None
        probes.append(RouterProbe(model.get_submodule(block), owner))
    return probes


@torch.no_grad()
def look_ahead(
    probes: Sequence[RouterProbe], layer: int, place: int, depth: int, sizes: Sequence[int]
) -> list[tuple[int, Tensor, Tensor]]:
    """(layer, ids [T, K], logits [T, E]) that the next routers say to this layer's router input.

    sizes: experts of each layer. Only routers of this one's class and width are asked: another one
    may read something else. Their hooks are passed by, so that nobody counts these calls as routing.
    """
    here = probes[layer]
    found = []
    for target in range(layer + 1, min(layer + 1 + depth, len(probes))):
        router = probes[target].router
        if router is None or router.training or not _is_like(router, here.router):
            break
        args, kwargs = here.inputs(probes[target])
        output = router.forward(*args, **kwargs)
        ids = output[place]
        logits = _logits(output, ids.shape[0], sizes[target])
        if logits is None:
            break
        found.append((target, ids, logits))
    return found


def _is_like(router: nn.Module, other: nn.Module | None) -> bool:
    """Whether one class, and weights of one width: what the one is called with suits the other."""
    if other is None or type(router) is not type(other):
        return False
    widths = zip(router.parameters(), other.parameters())
    return all(mine.shape[-1:] == its.shape[-1:] for mine, its in widths if mine.dim() > 1)


def _same(found: Tensor | None, ids: Tensor) -> bool:
    if found is None or found.shape != ids.shape or found.is_floating_point():
        return False
    # sync: only where a block copies the ids on their way, and then once per layer.
    return found.data_ptr() == ids.data_ptr() or torch.equal(found, ids)


def _logits(output: Sequence[Any], tokens: int, experts: int) -> Tensor | None:
    """The first output with one number per token and expert."""
    for x in output:
        if isinstance(x, Tensor) and x.is_floating_point() and x.shape == (tokens, experts):
            return x.detach()
    return None
