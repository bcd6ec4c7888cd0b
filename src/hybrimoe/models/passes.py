"""Whether a forward pass of a model is prefill or decode, from the arguments it is called with."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from hybrimoe.models.releases import SEQUENCE_ENDS, cache_in

DECODE_TOKENS = 8
"""The most that one sequence brings to a pass of decode: its next token, and drafts to verify."""


class Pass(NamedTuple):
    """One forward pass. tokens: of all sequences, padding included.

    is_decode: every sequence has a past, and brings at most DECODE_TOKENS tokens; all else is
    prefill. So a longer continuation of a past is a prompt, and a pass that takes a prompt in
    beside other sequences is prefill. is_new: no sequence has a past.
    """

    tokens: int
    is_decode: bool
    is_new: bool


class _Part(NamedTuple):
    """What one sequence brings."""

    tokens: int
    has_past: bool


def read_pass(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Pass:
    """The pass that a call of `model` makes; to be asked before it, for a pass grows the cache."""
    given = {**dict(zip(_positional(type(model)), args)), **kwargs}  # type: ignore[arg-type]
    batch, length = _size(given, args)
    parts = [part for part in _parts(given, batch, length) if part.tokens]
    return Pass(
        batch * length,
        bool(parts) and all(p.has_past and p.tokens <= DECODE_TOKENS for p in parts),
        not any(part.has_past for part in parts),
    )


@functools.cache
def _positional(model_class: type[nn.Module]) -> tuple[str, ...]:
    """Names of the arguments of `forward` after self."""
    return tuple(inspect.signature(model_class.forward).parameters)[1:]


def _size(given: Mapping[str, Any], args: tuple[Any, ...]) -> tuple[int, int]:
    """Sequences and tokens of each, by the ids [B, T] or the embeddings [B, T, D]."""
    candidates = (given.get("input_ids"), given.get("inputs_embeds"), *args[:1])
    tokens = next((x for x in candidates if isinstance(x, Tensor)), None)
    if tokens is None:
        return 1, 1
    shape = tokens.shape[:-1] if tokens.is_floating_point() else tokens.shape[:2]
    batch, length = (1, 1, *shape)[-2:]
    return batch, length


def _parts(given: Mapping[str, Any], batch: int, length: int) -> Iterable[_Part]:
    positions = given.get("position_ids")
    if batch == 1 and isinstance(positions, Tensor) and positions.shape[-1] == length:
        # The first row: besides text, some models count height and width of images.
        row = positions.reshape(-1, length)[0]
    else:
        row = None
    ends = given.get(SEQUENCE_ENDS[0])
    if ends is not None:
        return _flattened(ends, given.get(SEQUENCE_ENDS[1]), row)
    cache = cache_in(given)
    if cache is None and row is not None:
        row = _without_padding(row, given.get("attention_mask"))
        return _by_positions(row.tolist())  # sync: once per pass without a cache
    return [_Part(length, _has_past(cache))] * batch


def _flattened(ends: Tensor, key_ends: Any, positions: Tensor | None) -> list[_Part]:
    """The sequences that continuous batching lays one after the other; a fill has no tokens."""
    at = ends.tolist()  # sync: once per pass of such a batch
    tokens = [last - first for first, last in zip(at, at[1:])]
    if positions is not None:
        first = positions.tolist()
        return [_Part(n, n > 0 and first[start] > 0) for n, start in zip(tokens, at)]
    if isinstance(key_ends, dict):
        key_ends = key_ends.get("full_attention", next(iter(key_ends.values()), None))
    keys = at if key_ends is None else key_ends.tolist()
    return [_Part(n, last - first > n) for n, first, last in zip(tokens, keys, keys[1:])]


def _without_padding(positions: Tensor, mask: Any) -> Tensor:
    """The positions of what the mask [1, past and tokens] keeps: those of padding mean nothing."""
    if not isinstance(mask, Tensor) or mask.dim() != 2 or mask.shape[1] < len(positions):
        return positions
    return positions[mask[0, -len(positions) :].to(positions.device) != 0]


def _by_positions(positions: list[int]) -> Iterable[_Part]:
    """Sequences in one row without a cache: a new one begins wherever positions do not count on.

    Who keeps the past elsewhere says so by a first position beyond 0.
    """
    if not positions:
        return
    starts = [0, *(n for n in range(1, len(positions)) if positions[n] != positions[n - 1] + 1)]
    for start, end in zip(starts, [*starts[1:], len(positions)]):
        yield _Part(end - start, positions[start] > 0)


def _has_past(cache: Any) -> bool:
    """Whether a cache holds tokens: a static one has its full length from the start, but counts."""
    if not hasattr(cache, "get_seq_length"):
        return bool(cache)  # None, or the tuples of older remote code
    try:
        return int(cache.get_seq_length()) > 0  # sync: a static cache counts on its device
    except ValueError:  # one of states only, which knows no length
        return bool(cache.has_previous_state())
