"""Sizes as they are given: memory budgets in bytes, "10GiB" or a fraction, and experts per layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hybrimoe.errors import ConfigError

UNITS = {"": 1, "b": 1} | {
    unit: size
    for power, letter in enumerate("kmgt", start=1)
    for unit, size in ((f"{letter}b", 1000**power), (f"{letter}ib", 1024**power))
}


def parse_size(name: str, value: float | str) -> int | float:
    """Bytes as int, or a fraction in (0, 1] as float, from 123, 0.25, "10GiB", "800MB" or "0.25".

    Text without a unit is read as the number it spells. Raises ConfigError naming the argument.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ConfigError(f"{name} must be bytes, a fraction or a size like '10GiB', got {value!r}")
    if isinstance(value, str):
        return _parse_text(name, value)
    if (isinstance(value, int) and value > 0) or (isinstance(value, float) and 0 < value <= 1):
        return value
    raise ConfigError(f"{name} must be positive bytes or a fraction in (0, 1], got {value!r}")


def expert_budget(vram: int | float | str, everything: int) -> float:
    """Bytes meant by `vram` where all experts take `everything` bytes; 0 is allowed.

    A hair more than a fraction asks for, so that 0.25 of 768 experts is 192 despite rounding.
    """
    if vram == 0 and not isinstance(vram, (bool, str)):
        return 0
    size = parse_size("vram", vram)
    return size * everything * (1 + 1e-12) if isinstance(size, float) else size


def expert_counts(layers: int, experts: int | Sequence[int] | npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[L] int64 experts of each layer, of one number for all or of one for each."""
    counts: npt.NDArray[Any] = np.asarray(experts, np.int64)
    if layers < 1 or counts.shape not in ((), (layers,)) or counts.min() < 1:
        raise ConfigError(
            f"layers and experts must be positive, got {layers} and {counts.tolist()}"
        )
    return np.broadcast_to(counts, layers).copy()


def _parse_text(name: str, text: str) -> int | float:
    number = text.strip().lower().rstrip("bikmgt ")
    unit = text.strip().lower()[len(number) :].strip()
    try:
        value = float(number)
        size = value * UNITS[unit]
    except (ValueError, KeyError):
        value = size = math.nan
    fraction = not unit and "." in number  # there are no half bytes
    if fraction and 0 < value <= 1:
        return value
    if fraction or not 1 <= size < math.inf:
        raise ConfigError(
            f"{name} must be a size like '10GiB' or '800MB', bytes or a fraction, got {text!r}"
        )
    return int(size)


def size_text(size: float) -> str:
    """Bytes for people, such as "12.3 GiB"."""
    for unit in ("B", "KiB", "MiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} GiB"
