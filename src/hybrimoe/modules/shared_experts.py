"""Shared experts launched early, so that the accelerator computes them while the CPU has its share.

Many blocks call their shared expert after the routed ones, when the CPU is done. Here it is launched
behind the routed experts' launches, and the block gets the result when it calls.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hybrimoe.attempts import Attempts


class _Memo(NamedTuple):
    """A result, and what it was computed from."""

    x: Tensor
    version: int
    y: Any


class _Pass(threading.local):
    """What this thread's call of a block has come to."""

    x: Tensor | None = None  # the block's input
    routed: bool = False  # whether its routed experts have run


class EarlyExperts:
    """The shared experts of one block, run when `launch` says so.

    Which modules they are is known by their name and learnt from their first call: only one that
    comes after the routed experts and reads the block's input is launched early from then on. The
    result is handed out for that very input, unchanged since; otherwise it is computed again.
    """

    def __init__(self, block: nn.Module, around: Sequence[nn.Module]) -> None:
        self.block, self.experts = block, [_Expert(m, self) for m in find_shared(around)]
        self.now = _Pass()
        self._hook: Any = None

    @classmethod
    def beside(cls, model: nn.Module, path: str) -> EarlyExperts:
        """Those beside the routed experts called `path`: in their block, or where it stands."""
        block = path.rpartition(".")[0]
        owner = model.get_submodule(block.rpartition(".")[0])
        found = model.get_submodule(block)
        return cls(found, [found] if owner is found else [found, owner])

    def attach(self) -> None:
        """Stand in front of the modules."""
        if not self.experts:
            return
        self._hook = self.block.register_forward_pre_hook(self._enter, with_kwargs=True)
        for expert in self.experts:
            expert.install()

    def detach(self, attempts: Attempts) -> None:
        """Leave no trace on the modules."""
        attempts.take(self.remove)

    def remove(self) -> None:
        """`detach`, by the modules themselves where none is of use."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
        for expert in self.experts:
            expert.remove()

    def launch(self) -> None:
        """Compute what is known to be asked for soon; called once per block call."""
        x, self.now.routed = self.now.x, True
        # Inference tensors do not tell whether they were changed.
        if x is None or torch.is_inference(x):
            return
        for expert in self.experts:
            expert.launch(x)

    def settle(self) -> None:
        """Stop watching where no module turned out to be of use."""
        if not any(expert.early is not False for expert in self.experts):
            self.remove()

    def _enter(self, block: nn.Module, args: Any, kwargs: Any) -> None:
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        for expert in self.experts:
            expert.forget()
        # With gradients, a result computed early would have none.
        self.now.x = None if torch.is_grad_enabled() or block.training else given
        self.now.routed = False


class _Local(threading.local):
    memo: _Memo | None = None


class _Expert:
    """One shared expert. early: whether it reads the block's input last, None until it was seen."""

    def __init__(self, module: nn.Module, block: EarlyExperts) -> None:
        self.module, self.block = module, block
        self.early: bool | None = None
        self.flat = False  # called with [T, D], not with the block's own shape
        self._former: Any = None  # what `forward` on the instance was before, if anything
        self._local = _Local()

    def install(self) -> None:
        self._former = self.module.__dict__.get("forward")
        self._forward = self.module.forward
        self.module.__dict__["forward"] = self._called

    def remove(self) -> None:
        if self.module.__dict__.get("forward") != self._called:
            return
        if self._former is None:
            del self.module.__dict__["forward"]
        else:
            self.module.__dict__["forward"] = self._former

    def launch(self, x: Tensor) -> None:
        if not self.early or self.module.training:
            return
        given = x.reshape(-1, x.shape[-1]) if self.flat else x
        if given.data_ptr() == x.data_ptr():  # a copy would be another input
            self._local.memo = _Memo(given, given._version, self._forward(given))

    def forget(self) -> None:
        self._local.memo = None

    def _called(self, *args: Any, **kwargs: Any) -> Any:
        """Stands for `forward` on the module."""
        memo, self._local.memo = self._local.memo, None
        alone = len(args) == 1 and not kwargs and isinstance(args[0], Tensor)
        if self.early is None:
            self._learn(args[0] if alone else None)
        elif memo is not None and alone and _is_same(memo, args[0]):
            return memo.y
        return self._forward(*args, **kwargs)

    def _learn(self, x: Tensor | None) -> None:
        """Decide by the first call without gradients."""
        now = self.block.now
        if now.x is None:
            return
        self.early = x is not None and now.routed and _reads(x, now.x)
        if self.early and x is not None:
            self.flat = x.shape != now.x.shape
        self.block.settle()


def find_shared(around: Sequence[nn.Module]) -> list[nn.Module]:
    """Children of some modules that are shared experts; their gates are single projections."""
    children = {name: child for module in around for name, child in module.named_children()}
    return [
        child
        for name, child in children.items()
        if "shared" in name
        and not isinstance(child, nn.Linear)
        and any(True for _ in child.parameters())
    ]


def _reads(x: Tensor, given: Tensor) -> bool:
    """Whether x is the block's input, or its tokens in one row."""
    flat = (given.numel() // given.shape[-1], given.shape[-1])
    same = x.data_ptr() == given.data_ptr() and x.dtype == given.dtype
    return same and tuple(x.shape) in (tuple(given.shape), flat) and x.is_contiguous()


def _is_same(memo: _Memo, x: Tensor) -> bool:
    return (
        not torch.is_inference(x)
        and x.data_ptr() == memo.x.data_ptr()
        and x.shape == memo.x.shape
        and x.stride() == memo.x.stride()
        and x.dtype == memo.x.dtype
        and x._version == memo.version == memo.x._version
    )
