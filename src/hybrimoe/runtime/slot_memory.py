"""How many experts the accelerator may hold: at the start, under pressure, and after a failure."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch

from hybrimoe.errors import InsufficientMemoryError
from hybrimoe.formats.registry import rounded
from hybrimoe.policy.engine import Engine
from hybrimoe.policy.plan import Plan
from hybrimoe.policy.presets import preset
from hybrimoe.policy.routing import Forecast, Load
from hybrimoe.runtime.devices.base import Accelerator
from hybrimoe.runtime.executor import TorchExecutor
from hybrimoe.runtime.slot_budget import SPARE, Reserve

T = TypeVar("T")
OUT_OF_MEMORY = (torch.OutOfMemoryError, InsufficientMemoryError)


@dataclass(frozen=True)
class Shrink:
    """One time that slots were given up."""

    before: int
    after: int
    reason: str


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
                f"(weights={rounded()[-1]!r}) or use device='cpu'",
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
