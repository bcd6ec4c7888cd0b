"""What one forward pass allocates, counted without allocating it.

The model runs on the meta device, where tensors have shapes and no memory, and every storage that an
operation makes is counted until it dies. That gives the KV cache and the activations of any family,
sliding windows, latent attention and recurrent states included, with no formula per family.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hybrimoe.models.adapters import FoundExperts
from hybrimoe.models.releases import cache_in


class ForwardMemory(NamedTuple):
    """Bytes of one sequence: what its cache keeps, and what a pass over all of it needs besides.

    traced: False where the pass cannot run without data and a formula stands in for it.
    operations: of torch in one pass, experts left out.
    """

    cache_bytes: int
    activation_bytes: int
    traced: bool
    operations: int


def forward_memory(model: Any, found: list[FoundExperts], tokens: int) -> ForwardMemory:
    """What a prompt of so many tokens takes; `model` is on the meta device, its experts are replaced."""
    for experts in found:
        setattr(experts.parent, experts.attribute, _Shapes(experts.module))
    live = _Live([*model.parameters(), *model.buffers()])
    try:
        with ExitStack() as stack:
            for mode in (torch.no_grad(), _Attention(), live):
                stack.enter_context(mode)  # type: ignore[arg-type]
            output = model(**_inputs(model, tokens))
            cache = storage_bytes(cache_in(output))
    except (NotImplementedError, RuntimeError, ValueError, TypeError, AttributeError, IndexError):
        return _by_formula(model, tokens)
    return ForwardMemory(cache, max(live.peak - cache, 0), True, live.operations)


def _inputs(model: Any, tokens: int) -> dict[str, Any]:
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    inputs = {"input_ids": ids, "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        inputs["logits_to_keep"] = 1  # as generate asks for
    return inputs


def _by_formula(model: Any, tokens: int) -> ForwardMemory:
    """Keys and values of every head in every layer; ten hidden states, fifty operations a layer."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    pairs = 2 * (getattr(config, "num_key_value_heads", None) or heads) * width
    item = next(model.parameters()).dtype.itemsize
    cache = config.num_hidden_layers * pairs * tokens * item
    hidden = tokens * config.hidden_size * item
    return ForwardMemory(cache, 10 * hidden, False, 50 * config.num_hidden_layers)


class _Shapes(nn.Module):
    """Stands for routed experts, whose loops need real routing: same shape out as in."""

    def __init__(self, original: nn.Module) -> None:
        super().__init__()
        self.__dict__["original"] = original

    def forward(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        return torch.empty_like(hidden_states)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["original"], name)


class _Live(TorchDispatchMode):
    """Counts the bytes of storages between their first and last use."""

    def __init__(self, given: list[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = self.operations = 0
        self._sizes = {tensor.untyped_storage()._cdata: 0 for tensor in given}

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        self.operations += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.now -= self._sizes.pop(key, 0)


class _Attention(TorchFunctionMode):
    """Lets scaled_dot_product_attention make its output only.

    On real devices it is a fused kernel; on the meta device torch would take it apart, and count a
    score for every pair of tokens.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is nn.functional.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            value = args[2] if len(args) > 2 else kwargs["value"]
            return query.new_empty(*query.shape[:-1], value.shape[-1])
        return function(*args, **kwargs)


def storage_bytes(root: Any) -> int:
    """Bytes of all tensors reachable from a cache, each storage once."""
    sizes = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(root)}
    return sum(sizes.values())


def _tensors(root: Any) -> Iterator[Tensor]:
    pending, seen = [root], set()
    while pending:
        item = pending.pop()
        if id(item) in seen or isinstance(item, type | nn.Module):
            continue
        seen.add(id(item))
        if isinstance(item, Tensor):
            yield item
        elif isinstance(item, dict):
            pending += item.values()
        elif isinstance(item, list | tuple | set):
            pending += item
        elif type(item).__module__.startswith("transformers.") and not hasattr(item, "to_dict"):
            pending += vars(item).values()
