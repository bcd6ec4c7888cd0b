"""Threads that read from the disk while others compute; they end by themselves when idle."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable

from hybrimoe.errors import DiskReadError

IDLE_S = 0.2
"""A thread without work waits so long before it ends, so that none outlives its model for long."""
LOOK_S = 0.25
"""How often one who waits for a read looks whether the thread that reads is still there."""


class Read:
    """One task of a reader. seconds: how long it took; error: what it raised."""

    __slots__ = ("done", "error", "seconds", "start", "task", "thread")

    def __init__(self, task: Callable[[], None]) -> None:
        self.task = task
        self.done = False
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None  # the one that runs it, or ran it
        self.start = self.seconds = 0.0


class Reader:
    """Runs reads in the background, urgent ones first, each kind in order.

    threads: how many at once. No thread is left once they have been idle for a moment, or after
    `close`; a thread that died is replaced with the next read.
    """

    def __init__(self, threads: int = 1) -> None:
        self.threads = threads
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._changed = threading.Condition()
        self._queues: tuple[deque[Read], deque[Read]] = (deque(), deque())
        self._alive: list[threading.Thread] = []
        self._idle = 0
        self._closed = False

    def submit(self, read: Read, urgent: bool = True) -> None:
        """Queue a read; one that is queued already becomes urgent if it is so now."""
        if self._pid != os.getpid():
            self._begin()  # a forked child has no threads, and locks in an unknown state
        with self._changed:
            if read.thread is not None:
                return
            self._closed = False
            self._unqueue(read)
            self._queues[not urgent].append(read)
            self._alive = [thread for thread in self._alive if thread.is_alive()]
            if sum(map(len, self._queues)) > self._idle and len(self._alive) < self.threads:
                thread = threading.Thread(target=self._work, name="hybrimoe-reader")
                self._alive.append(thread)
                thread.start()
            self._changed.notify_all()

    def cancel(self, read: Read) -> bool:
        """Take a read back that nobody has started; False if it is too late."""
        with self._changed:
            return self._unqueue(read)

    def wait(self, read: Read) -> None:
        """Block until a read that was submitted is done, and raise what it raised.

        Raises DiskReadError within a second if the thread that had it is gone.
        """
        with self._changed:
            while not read.done:
                self._changed.wait(LOOK_S)
                if not read.done and not self._is_attended(read):
                    self._unqueue(read)
                    raise DiskReadError("the thread that reads experts has ended")
        if read.error is not None:
            raise read.error

    def close(self) -> None:
        """Drop what is queued, and wait until no thread is left."""
        if self._pid != os.getpid():
            return
        with self._changed:
            self._closed = True
            for queue in self._queues:
                queue.clear()
            self._changed.notify_all()
        for thread in self._alive:
            thread.join()
        self._alive = []

    def _unqueue(self, read: Read) -> bool:
        for queue in self._queues:
            if read in queue:
                queue.remove(read)
                return True
        return False

    def _is_attended(self, read: Read) -> bool:
        if read.thread is not None:
            return read.thread.is_alive()
        return any(thread.is_alive() for thread in self._alive)

    def _work(self) -> None:
        while (read := self._take()) is not None:
            read.start = time.perf_counter()
            try:
                read.task()
            except BaseException as error:
                read.error = error  # raised again where somebody waits for it
            read.seconds = time.perf_counter() - read.start
            with self._changed:
                read.done = True
                self._changed.notify_all()

    def _take(self) -> Read | None:
        """The next read, or None when it is time to end."""
        with self._changed:
            deadline = time.monotonic() + IDLE_S
            self._idle += 1
            try:
                while not self._closed:
                    for queue in self._queues:
                        if queue:
                            read = queue.popleft()
                            read.thread = threading.current_thread()
                            return read
                    left = deadline - time.monotonic()
                    if left <= 0:
                        break
                    self._changed.wait(left)
                # Under the lock: whoever submits next must not count on this thread.
                self._alive = [t for t in self._alive if t is not threading.current_thread()]
                return None
            finally:
                self._idle -= 1
