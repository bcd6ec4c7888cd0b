"""What the lanes really did: measured spans, their sums per layer, and who kept whom waiting."""

from __future__ import annotations

import time
from collections import deque
from typing import Any, NamedTuple

import numpy as np

from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.timeline import Lane, Span
from hybrimoe.runtime.devices.base import Accelerator

RECENT = 2000  # spans kept to refine the costs by
WAITED = 0.05  # of a step: a shorter wait for the accelerator counts as none


class Step(NamedTuple):
    """One layer's step, to tell who ended last. copied: it needed experts that were not there."""

    layer: int
    start: float
    cpu_end: float
    launched: Any  # the event after its last launch on the accelerator, or None
    copied: bool


class Meter:
    """Reads the clocks of host and accelerator; all spans are on one clock that starts at 0.

    seconds: [L, 4] busy seconds per layer and lane. total: [L] seconds per layer from its routing to
    its join. wait: [L] seconds for which the accelerator was at it when the CPU had done its share.
    held_up: [L, 4] how many steps each lane ended last.
    decode_s, bound_s: seconds of the steps with few tokens, and the least that memory and link allow.
    spans: every span where asked for, else None. recent: those since `take`, to refine costs by.
    """

    def __init__(self, accelerator: Accelerator, layers: int, keep: bool = False) -> None:
        self.accelerator = accelerator
        self.origin = time.perf_counter()
        self.spans: list[Span] | None = [] if keep else None
        self.recent: deque[Span] = deque(maxlen=RECENT)
        self._open: list[tuple[Any, Span]] = []
        self._steps: list[Step] = []
        self._clear(layers)

    def now(self) -> float:
        """Seconds since the meter began."""
        return time.perf_counter() - self.origin

    def ordered(self, event: Any, span: Span) -> None:
        """An operation was given to the accelerator; its times are read once it happened."""
        self._open.append((event, span))

    def ran(self, span: Span) -> None:
        """Something took place on the host, or on the accelerator a while ago."""
        self.seconds[span.layer, span.lane] += span.seconds
        self.recent.append(span)
        if self.spans is not None:
            self.spans.append(span)

    def ended(self, step: Step, seconds: float) -> None:
        """A layer's step is over for the host; the accelerator may still be at it."""
        self.total[step.layer] += seconds
        self._steps.append(step)
        if step.layer == 0:  # once per pass: asking costs more than remembering
            self.settle()

    def decoded(self, seconds: float, here: int, absent: int, cost: CostModel) -> None:
        """A step with few tokens, against the time in which its weights could have been read.

        Resident experts are read by the accelerator, the others over the link and by the CPU at once.
        """
        self.decode_s += seconds
        divided = absent / (1 / cost.cpu_expert + 1 / cost.load_s)
        self.bound_s += max(here * cost.gpu_read, divided)

    def take(self) -> list[Span]:
        """The spans since the last call."""
        spans = list(self.recent)
        self.recent.clear()
        return spans

    def reset(self) -> None:
        """Forget the sums; the clock goes on."""
        self._clear(len(self.total))
        if self.spans is not None:
            self.spans.clear()

    def settle(self) -> None:
        """Times of the operations that happened meanwhile."""
        still, accelerator = [], self.accelerator
        for event, span in self._open:
            if accelerator.happened(event):
                begin, end = accelerator.span(event)
                self.ran(span._replace(start=begin - self.origin, seconds=end - begin))
            else:
                still.append((event, span))
        self._open = still
        self._steps = [step for step in self._steps if not self._judged(step)]

    def _judged(self, step: Step) -> bool:
        """Book which lane a step ended with, once that is known."""
        last, wait = Lane.CPU, 0.0
        if step.launched is not None:
            if not self.accelerator.happened(step.launched):
                return False
            end = self.accelerator.span(step.launched)[1] - self.origin
            wait = max(end - step.cpu_end, 0.0)
            if wait > WAITED * (end - step.start):
                last = Lane.LINK if step.copied else Lane.GPU
        self.wait[step.layer] += wait
        self.held_up[step.layer, last] += 1
        return True

    def _clear(self, layers: int) -> None:
        self.seconds = np.zeros((layers, len(Lane)))
        self.total, self.wait = np.zeros(layers), np.zeros(layers)
        self.held_up = np.zeros((layers, len(Lane)), np.int64)
        self.decode_s = self.bound_s = 0.0
