"""How much of the machine something else used while a benchmark ran (Linux)."""

from __future__ import annotations

import os
import resource
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class CpuTime:
    """Seconds so far: on the clock, spent by all cores, and spent by finished child processes."""

    clock_s: float
    spent_s: float
    children_s: float


def read_cpu_time() -> CpuTime:
    fields = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, fields[:8])
    ticks = user + nice + system + irq + softirq + steal
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return CpuTime(
        clock_s=time.monotonic(),
        spent_s=ticks / os.sysconf("SC_CLK_TCK"),
        children_s=children.ru_utime + children.ru_stime,
    )


def share_of_others(before: CpuTime, after: CpuTime) -> float:
    """Of all the cores' time between the two, the part that neither idled nor served our child."""
    others_s = (after.spent_s - before.spent_s) - (after.children_s - before.children_s)
    return max(0.0, others_s) / ((after.clock_s - before.clock_s) * os.cpu_count())
