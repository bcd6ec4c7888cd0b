"""The bytes of every part of a model, from its shapes: experts in each format, dense weights, caches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from hybrimoe.errors import UnsupportedModelError
from hybrimoe.formats.layout import split
from hybrimoe.formats.registry import activation_bytes
from hybrimoe.kernels.cpu.run_layer import LONGEST
from hybrimoe.models.adapters import FoundExperts, find_experts, top_k_of
from hybrimoe.models.forward import ForwardMemory, forward_memory
from hybrimoe.models.skeleton import build_skeleton
from hybrimoe.models.spec import ExpertSpec

SLACK = 1.8
"""What a pass takes over the tensors it makes: kernels reorder keys, values and weights into scratch
of their own, and malloc keeps holes. Measured 1.65 on 4096 tokens, 2 on 2048 of a smaller model."""
BOOKS_BYTES = 2 << 10
"""What Python keeps of one stored tensor while it loads: names, places, shapes."""
KV_TOKEN = 256 << 10
"""Bytes of KV cache per token where nothing tells; Mixtral 8x7B has half."""
STAGING_BYTES = 8 << 20
"""Weights that are read before they are packed: few enough to stay in the cache."""
NO_PASS = ForwardMemory(0, 0, True, 0)


@dataclass(frozen=True)
class Footprint:
    """What a model takes; bytes, for one sequence of `context` tokens.

    dense_bytes: every parameter and buffer that is no routed expert, tied ones once.
    dense_read_bytes: those of them that a decode step reads; a lookup in an embedding reads a row.
    stored: tensors of the checkpoint. streams: whether experts are packed a few at a time as they
    are read; else the loader puts the parameters of a layer together first.
    """

    layers: tuple[ExpertSpec, ...]
    top_k: int
    dense_bytes: int
    dense_read_bytes: int
    context: int
    forward: ForwardMemory
    stored: int = 0
    streams: bool = True

    @property
    def is_prescribed(self) -> bool:
        """Whether the files say how experts are kept."""
        return all(layer.kept for layer in self.layers)

    def keeping(self, weights_of: Callable[[str], str | None]) -> Footprint:
        """The same with the format that files prescribe for the experts of each name."""
        layers = tuple(replace(layer, kept=weights_of(layer.name)) for layer in self.layers)
        return replace(self, layers=layers)

    @property
    def experts(self) -> int:
        """Routed experts in all layers together."""
        return sum(layer.experts for layer in self.layers)

    @property
    def native_bytes(self) -> int:
        """All experts as the checkpoint's dtype has them."""
        return sum(layer.native_bytes for layer in self.layers)

    @property
    def plain_bytes(self) -> int:
        """The most that plain transformers takes: it merges a layer's experts while it loads."""
        loading = max(layer.native_bytes for layer in self.layers)
        running = self.forward.cache_bytes + self.activation_bytes
        return self.dense_bytes + self.native_bytes + max(loading, running)

    @property
    def activation_bytes(self) -> int:
        """What a prompt of `context` tokens takes besides the KV cache."""
        return round(SLACK * self.forward.activation_bytes)

    def packed_bytes(self, weights: str) -> int:
        """All experts in the pool."""
        return sum(layer.packed_bytes(weights) for layer in self.layers)

    def expert_bytes(self, weights: str) -> int:
        """The largest packed expert, which is the size of a slot."""
        return max(layer.layout(weights).expert_bytes for layer in self.layers)

    def workspace_bytes(self, weights: str) -> int:
        """Scratch of the expert kernels for their longest launch; all layers share it."""
        tokens = min(self.context, LONGEST)
        return max(self._workspace(layer, weights, tokens) for layer in self.layers)

    def loader_bytes(self) -> int:
        """What loading takes besides the model."""
        arriving = max(layer.native_bytes for layer in self.layers)
        return self.stored * BOOKS_BYTES + (STAGING_BYTES if self.streams else arriving)

    def left_bytes(self) -> int:
        """What loading leaves behind."""
        return self.stored * BOOKS_BYTES

    def streamed_bytes(self, weights: str) -> int:
        """The most that loading takes when experts are packed on arrival."""
        return self.dense_bytes + self.packed_bytes(weights) + self.loader_bytes()

    def wrapped_bytes(self, weights: str) -> int:
        """The most that wrapping a loaded model takes: it gives back each layer as it goes."""
        held, most = self.dense_bytes + self.native_bytes, 0
        for layer in self.layers:
            most = max(most, held + layer.packed_bytes(weights))
            held += layer.packed_bytes(weights) - layer.native_bytes
        return most

    def _workspace(self, layer: ExpertSpec, weights: str, tokens: int) -> int:
        layout, k = layer.layout(weights), self.top_k
        up, down = split(layer.fmt(weights))
        x, h = activation_bytes(up, layout.hidden), activation_bytes(down, layout.inner)
        return tokens * (x + k * (h + 8) + 4 * layout.hidden)


def footprint_of(
    model: Any, context: int, skeleton: Any = None, kept: dict[str, Any] | None = None
) -> Footprint:
    """Count a model, on the meta device or a loaded one.

    skeleton: the same model on the meta device, which the forward pass is traced on and which is of
    no use afterwards; None takes `model`. kept: names of parameters that stay in another dtype.
    """
    counted = footprint_to_load(model, kept)
    skeleton = model if skeleton is None else skeleton
    forward = forward_memory(skeleton, find_experts(skeleton), context)
    return replace(counted, context=context, forward=forward)


def cache_bytes(model: Any, tokens: int) -> int:
    """The KV cache of one sequence of so many tokens, as `plan` counts it: traced on a skeleton of the
    model. A stated size where transformers cannot build one, as for classes it does not know.
    """
    if not hasattr(type(model), "_from_config"):
        return KV_TOKEN * tokens
    try:
        skeleton = build_skeleton(model.config, next(model.parameters()).dtype, type(model))
        return forward_memory(skeleton, find_experts(skeleton), tokens).cache_bytes
    except UnsupportedModelError:
        return KV_TOKEN * tokens


def footprint_to_load(
    model: Any, kept: dict[str, Any] | None = None, found: list[FoundExperts] | None = None
) -> Footprint:
    """The weights alone, for no tokens: what a load can be judged by, and counted in no time."""
    found = find_experts(model) if found is None else found
    layers = tuple(experts.spec for experts in found)
    inside = {id(p) for experts in found for p in experts.parameters()}
    dense = [(n, t) for n, t in _tensors(model) if id(t) not in inside]
    sizes = {id(t): _bytes(name, t, kept or {}) for name, t in dense}
    everything = sum(sizes.values())
    read = everything - sum(sizes.get(id(t), 0) for t in _looked_up(model))
    return Footprint(layers, top_k_of(model), everything, read, 0, NO_PASS)


def _tensors(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and buffers by name, tied ones once."""
    return [*model.named_parameters(), *model.named_buffers()]


def _bytes(name: str, tensor: Tensor, kept: dict[str, Any]) -> int:
    wide = next((dtype for part, dtype in kept.items() if part in name), tensor.dtype)
    item = wide.itemsize if tensor.is_floating_point() else tensor.dtype.itemsize
    return tensor.numel() * item


def _looked_up(model: Any) -> list[Tensor]:
    """Embeddings of which a token reads one row, unless the output head is tied to them."""
    tied = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head = getattr(tied, "weight", None)
    tables = (m.weight for m in model.modules() if isinstance(m, nn.Embedding))
    return [table for table in tables if table is not head]
