"""How many experts the accelerator may hold: at the start, under pressure, and after a failure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch

from hybrimoe.errors import ConfigError, InsufficientMemoryError
from hybrimoe.policy.engine import Engine
from hybrimoe.policy.presets import preset
from hybrimoe.policy.routing import Forecast, Load
from hybrimoe.policy.scheduler import Plan
from hybrimoe.policy.sizes import expert_budget
from hybrimoe.runtime.adapters import text_config
from hybrimoe.runtime.devices.device import Accelerator
from hybrimoe.runtime.executor import TorchExecutor

T = TypeVar("T")
OUT_OF_MEMORY = (torch.OutOfMemoryError, InsufficientMemoryError)
LEAST_WORKSPACE, MOST_WORKSPACE = 1 << 30, 4 << 30
KV_TOKEN = 256 << 10
"""Bytes of KV cache per token where the model's configuration does not tell; Mixtral 8x7B has half."""
SPARE = 3
"""Slots of the slab besides those of the budget: two that experts pass through, one that stays empty."""
SHARE = 0.25
"""Of the experts, on an accelerator whose memory has no limit."""


class Experts(NamedTuple):
    """What slots are counted by. expert_bytes is the largest expert's, as every slot fits any."""

    number: int  # in all layers
    layers: int
    expert_bytes: int


@dataclass(frozen=True)
class Reserve:
    """Bytes that slots leave alone. kv: for the KV cache; workspace: for everything else."""

    kv: int
    workspace: int


@dataclass(frozen=True)
class Shrink:
    """One time that slots were given up."""

    before: int
    after: int
    reason: str


def kv_bytes(model: Any, tokens: int) -> int:
    """Bytes of the KV cache of so many tokens: an upper bound from the model's configuration, and a
    guess where it has none.

    Layers with a sliding window count as far as it reaches. Compressed keys count expanded, as some
    releases of transformers store them; layers that keep a fixed state count like the others.
    """
    config, parameter = text_config(model), next(model.parameters(), None)
    dtype = torch.float32 if parameter is None else parameter.dtype
    layers, every = (_number(config, n) for n in ("num_hidden_layers", "num_attention_heads"))
    key, value = _number(config, "qk_head_dim"), _number(config, "v_head_dim")
    if not key:
        key = _number(config, "qk_nope_head_dim") + _number(config, "qk_rope_head_dim")
    heads = every
    if not key or not value:
        key = value = _number(config, "head_dim") or _number(config, "hidden_size") // max(every, 1)
        heads = _number(config, "num_key_value_heads") or every
    if not (layers and heads and key):
        return KV_TOKEN * tokens
    kinds = getattr(config, "layer_types", None) or []
    sliding = sum("sliding" in kind for kind in kinds[:layers])
    window = min(_number(config, "sliding_window") or tokens, tokens)
    # Windows are short, so some models give these layers more and wider heads.
    wide = _number(config, "swa_num_key_value_heads") or every
    deep = max(key + value, 2 * _number(config, "swa_head_dim"))
    elements = (layers - sliding) * tokens * heads * (key + value)
    return int((elements + sliding * window * wide * deep) * dtype.itemsize)


def reserve(free: int, kv: int) -> Reserve:
    """What slots leave alone of so much free memory: a tenth besides the KV cache, 1 to 4 GiB."""
    return Reserve(kv, min(max(free // 10, LEAST_WORKSPACE), MOST_WORKSPACE))


def slot_count(
    vram: int | float | str | None, experts: Experts, free: int | None, kept: Reserve
) -> int:
    """Expert slots of a budget, at most one per expert; raises ConfigError below one per layer.

    free: bytes of the accelerator, None for no limit. With vram=None what is free decides, and 0
    means that there is no room for one slot per layer.
    """
    if vram is None and free is None:
        return max(int(SHARE * experts.number), experts.layers)
    if vram is None:
        assert free is not None
        slots = (free - kept.kv - kept.workspace) // experts.expert_bytes - SPARE
        return min(slots, experts.number) if slots >= experts.layers else 0
    everything = experts.number * experts.expert_bytes
    slots = int(expert_budget(vram, everything) // experts.expert_bytes)
    if slots < experts.layers:
        raise ConfigError(
            f"vram must hold at least one expert of {experts.expert_bytes} bytes per layer, that is "
            f"{experts.layers * experts.expert_bytes} bytes for {experts.layers} layers, got {vram!r}, "
            f"which holds {slots}"
        )
    return min(slots, experts.number)


class SlotMemory:
    """Keeps the slots of an engine within what its accelerator has; the caller holds the lock.

    floor: slots below which all of them are given up, and every expert runs on the CPU.
    sound: whether the layer before came to its end; what one left half done is begun anew.
    """

    def __init__(
        self, engine: Engine, executor: TorchExecutor, accelerator: Accelerator, floor: int
    ) -> None:
        self.engine, self.executor, self.accelerator = engine, executor, accelerator
        self.floor = floor
        self.shrinks: list[Shrink] = []
        self.sound = False
        self.low = self.high = 0  # slots are given up below `low` free bytes, until `high` are free

    @property
    def slots(self) -> int:
        """Experts that the accelerator may hold now."""
        return self.engine.cache.slots

    def start(self, vram: object, kept: Reserve) -> None:
        """The first slab, filled. Below the floor, experts stay on the CPU if `vram` is None, and an
        InsufficientMemoryError says so if it is not.
        """
        wanted, free = self.slots, self.accelerator.free_bytes()
        reason = self._settle(wanted)
        if wanted and not self.slots and vram is not None:
            raise InsufficientMemoryError(
                f"vram={vram!r} needs {self.floor} expert slots of {self.executor.slot_bytes} bytes "
                f"at least, one per layer: {reason}; free some memory there, pack the experts "
                "(weights='int4') or use device='cpu'",
                self.floor * self.executor.slot_bytes,
                free or 0,
            )
        if not wanted:
            reason = (
                f"of {free} free bytes, {kept.kv} are left for the KV cache and {kept.workspace} for "
                f"workspace, and {self.floor} slots of {self.executor.slot_bytes} bytes are the least"
            )
        if reason:
            self._gave_up(wanted, reason)
        free = self.accelerator.free_bytes()
        if free is not None:
            self.high = min(kept.workspace, free)
            self.low = self.high // 2

    def run(self, load: Load, forecasts: Sequence[Forecast] = ()) -> Plan:
        """One layer through the engine."""
        step = partial(self.engine.step, load, forecasts)
        return self.within(step, partial(self.engine.again, load))

    def within(self, task: Callable[[], T], again: Callable[[], T] | None = None) -> T:
        """What a task returns; if memory does not suffice, with as many slots less as it takes.

        again: the task after a failure, where it differs from the first attempt.
        """
        self._restart()
        failures = 0
        while True:
            self.sound = False
            try:
                result = task()
            except OUT_OF_MEMORY as error:
                reason = _first_line(error)
                if not self.slots:
                    raise InsufficientMemoryError(
                        f"no expert is on {self.accelerator.name}, and still: {reason}"
                    ) from error
            else:
                self.sound = True
                return result
            # Outside the handler: the traceback keeps memory of the failed attempt alive.
            wanted = self.slots
            self._settle(_fewer(wanted, self.floor, failures))
            self._gave_up(wanted, reason)
            task, failures = again or task, failures + 1

    def relieve(self) -> None:
        """Give up slots where the rest of the model has left too little free memory."""
        if not self.low or self.slots <= self.floor:
            return
        free = self.accelerator.free_bytes()
        if free is None or free >= self.low:
            return
        wanted = self.slots
        missing = -(-(self.high - free) // self.executor.slot_bytes)
        # An eighth at least: every change copies all that stays once more.
        fewer = max(wanted - max(missing, wanted // 8, 1), self.floor)
        reason = self._settle(fewer) or f"only {free} bytes were left for the rest of the model"
        self._gave_up(wanted, reason)

    def to_dict(self) -> dict[str, Any]:
        """Slots at first and now, how often some were given up, and why the last time."""
        last = self.shrinks[-1] if self.shrinks else None
        return {
            "slots_at_first": self.shrinks[0].before if self.shrinks else self.slots,
            "slots": self.slots,
            "shrinks": len(self.shrinks),
            "reason": last.reason if last else None,
        }

    def _restart(self) -> None:
        """Begin anew unless the layer before came to its end; raises DeviceLostError again."""
        if not self.sound:
            wanted = self.slots
            reason = self._settle(wanted)
            if reason:
                self._gave_up(wanted, reason)

    def _settle(self, slots: int) -> str:
        """Lay out so many slots, or as many fewer as it takes; says why it took fewer."""
        self.sound = False
        reason, failures = "", 0
        while True:
            self.accelerator.synchronize()  # neither copies nor launches may outlive the slab
            moves = self.engine.resize(slots)
            self.engine.abandon()
            if not slots:
                self.engine.policies = preset("cpu")
            try:
                self.executor.rebuild(moves)
            except OUT_OF_MEMORY as error:
                if not slots:
                    raise
                reason = _first_line(error)
            else:
                self.sound = True
                return reason
            slots = min(_fewer(slots, self.floor, failures), self._fitting())
            failures += 1

    def _fitting(self) -> int:
        """Slots that what is free now would hold; 0 below the floor."""
        free = self.accelerator.free_bytes()
        if free is None:
            return self.slots
        slots = free // self.executor.slot_bytes - SPARE
        return slots if slots >= self.floor else 0

    def _gave_up(self, before: int, reason: str) -> None:
        """Remember it and tell it once."""
        after = self.slots
        self.shrinks.append(Shrink(before, after, reason))
        left = f"{after} of {before} expert slots" if after else "no expert slots (CPU only)"
        warnings.warn(
            f"{self.accelerator.name} keeps {left}: {reason}", RuntimeWarning, stacklevel=2
        )


def _fewer(slots: int, floor: int, failures: int) -> int:
    """An eighth less, then a quarter, then half; the floor once, and below it none."""
    if slots <= floor:
        return 0
    return max(slots - max(slots >> max(3 - failures, 1), 1), floor)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _number(config: Any, name: str) -> int:
    value = getattr(config, name, None)
    return value if isinstance(value, int) else 0
