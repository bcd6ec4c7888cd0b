"""What differs between releases of transformers: which were tested, and the names that changed.

Whoever needs such a name takes it from here, so that a new release is met in one place.
"""

from __future__ import annotations

import functools
import importlib.metadata
import inspect
import re
import warnings
from collections.abc import Mapping
from typing import Any

OLDEST, NEWEST, BELOW = (5, 7), (5, 24), (6, 0)
"""Releases the tests ran on, first and last, and the first that is known not to work."""
CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""The cache, as an argument and in the output of a model: `cache` from 5.24 on. The others are what
earlier releases say; 5.24 takes them too, and warns whenever they are read."""
SEQUENCE_ENDS = "cu_seq_lens_q", "cu_seq_lens_k"
"""Where the sequences of a flattened batch end, in 5.7 to 5.24. The keys' may be a dict from the kind
of a layer to such a tensor; from 5.24 on it always is, in continuous batching."""
CONVERTER_STATE = ("scope_prefix", "base_model_prefix", "force_cpu")
"""What a weight converter holds besides its patterns and operations; in 5.7 it holds none of these."""


def release_of(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def release_text(release: tuple[int, ...]) -> str:
    """A release as people write it."""
    return ".".join(map(str, release))


def cache_in(named: Mapping[str, Any]) -> Any:
    """The cache among the arguments or in the output of a model, under whatever name; None if none."""
    names = set(named.keys())  # asking an output for an old name would warn
    found = (named[name] for name in CACHE_NAMES if name in names)
    return next((cache for cache in found if cache is not None), None)


def cache_argument(model: Any, cache: Any) -> dict[str, Any]:
    """The cache, as the argument that the installed release calls it; for tests and benchmarks."""
    names = inspect.signature(model.forward).parameters
    return {next(name for name in CACHE_NAMES if name in names): cache}


def untested(version: str) -> str | None:
    """What to know about a release of transformers that came after the tests; None before."""
    if not NEWEST < release_of(version) < BELOW:
        return None
    return (
        f"transformers {version} is newer than {release_text(NEWEST)}, the newest release hybrimoe "
        "was tested with"
    )


@functools.cache
def warn_if_untested() -> None:
    """Say so, once per process, if the installed transformers is newer than the tested ones."""
    message = untested(importlib.metadata.version("transformers"))
    if message is not None:
        warnings.warn(
            f"{message}: compare hybrimoe.verify(model), or pip install "
            f"'transformers=={release_text(NEWEST)}.*'",
            RuntimeWarning,
            stacklevel=2,
        )
