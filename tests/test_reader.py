"""The threads that read in the background: order, errors, and that none stays behind."""

import ctypes
import threading
import time

import pytest

from hybrimoe.errors import DiskReadError
from hybrimoe.runtime.disk import reader as module
from hybrimoe.runtime.disk.reader import Read, Reader


def readers():
    return [t for t in threading.enumerate() if t.name == "hybrimoe-reader"]


@pytest.fixture
def reader():
    made = Reader()
    yield made
    made.close()
    assert readers() == []


def blocked(reader):
    """A read that lasts until the event is set."""
    go, begun = threading.Event(), threading.Event()

    def task():
        begun.set()
        assert go.wait(10)

    read = Read(task)
    reader.submit(read)
    assert begun.wait(10)
    return read, go


def test_urgent_reads_come_first_each_kind_in_order(reader):
    first, go = blocked(reader)
    order = []
    reads = {name: Read(lambda name=name: order.append(name)) for name in "abcd"}
    reader.submit(reads["a"], urgent=False)
    reader.submit(reads["b"], urgent=False)
    reader.submit(reads["c"])
    reader.submit(reads["d"])
    go.set()
    for read in (first, *reads.values()):
        reader.wait(read)

    assert order == ["c", "d", "a", "b"]


def test_a_queued_read_can_become_urgent_and_runs_once(reader):
    first, go = blocked(reader)
    order = []
    reads = {name: Read(lambda name=name: order.append(name)) for name in "ab"}
    reader.submit(reads["a"], urgent=False)
    reader.submit(reads["b"], urgent=False)
    reader.submit(reads["b"])
    go.set()
    for read in (first, *reads.values()):
        reader.wait(read)
    reader.submit(reads["b"])

    assert order == ["b", "a"]


def test_only_what_nobody_has_started_is_cancelled(reader):
    first, go = blocked(reader)
    second = Read(lambda: None)
    reader.submit(second)

    assert reader.cancel(second)
    assert not reader.cancel(second)
    assert not reader.cancel(first)
    go.set()
    reader.wait(first)
    assert not second.done


@pytest.mark.parametrize("error", [DiskReadError("gone"), SystemExit(3), ValueError("x")])
def test_who_waits_gets_the_error_and_the_reader_goes_on(reader, error):
    def fail():
        raise error

    read, after = Read(fail), Read(lambda: None)
    reader.submit(read)
    reader.submit(after)

    with pytest.raises(type(error)):
        reader.wait(read)
    reader.wait(after)
    assert after.done


def test_a_killed_thread_is_an_error_within_seconds_and_is_replaced(reader, monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    read, go = blocked(reader)
    # Asynchronous, so it arrives outside of whatever the task would catch itself.
    monkeypatch.setattr(Reader, "_work", lambda self: None)
    other = Reader()
    lost = Read(lambda: None)
    other.submit(lost)
    with pytest.raises(DiskReadError, match="ended"):
        other.wait(lost)
    monkeypatch.undo()
    again = Read(lambda: None)
    other.submit(again)
    other.wait(again)
    other.close()
    go.set()
    reader.wait(read)


def test_a_thread_that_dies_while_it_reads_is_an_error(reader, monkeypatch):
    monkeypatch.setattr(module, "LOOK_S", 0.01)
    monkeypatch.setattr(threading, "excepthook", lambda *_: None)
    begun = threading.Event()

    class Deadly(Read):
        __slots__ = ()

        @property
        def seconds(self):
            return 0.0

        @seconds.setter
        def seconds(self, value):
            if begun.is_set():
                raise SystemExit  # where no task's error is caught

    read = Deadly(begun.set)
    reader.submit(read)
    with pytest.raises(DiskReadError, match="ended"):
        reader.wait(read)
    after = Read(lambda: None)
    reader.submit(after)
    reader.wait(after)


def test_idle_threads_end_by_themselves(reader, monkeypatch):
    monkeypatch.setattr(module, "IDLE_S", 0.01)
    read = Read(lambda: None)
    reader.submit(read)
    reader.wait(read)
    for thread in readers():
        thread.join(10)

    assert readers() == []
    again = Read(lambda: None)
    reader.submit(again)
    reader.wait(again)


def test_close_drops_what_is_queued_and_waits_for_what_runs(reader):
    read, go = blocked(reader)
    queued = Read(lambda: None)
    reader.submit(queued)
    closing = threading.Thread(target=reader.close)
    closing.start()
    time.sleep(0.02)
    assert closing.is_alive()
    go.set()
    closing.join(10)

    assert read.done
    assert not queued.done
    assert readers() == []


def test_several_threads_read_at_once():
    reader = Reader(threads=3)
    barrier = threading.Barrier(3)
    reads = [Read(lambda: barrier.wait(10)) for _ in range(3)]
    for read in reads:
        reader.submit(read)
    for read in reads:
        reader.wait(read)
    reader.close()

    assert readers() == []


def test_an_interrupt_leaves_the_read_to_be_waited_for_again(reader):
    read, go = blocked(reader)
    main = threading.get_ident()
    interrupt = threading.Timer(
        0.05,
        lambda: ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(main), ctypes.py_object(KeyboardInterrupt)
        ),
    )
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        reader.wait(read)
    interrupt.join()
    go.set()
    reader.wait(read)
    assert read.done
