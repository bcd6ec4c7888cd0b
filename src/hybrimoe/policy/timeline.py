"""When each lane is free: one float64 per lane, and the spans that filled it if asked for."""

from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


class Lane(IntEnum):
    """What can be busy on its own: two processors, the link between them, the policies' host."""

    CPU = 0
    GPU = 1
    LINK = 2
    POLICY = 3


COMPUTE = (int(Lane.CPU), int(Lane.GPU), int(Lane.POLICY))  # indexing by the enum is slower


class Span(NamedTuple):
    """One stretch of work on one lane, predicted or measured; seconds on the timeline's clock.

    experts, tokens: how many it computed; of an expert that is divided, the part it computed.
    """

    lane: Lane
    start: float
    seconds: float
    what: str
    layer: int = -1
    experts: float = 0
    tokens: float = 0
    bytes: int = 0


class Timeline:
    """The moment each lane is free, on one clock that only moves forward.

    now: the start of the layer being planned. Schedulers see the lanes relative to it.
    free: [4] the moment each lane has finished what was given to it.
    spans: what filled the lanes, or None where nobody asked for it.
    """

    __slots__ = ("free", "now", "spans")

    def __init__(self, now: float = 0.0, trace: bool = False) -> None:
        self.now = now
        self.free: Array = np.zeros(4) + now  # half the time of np.full
        self.spans: list[Span] | None = [] if trace else None

    def push(self, lane: Lane, seconds: float, after: float = 0.0, what: str = "") -> float:
        """Put work on a lane, no earlier than `after`, and return the moment it ends."""
        start = max(float(self.free[lane]), after, self.now)
        self.free[lane] = start + seconds
        if self.spans is not None:
            self.spans.append(Span(lane, start, seconds, what))
        return start + seconds

    def join(self, end: float) -> None:
        """Move the clock to the end of a layer; compute lanes wait for it, the link does not."""
        self.now, free = end, self.free
        for lane in COMPUTE:
            if free.item(lane) < end:
                free[lane] = end

    def sync(self, now: float) -> None:
        """Set the clock to real time at a layer's start, when only the link may still be busy."""
        self.now = now
        self.free[Lane.CPU] = self.free[Lane.GPU] = self.free[Lane.POLICY] = now

    def busy(self, lane: Lane) -> float:
        """Seconds from now until the lane is free."""
        return max(float(self.free[lane]) - self.now, 0.0)

    def fork(self) -> "Timeline":
        """A copy to plan on: what is pushed there leaves this one as it is."""
        copy = Timeline.__new__(Timeline)  # a third of the time of making and replacing an array
        copy.now, copy.free, copy.spans = self.now, self.free.copy(), None
        return copy


def perfetto(spans: list[Span], name: str = "predicted") -> list[dict[str, Any]]:
    """The spans as Chrome trace events (Perfetto, chrome://tracing): one track per lane."""
    names = [
        {
            "ph": "M",
            "name": "thread_name",
            "pid": name,
            "tid": lane.name,
            "args": {"name": lane.name},
        }
        for lane in Lane
    ]
    return names + [_event(span, name) for span in spans]


def _event(span: Span, name: str) -> dict[str, Any]:
    shown = {"layer": span.layer, "experts": span.experts, "tokens": span.tokens}
    return {
        "ph": "X",
        "name": span.what or span.lane.name,
        "pid": name,
        "tid": span.lane.name,
        "ts": span.start * 1e6,
        "dur": span.seconds * 1e6,
        "args": {**shown, "bytes": span.bytes},
    }
