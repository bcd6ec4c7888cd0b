"""Seconds that this process spends compiling: they belong to no speed, and no wait is silent."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from numba.core import event

SOON = 1.0
"""Seconds of compiling after which it is said what takes so long."""


class Stopwatch(event.Listener):  # type: ignore[misc]
    """Hears of everything numba compiles; `clock` stands still meanwhile.

    What is loaded from the disk cache is not compiled.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0  # functions being compiled, each on behalf of the one before
        self._began = self._total = 0.0
        self._notice: tuple[str, float] | None = None
        event.register("numba:compile", self)

    @property
    def seconds(self) -> float:
        """Spent compiling since the process began, by whichever thread."""
        with self._lock:
            running = time.perf_counter() - self._began if self._depth else 0.0
            return self._total + running

    def clock(self) -> float:
        """`time.perf_counter` without the seconds spent compiling."""
        return time.perf_counter() - self.seconds

    @contextlib.contextmanager
    def saying(self, text: str, since: float) -> Iterator[None]:
        """Write a line to stderr if more than a second was compiled since `seconds` was `since`."""
        self._notice = (text, since)
        try:
            yield
        finally:
            self._notice = None

    def on_start(self, event: Any) -> None:
        """A function is about to be compiled."""
        with self._lock:
            if not self._depth:
                self._began = time.perf_counter()
            self._depth += 1
        self._speak()

    def on_end(self, event: Any) -> None:
        """It is compiled, or could not be."""
        with self._lock:
            self._depth -= 1
            if not self._depth:
                self._total += time.perf_counter() - self._began
        self._speak()

    def _speak(self) -> None:
        # A kernel compiles dozens of functions of its own, so this is called often enough.
        if self._notice is not None and self.seconds - self._notice[1] > SOON:
            self.speak()

    def speak(self) -> None:
        """Write the line of `saying` now, once: the wait has become long, whoever compiles."""
        notice, self._notice = self._notice, None
        # Nobody may be there to read it; that is no reason for a compilation to fail.
        with contextlib.suppress(OSError, ValueError):
            if notice is not None and sys.stderr is not None:
                print(notice[0], file=sys.stderr, flush=True)


stopwatch = Stopwatch()
