"""The gate to the worker threads: concurrency, forks and how many cores there are."""

import contextlib
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from kernel_cases import make_batch, make_layer, run, share_all_work

from hybrimoe.kernels.cpu import run_layer as moe
from hybrimoe.kernels.cpu.run_layer import run_layer
from hybrimoe.kernels.cpu.workspace import Workspace
from hybrimoe.simd import threads
from hybrimoe.simd.threads import launch, usable_cores

CALLERS = 4


@pytest.fixture(autouse=True)
def restless(monkeypatch):
    """Switch threads as often as Python can, and let tiny layers use several workers."""
    share_all_work(monkeypatch)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_concurrent_callers_get_the_sequential_result():
    workspace, layers = Workspace(), [make_layer(fmt, 64, 128)[0] for fmt in ("float32", "int4")]
    work = [(layers[i % 2], make_batch(1 + i % 9, 64, 5, 2, seed=i)) for i in range(20)]
    alone = [run(layer, *batch) for layer, batch in work]
    barrier = threading.Barrier(CALLERS)

    def call(_):
        barrier.wait()
        outs = []
        for layer, (x, ids, routing) in work * 5:
            out = np.full_like(x, np.nan)
            run_layer(layer, x, ids, routing, out, workspace, threads=2)
            outs.append(out)
        return outs

    with ThreadPoolExecutor(CALLERS) as pool:
        for outs in pool.map(call, range(CALLERS)):
            assert all(np.array_equal(out, wanted) for out, wanted in zip(outs, alone * 5))


def most_at_once(monkeypatch):
    """How many of several callers are inside the kernel at the same time."""
    inside, most = [], []

    def kernel(*args):
        inside.append(1)
        time.sleep(0.01)
        most.append(len(inside))
        inside.pop()

    monkeypatch.setattr(moe, "run_experts", kernel)
    layer, _ = make_layer("float32", 64, 128)
    with ThreadPoolExecutor(CALLERS) as pool:
        list(pool.map(lambda seed: run(layer, *make_batch(2, 64, 5, 2, seed)), range(2 * CALLERS)))
    return max(most)


def test_one_launch_runs_at_a_time(monkeypatch):
    assert most_at_once(monkeypatch) == 1


def test_without_the_lock_launches_would_share_their_scratch_buffers(monkeypatch):
    monkeypatch.setattr(launch, "lock", contextlib.nullcontext())
    assert most_at_once(monkeypatch) > 1


def test_the_lock_is_released_after_bad_arguments():
    layer, _ = make_layer("float32", 64, 128)
    x, ids, routing = make_batch(2, 64, 5, 2)
    with pytest.raises(ValueError, match="expert ids"):
        run(layer, x, ids + 5, routing)
    assert not launch.lock.locked()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_computes_the_same_on_one_thread():
    script = """
        import os, signal, sys, time
        import numpy as np
        from kernel_cases import make_batch, make_layer, run
        from hybrimoe.kernels.cpu import run_layer as moe
        from hybrimoe.simd.threads import launch

        moe.SMALL = 0
        layer, batch = make_layer("float32", 64, 128)[0], make_batch(5, 64, 5, 2)
        before = run(layer, *batch)
        launch.lock.acquire()  # as if another thread were inside a kernel while we fork
        child = os.fork()
        if child == 0:
            same = np.array_equal(run(layer, *batch), before) and launch.threads(2) == 1
            os._exit(0 if same else 3)
        launch.lock.release()
        for _ in range(80):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                break
            time.sleep(0.1)
        else:
            os.kill(child, signal.SIGKILL)
            sys.exit("the child hangs")
        assert np.array_equal(run(layer, *batch), before) and launch.threads(2) == 2
        sys.exit(os.waitstatus_to_exitcode(status))
    """
    result = run_script(script, NUMBA_THREADING_LAYER="omp")  # the one that kills children
    assert result.returncode == 0, result.stderr


def test_concurrent_callers_survive_the_layer_of_numba_that_aborts():
    script = """
        import threading
        from kernel_cases import make_batch, make_layer, run
        from hybrimoe.kernels.cpu import run_layer as moe

        moe.SMALL = 0
        layer, batch = make_layer("float32", 64, 128)[0], make_batch(5, 64, 5, 2)
        callers = [threading.Thread(target=run, args=(layer, *batch)) for _ in range(4)]
        [caller.start() for caller in callers]
        [caller.join() for caller in callers]
    """
    result = run_script(script, NUMBA_THREADING_LAYER="workqueue")
    assert result.returncode == 0, result.stderr


def run_script(script, **variables):
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**os.environ, "PYTHONPATH": path, **variables},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


class TestUsableCores:
    @pytest.fixture
    def machine(self, monkeypatch, tmp_path):
        """Pretend: physical cores, CPUs in the affinity mask, and the cgroup's cpu.max."""

        def pretend(physical, affinity, quota=None):
            monkeypatch.setattr(threads.psutil, "cpu_count", lambda logical: physical)
            monkeypatch.setattr(
                threads.os, "sched_getaffinity", lambda pid: set(range(affinity)), raising=False
            )
            limits = tmp_path / "cpu.max"
            if quota is not None:
                limits.write_text(quota)
            monkeypatch.setattr(threads, "Path", lambda name: limits)

        return pretend

    @pytest.mark.parametrize(
        ("physical", "affinity", "quota", "cores"),
        [
            (8, 16, None, 8),
            (8, 3, None, 3),
            (8, 1, None, 1),
            (8, 16, "max 100000\n", 8),
            (8, 16, "400000 100000\n", 4),
            (8, 16, "150000 100000\n", 1),
            (8, 16, "50000 100000\n", 1),
            (8, 2, "400000 100000\n", 2),
            (8, 16, "unreadable", 8),
        ],
    )
    def test_are_the_least_of_cores_affinity_and_quota(
        self, machine, physical, affinity, quota, cores
    ):
        machine(physical, affinity, quota)
        assert usable_cores() == cores

    def test_fall_back_to_all_cpus_where_cores_are_unknown(self, machine, monkeypatch):
        machine(None, 64)
        monkeypatch.setattr(threads.os, "cpu_count", lambda: 6)
        assert usable_cores() == 6

    def test_are_the_default_number_of_threads(self, monkeypatch):
        monkeypatch.setattr(launch, "cores", 3)
        if launch.parallel:
            assert launch.threads() == 3
            assert launch.threads(2) == 2
