"""Seconds per lane as a function of tokens and bytes, alone and while the other lanes are busy.

    cpu(n) = first + a + b * n        gpu(n) = max(read, c * n) + launch
    link(bytes) = latency + bytes / bandwidth

`first` is paid once per layer that uses the CPU, `a` per expert, `b` per token of an expert; a GPU's
own `first` is part of when its lane is free. CPU experts and copies read the same memory, so both
have a second, contended number.
"""

import dataclasses
import json
import math
import os
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe.errors import ProfileError
from hybrimoe.files import write_atomically
from hybrimoe.policy.timeline import Array, Lane, Span

VERSION = 1
# Places in CostModel.vector, the form in which compiled planners read a cost model.
FIRST, EXPERT, TOKEN, EXPERT_CONTENDED, READ, GPU_TOKEN, LAUNCH = 0, 1, 2, 3, 4, 5, 6
LATENCY, LOAD, LOAD_CONTENDED, SHARDS = 7, 8, 9, 10
READING = ("cpu_expert", "cpu_expert_contended", "gpu_read")
"""Seconds that grow with the bytes of an expert."""
ARITHMETIC = ("cpu_token", "gpu_token")
"""Seconds that grow with its multiply-adds."""
MAY_BE_ZERO = {
    "cpu_first",
    "cpu_token",
    "gpu_token",
    "gpu_launch",
    "gpu_first",
    "link_latency",
    "dense_read",
    "dense_token",
    "dense_launch",
    "plan_s",
    "forecast_s",
}


@dataclass(frozen=True)
class CostModel:
    """What one expert of one shape and format costs on one machine.

    cpu_first: seconds once per layer when any expert runs on the CPU.
    cpu_expert: seconds to read one expert's weights on the CPU; cpu_token: more per token.
    gpu_read: seconds to read one expert on the GPU; gpu_token: per token, once that is more.
    gpu_launch: host and launch seconds per expert on the GPU; gpu_first: once per layer.
    link_latency, link_bandwidth: one copy; bytes per second.
    expert_bytes: size of one expert; shards: the equal parts it may be divided into.
    cpu_expert_contended: `cpu_expert` while the link copies; link_bandwidth_contended: the reverse.
    dense_read, dense_token, dense_launch: all other work of a layer on the GPU, same law.
    plan_s, forecast_s: host seconds for planning a layer, and for each layer that it looks ahead.
    source: for people, where the numbers come from.
    layers: the models of the layers' own experts where they differ, and this one is the largest's;
        empty where all layers are alike. Not kept in files.
    Derived: load_s, one expert over the link; contention_s, what that adds to CPU work beside it.
    """

    cpu_first: float
    cpu_expert: float
    cpu_token: float
    gpu_read: float
    gpu_token: float
    gpu_launch: float
    link_latency: float
    link_bandwidth: float
    expert_bytes: int
    cpu_expert_contended: float
    link_bandwidth_contended: float
    shards: int = 4
    gpu_first: float = 0.0
    dense_read: float = 0.0
    dense_token: float = 0.0
    dense_launch: float = 0.0
    plan_s: float = 0.0
    forecast_s: float = 0.0
    source: str = field(default="", compare=False)
    layers: tuple["CostModel", ...] = field(default=(), repr=False, compare=False)
    vector: Array = field(init=False, repr=False, compare=False)
    load_s: float = field(init=False, repr=False, compare=False)
    contention_s: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for item in _fields():
            _check(item.name, getattr(self, item.name))
        slower = 1 - self.cpu_expert / max(self.cpu_expert_contended, self.cpu_expert)
        object.__setattr__(self, "vector", self._vector())
        object.__setattr__(self, "load_s", self.link(self.expert_bytes))
        object.__setattr__(self, "contention_s", self.load_s * slower)

    def of(self, layer: int) -> "CostModel":
        """What an expert of this layer costs."""
        return self.layers[layer] if self.layers else self

    def scaled(self, size: int, shards: int, arithmetic: float) -> "CostModel":
        """The model of an expert of `size` bytes and so many shards on the same machine.

        arithmetic: its multiply-adds per token, as a share of this expert's.
        """
        reading = size / self.expert_bytes
        read = {name: getattr(self, name) * reading for name in READING}
        tokens = {name: getattr(self, name) * arithmetic for name in ARITHMETIC}
        return dataclasses.replace(
            self, expert_bytes=size, shards=shards, layers=(), **read, **tokens
        )

    def cpu(self, tokens: int, first: bool = True, contended: bool = False) -> float:
        """Seconds for one expert on the CPU."""
        expert = self.cpu_expert_contended if contended else self.cpu_expert
        return (self.cpu_first if first else 0.0) + expert + self.cpu_token * tokens

    def gpu(self, tokens: int) -> float:
        """Seconds for one resident expert on the GPU."""
        return max(self.gpu_read, self.gpu_token * tokens) + self.gpu_launch

    def link(self, size: int, contended: bool = False) -> float:
        """Seconds for one copy of `size` bytes to the GPU."""
        bandwidth = self.link_bandwidth_contended if contended else self.link_bandwidth
        return self.link_latency + size / bandwidth

    def dense(self, tokens: int) -> float:
        """Seconds for everything in a layer that is not a routed expert."""
        return max(self.dense_read, self.dense_token * tokens) + self.dense_launch

    def refined(self, spans: Iterable[Span], weight: float = 0.1) -> "CostModel":
        """This model moved towards measured spans: each lane is scaled by what it was wrong by.

        That is the median over its spans, which an interruption leaves alone. weight: 0 keeps the
        model, 1 believes the spans. Layers of their own cost are scaled alike.
        """
        errors: dict[Lane, list[float]] = {Lane.CPU: [], Lane.GPU: [], Lane.LINK: []}
        for span in spans:
            if span.seconds > 0 and span.lane is not Lane.POLICY:
                predicted = _predict(self.of(span.layer), span)
                if predicted > 0:
                    errors[span.lane].append(span.seconds / predicted)
        factor = {lane: statistics.median(e) ** weight for lane, e in errors.items() if e}
        cpu, gpu, link = (factor.get(lane, 1.0) for lane in (Lane.CPU, Lane.GPU, Lane.LINK))
        layers = tuple(layer._moved(cpu, gpu, link) for layer in self.layers)
        return dataclasses.replace(self._moved(cpu, gpu, link), layers=layers)

    def _moved(self, cpu: float, gpu: float, link: float) -> "CostModel":
        """This model with the seconds of each lane times a factor."""
        scaled = {name: getattr(self, name) * cpu for name in _names("cpu_")}
        scaled |= {name: getattr(self, name) * gpu for name in _names("gpu_")}
        scaled |= {name: getattr(self, name) / link for name in _names("link_bandwidth")}
        return dataclasses.replace(self, **scaled, link_latency=self.link_latency * link)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers by field name, with the version of the layout."""
        return {"version": VERSION} | {f.name: getattr(self, f.name) for f in _fields()}

    @classmethod
    def from_dict(cls, numbers: dict[str, Any]) -> "CostModel":
        """The reverse of `to_dict`; an unknown, missing or impossible number is refused."""
        if numbers.get("version") != VERSION:
            raise ProfileError(f"version must be {VERSION}, got {numbers.get('version')!r}")
        known = {item.name for item in _fields()}
        given = set(numbers) - {"version"}
        required = {f.name for f in _fields() if f.default is dataclasses.MISSING}
        for name in sorted(given - known):
            raise ProfileError(f"{name} is no field of a cost model, got {numbers[name]!r}")
        for name in sorted(required - given):
            raise ProfileError(f"{name} is missing")
        return cls(**{name: numbers[name] for name in given})

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON; a reader sees the old file or the new one, never a part."""
        write_atomically(Path(path), json.dumps(self.to_dict(), indent=2).encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CostModel":
        """Read what `save` wrote."""
        try:
            numbers = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ProfileError(f"{path} is not JSON: {error}") from error
        if not isinstance(numbers, dict):
            raise ProfileError(f"{path} must hold one JSON object, got {type(numbers).__name__}")
        return cls.from_dict(numbers)

    def _vector(self) -> Array:
        numbers = [self.cpu_first, self.cpu_expert, self.cpu_token, self.cpu_expert_contended]
        numbers += [self.gpu_read, self.gpu_token, self.gpu_launch, self.link_latency]
        numbers += [self.expert_bytes / self.link_bandwidth]
        numbers += [self.expert_bytes / self.link_bandwidth_contended, self.shards]
        return np.array(numbers, np.float64)


def _fields() -> list["dataclasses.Field[Any]"]:
    """All that a file holds."""
    return [f for f in dataclasses.fields(CostModel) if f.init and f.name != "layers"]


def _names(prefix: str) -> list[str]:
    return [item.name for item in _fields() if item.name.startswith(prefix)]


def _check(name: str, value: Any) -> None:
    if name == "source":
        if not isinstance(value, str):
            raise ProfileError(f"source must be a text, got {value!r}")
        return
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not number or not math.isfinite(value):
        raise ProfileError(f"{name} must be a finite number, got {value!r}")
    if value < 0 or (value == 0 and name not in MAY_BE_ZERO):
        rule = "at least 0" if name in MAY_BE_ZERO else "positive"
        raise ProfileError(f"{name} must be {rule}, got {value!r}")


def _predict(cost: CostModel, span: Span) -> float:
    if span.lane is Lane.LINK:
        return cost.link(span.bytes)
    if span.lane is Lane.CPU:
        return cost.cpu_first + cost.cpu_expert * span.experts + cost.cpu_token * span.tokens
    return cost.gpu_first + span.experts * cost.gpu(
        math.ceil(span.tokens / max(span.experts, 1e-9))
    )
