"""Threads that read from the disk while others compute; they end by themselves when idle.

Whoever orders a read or waits for one may be interrupted at any moment. So they use plain locks alone:
those are taken and given back by single steps, where a `threading.Condition` could stay locked.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable
from queue import Empty, SimpleQueue

from hybrimoe.errors import DiskReadError

IDLE_S = 0.2
"""A thread without work waits so long before it ends, so that none outlives its model for long."""
LOOK_S = 0.25
"""How often one who waits for a read looks whether the thread that reads is still there."""


class Read:
    """One task of a reader. start, seconds: when it ran and how long; error: what it raised.

    urgent: whether somebody is going to wait for it.
    """

    __slots__ = ("done", "error", "gate", "seconds", "start", "task", "thread", "urgent")

    def __init__(self, task: Callable[[], None]) -> None:
        self.task = task
        self.done = self.urgent = False
        self.error: BaseException | None = None
        self.thread: threading.Thread | None = None  # the one that runs it, or ran it
        self.start = self.seconds = 0.0
        self.gate = threading.Lock()  # locked until the read is done
        self.gate.acquire()

    def run(self) -> None:
        """Do it, in the reader's thread."""
        self.start = time.perf_counter()
        try:
            self.task()
        except BaseException as error:
            self.error = error  # raised again where somebody waits for it
        self.seconds = time.perf_counter() - self.start
        self.done = True
        self.gate.release()


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
        self._lock = threading.Lock()
        self._queues: tuple[deque[Read], deque[Read]] = (deque(), deque())
        self._tokens: SimpleQueue[bool] = SimpleQueue()  # one per read, or more; False: time to end
        self._alive: list[threading.Thread] = []

    def submit(self, read: Read, urgent: bool = True) -> None:
        """Queue a read; one that is queued already becomes urgent if it is so now."""
        if self._pid != os.getpid():
            self._begin()  # a forked child has no threads, and locks in an unknown state
        with self._lock:
            read.urgent |= urgent
            if read.thread is not None:
                return
            self._unqueue(read)
            self._queues[not urgent].append(read)
            self._tokens.put(True)
            self._alive = [thread for thread in self._alive if thread.is_alive()]
            if len(self._alive) < self.threads:
                thread = threading.Thread(target=self._work, name="hybrimoe-reader")
                self._alive.append(thread)
                thread.start()

    def cancel(self, read: Read) -> bool:
        """Take a read back that nobody has started; False if it is too late."""
        with self._lock:
            return self._unqueue(read)

    def wait(self, read: Read) -> None:
        """Block until a read that was submitted is done, and raise what it raised.

        Raises DiskReadError within a second if the thread that had it is gone.
        """
        while not read.done:
            if read.gate.acquire(timeout=LOOK_S):
                read.gate.release()  # for whoever else waits
            elif not self._is_attended(read) and not read.done:
                self.cancel(read)
                raise DiskReadError("the thread that reads experts has ended")
        if read.error is not None:
            raise read.error

    def close(self) -> None:
        """Drop what is queued, and wait until no thread is left."""
        if self._pid != os.getpid():
            return
        with self._lock:
            for queue in self._queues:
                queue.clear()
            threads = self._alive
            for _ in threads:
                self._tokens.put(False)
        for thread in threads:
            thread.join()
        self._begin()

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
        me = threading.current_thread()
        while True:
            try:
                if not self._tokens.get(timeout=IDLE_S):
                    return
            except Empty:
                with self._lock:  # whoever submits next must not count on this thread
                    if any(self._queues):
                        continue
                    self._alive = [thread for thread in self._alive if thread is not me]
                    return
            with self._lock:
                queue = next((queue for queue in self._queues if queue), None)
                if queue is None:
                    continue  # it was cancelled
                read = queue.popleft()
                read.thread = me
            read.run()
