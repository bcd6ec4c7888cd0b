"""What a user may choose, checked once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from hybrimoe.choices import DEVICES as DEVICES
from hybrimoe.choices import METHOD
from hybrimoe.errors import ConfigError
from hybrimoe.formats.registry import FORMATS, choices, rounded
from hybrimoe.policy.engine import Policies
from hybrimoe.policy.prefetchers import Prefetcher
from hybrimoe.policy.presets import preset
from hybrimoe.policy.rankings import Ranking
from hybrimoe.policy.schedulers import Scheduler
from hybrimoe.sizes import parse_size

POLICY_TYPES = {"scheduler": Scheduler, "cache": Ranking, "prefetcher": Prefetcher}
SCHEMA = 1
MOST_THREADS = 1024
"""More than any machine that this was tried on; some hundred thousand end the process."""


@dataclass(frozen=True)
class Config:
    """Every choice `wrap` offers.

    device: where experts may run besides the CPU: "cpu" nowhere, "cuda" on that GPU, "emulated" on an
        accelerator that shares the CPU's cores and proves results, not speed; "auto" takes a GPU
        if there is one.
    vram: budget for expert slots on the accelerator: bytes, "10GiB" or a fraction of all experts;
        None is what is free once the dense part is there, less room for the KV cache of
        `max_new_tokens` and for workspace. The emulated accelerator has no memory of its own: there
        None is a quarter of the experts.
    ram: budget for packed experts in host memory: bytes, "10GiB" or a fraction of all experts. The
        others stay on disk, and are read when they are asked for. None keeps all of them in RAM.
        Dense weights, cache and workspace come on top; `plan(ram=)` is for the whole model.
    spill: folder on a disk for the temporary file of experts beyond `ram`; None is the system's
        folder for such files. Experts loaded from a `save_packed` folder are read from there.
    max_new_tokens: tokens, prompts included, whose KV cache `vram=None` leaves room for; beyond
        them slots are given up as the KV cache grows.
    weights: how experts are kept: "native" is lossless, "int8" and "int4" round in groups of 32.
        What a GGUF file prescribes, and differs by layer or is of a K type, counts as "native".
    linear: "int8" or "int4" packs the dense layers too, for models that run on the CPU alone; the
        output head stays at int8, and norms of few tokens become one kernel call each. None leaves
        them as they are.
    scheduler, cache, prefetcher: policy objects (a Scheduler, a Ranking, a Prefetcher) that replace
        those of the preset.
    preset: a named set of policies; None is "hybrimoe".
    strict: a policy of yours that raises or returns nonsense is a PolicyError; without it the default
        takes its place, with one warning. Tokens are right in both cases.
    threads: CPU threads for experts; None takes torch's number, at most one per usable core.
    deterministic: placement depends on routing alone, never on timing.
    trace: keep every span of work, predicted and measured, for `model.hybrimoe.export_trace`.
    """

    device: str = "auto"
    vram: int | float | str | None = None
    ram: int | float | str | None = None
    spill: str | None = None
    max_new_tokens: int = 4096
    weights: str = "native"
    linear: str | None = None
    scheduler: Any = None
    cache: Any = None
    prefetcher: Any = None
    preset: str | None = None
    strict: bool = False
    threads: int | None = None
    deterministic: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        _check_weights(self.weights)
        _one_of("device", self.device, DEVICES)
        if self.linear is not None:
            _one_of("linear", self.linear, rounded())
        if self.preset is not None:
            if not isinstance(self.preset, str):
                raise ConfigError(f"preset must be a name or None, got {self.preset!r}")
            preset(self.preset)
        for name, kind in POLICY_TYPES.items():
            _instance(name, getattr(self, name), kind)
        if not _is_count(self.max_new_tokens):
            raise ConfigError(
                f"max_new_tokens must be a positive integer, got {self.max_new_tokens!r}"
            )
        check_threads(self.threads)
        for name in ("strict", "deterministic", "trace"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"{name} must be a bool, got {getattr(self, name)!r}")
        for name in ("vram", "ram"):
            if getattr(self, name) is not None:
                parse_size(name, getattr(self, name))
        if self.spill is not None and not (isinstance(self.spill, str) and self.spill):
            raise ConfigError(f"spill must be the path of a folder or None, got {self.spill!r}")
        if self.linear is not None and self.device in ("cuda", "emulated"):
            raise ConfigError(
                f"linear packs dense layers for the CPU, but with device={self.device!r} they run "
                f"there; leave it out, got {self.linear!r}"
            )
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

    @property
    def leaves_policies_open(self) -> bool:
        """Whether the user asked for no policy in particular, so that the fastest may be taken."""
        given = any(getattr(self, name) is not None for name in POLICY_TYPES)
        return not given and self.preset in (None, "hybrimoe")

    @property
    def quant_method(self) -> str:
        """The name by which transformers finds our loader for `quantization_config=Config(...)`."""
        return METHOD

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


def _check_weights(value: Any) -> None:
    if isinstance(value, str) and value in FORMATS and FORMATS[value].pack is None:
        raise ConfigError(
            f"weights={value!r} is available only when loading a GGUF file that stores it"
        )
    _one_of("weights", value, choices())


def check_threads(threads: Any) -> None:
    """Raise ConfigError unless so many threads can be started; None is all cores."""
    if threads is not None and not _is_count(threads):
        raise ConfigError(f"threads must be a positive integer or None, got {threads!r}")
    if threads is not None and threads > MOST_THREADS:
        raise ConfigError(f"threads must be at most {MOST_THREADS}, got {threads}")


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
            raise ConfigError(f"unknown setting {key!r}; settings are: {', '.join(names)}")
    return values
