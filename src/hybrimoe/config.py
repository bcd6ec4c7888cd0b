"""What a user may choose, checked once."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from hybrimoe.errors import ConfigError
from hybrimoe.policy.engine import Policies
from hybrimoe.policy.prefetcher import Prefetcher
from hybrimoe.policy.presets import preset
from hybrimoe.policy.ranking import Ranking
from hybrimoe.policy.scheduler import Scheduler

WEIGHTS = ("native", "int8", "int4")
DEVICES = ("auto", "cpu", "cuda", "emulated")
POLICY_TYPES = {"scheduler": Scheduler, "cache": Ranking, "prefetcher": Prefetcher}
SCHEMA = 1


@dataclass(frozen=True)
class Config:
    """Every choice `wrap` offers.

    device: where experts may run besides the CPU: "cpu" nowhere, "cuda" on that GPU, "emulated" on an
        accelerator that shares the CPU's cores and proves results, not speed; "auto" takes a GPU
        if there is one.
    vram: budget for expert slots on the accelerator: bytes, "10GiB" or a fraction of all experts;
        None is a quarter of them.
    weights: how experts are kept: "native" is lossless, "int8" and "int4" round in groups of 32.
    scheduler, cache, prefetcher: policy objects (a Scheduler, a Ranking, a Prefetcher) that replace
        those of the preset.
    preset: a named set of policies; None is "hybrimoe".
    threads: CPU threads for experts; None takes torch's number, at most one per usable core.
    deterministic: placement depends on routing alone, never on timing.
    """

    device: str = "auto"
    vram: int | float | str | None = None
    weights: str = "native"
    scheduler: Any = None
    cache: Any = None
    prefetcher: Any = None
    preset: str | None = None
    threads: int | None = None
    deterministic: bool = False

    def __post_init__(self) -> None:
        _one_of("weights", self.weights, WEIGHTS)
        _one_of("device", self.device, DEVICES)
        if self.preset is not None:
            preset(self.preset)
        for name, kind in POLICY_TYPES.items():
            _instance(name, getattr(self, name), kind)
        if self.threads is not None and not _is_count(self.threads):
            raise ConfigError(f"threads must be a positive integer or None, got {self.threads!r}")
        if not isinstance(self.deterministic, bool):
            raise ConfigError(f"deterministic must be a bool, got {self.deterministic!r}")
        if self.vram is not None:
            parse_size("vram", self.vram)
        for name in ("vram", "preset", *POLICY_TYPES):
            if self.device == "cpu" and getattr(self, name) is not None:
                raise ConfigError(
                    f"{name} needs an accelerator, but device='cpu' runs every expert on the CPU; "
                    f"leave it out, got {getattr(self, name)!r}"
                )

    def policies(self) -> Policies:
        """The preset's policies, with those given replaced."""
        chosen = preset(self.preset or "hybrimoe")
        return Policies(
            self.scheduler or chosen.scheduler,
            self.cache or chosen.ranking,
            self.prefetcher or chosen.prefetcher,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON, with a schema version; policy objects do not travel."""
        return {"schema_version": SCHEMA, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`; an unknown key or schema is an error that names it."""
        values = dict(values)
        schema = values.pop("schema_version", SCHEMA)
        if schema != SCHEMA:
            raise ConfigError(f"schema_version must be {SCHEMA}, got {schema!r}")
        return cls(**_known(cls, values))

    def replace(self, **overrides: Any) -> Config:
        """A copy with some fields changed; an unknown field is an error that names it."""
        return dataclasses.replace(self, **_known(type(self), overrides))


def parse_size(name: str, value: float | str) -> int | float:
    """Bytes as int, or a fraction in (0, 1] as float, from 123, 0.25, "10GiB" or "800MB"."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise ConfigError(f"{name} must be bytes, a fraction or a size like '10GiB', got {value!r}")
    if isinstance(value, str):
        return _parse_text(name, value)
    if isinstance(value, int) and value > 0:
        return value
    if isinstance(value, float) and 0 < value <= 1:
        return value
    raise ConfigError(f"{name} must be positive bytes or a fraction in (0, 1], got {value!r}")


def _parse_text(name: str, text: str) -> int:
    units = {"": 1, "b": 1}
    for power, letter in enumerate("kmgt", start=1):
        units[f"{letter}b"], units[f"{letter}ib"] = 1000**power, 1024**power
    number = text.strip().lower().rstrip("bikmgt ")
    unit = text.strip().lower()[len(number) :].strip()
    try:
        size = float(number) * units[unit]
    except (ValueError, KeyError):
        size = math.nan
    if not 1 <= size < math.inf:
        raise ConfigError(f"{name} must be a size like '10GiB' or '800MB', got {text!r}")
    return int(size)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ConfigError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _instance(name: str, value: Any, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        raise ConfigError(f"{name} must be a {kind.__name__}, got {value!r}")


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _known(cls: type, values: dict[str, Any]) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(cls)]
    for key in values:
        if key not in names:
            raise ConfigError(f"{key} is no setting of hybrimoe; known are {', '.join(names)}")
    return values
