"""Measured cost models on disk: whole or absent, of this machine, measured once for all."""

import functools
import json
import os
import random
import signal
import time
import warnings

import huggingface_hub
import pytest

from hybrimoe.calibration import store as calibration_cache
from hybrimoe.calibration.store import Measured, cached, file_of, kept
from hybrimoe.policy.cost import CostModel

KEY = {"cpu": "abacus", "threads": 2}
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks to kill the writer")


def cost(seconds: float = 1.0) -> CostModel:
    return CostModel(0, seconds, 1, 1, 1, 0, 0, 1, 1, seconds, 1)


def good(seconds: float = 1.0) -> Measured:
    return Measured(cost(seconds), 0.01)


def never() -> Measured:
    raise AssertionError("measured although it was known")


@pytest.fixture(autouse=True)
def assets(tmp_path, monkeypatch):
    """A cache of assets of its own."""
    here = functools.partial(huggingface_hub.cached_assets_path, assets_dir=tmp_path)
    monkeypatch.setattr(calibration_cache, "cached_assets_path", here)
    return tmp_path


def test_a_machine_is_measured_once():
    assert cached(KEY, good) == cost()
    assert cached(KEY, never) == cost()
    assert cached(KEY, lambda: good(2.0), force=True) == cost(2.0)
    assert cached(KEY, never) == cost(2.0)


def test_looking_up_measures_nothing(assets):
    assert kept(KEY) is None
    cached(KEY, good)
    assert kept(KEY) == cost()
    assert kept(KEY | {"threads": 1}) is None


def test_looking_up_without_a_folder_finds_nothing(assets):
    (assets / "hybrimoe").write_text("a file where the folder should be")
    assert kept(KEY) is None


def test_what_was_measured_of_something_else_does_not_count():
    cached(KEY, good)
    for change in ({"cpu": "loom"}, {"threads": 1}, {"gpu": "none"}):
        assert cached(KEY | change, lambda: good(3.0)) == cost(3.0)
    assert cached(KEY, never) == cost()


def test_a_disturbed_measurement_is_used_but_not_kept():
    with pytest.warns(RuntimeWarning, match="calibration was noisy .35% off"):
        assert cached(KEY, lambda: Measured(cost(2.0), 0.35)) == cost(2.0)
    assert cached(KEY, good) == cost()


def edited(**changes):
    def edit(content: bytes) -> bytes:
        return json.dumps(json.loads(content) | changes).encode()

    return edit


DAMAGE = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "no text": lambda content: b"\xff\x00" + content,
    "a list": lambda content: b"[]",
    "a number": lambda content: b"3",
    "another version": edited(version=0),
    "another machine": edited(key={"cpu": "loom"}),
    "no checksum": edited(sha256=None),
    "a changed number": edited(cost=cost(5.0).to_dict()),
    "an impossible cost": edited(cost={}),
    "a cost of a list": edited(cost=[]),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_cannot_be_believed_is_measured_anew_with_one_warning(damage):
    cached(KEY, good)
    path = file_of(KEY)
    path.write_bytes(damage(path.read_bytes()))

    with pytest.warns(RuntimeWarning, match="is measured anew") as caught:
        assert cached(KEY, lambda: good(2.0)) == cost(2.0)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert cached(KEY, never) == cost(2.0)


def test_a_full_disk_costs_a_warning_and_leaves_no_litter(assets, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.warns(RuntimeWarning, match="No space left") as caught:
        assert cached(KEY, good) == cost()
    assert len(caught) == 1
    assert {path.suffix for path in assets.rglob("*") if path.is_file()} <= {".lock"}


def test_a_folder_that_cannot_be_made_costs_a_warning(assets):
    (assets / "hybrimoe").write_text("a file where the folder should be")
    with pytest.warns(RuntimeWarning, match="cannot be kept") as caught:
        assert cached(KEY, good) == cost()
    assert len(caught) == 1


def test_a_process_that_waits_too_long_measures_itself(monkeypatch):
    monkeypatch.setattr(calibration_cache, "WAIT_S", 0.05)
    path = file_of(KEY)
    with (
        calibration_cache.FileLock(path.with_suffix(".lock")),
        pytest.warns(RuntimeWarning, match="another process"),
    ):
        assert cached(KEY, good) == cost()
    assert not path.exists()


def test_a_failed_measurement_frees_the_lock():
    with pytest.raises(AssertionError):
        cached(KEY, never)
    assert cached(KEY, good) == cost()


def in_child(work) -> int:
    """Fork, do the work there, and return the child's id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


@needs_fork
@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_kill_within_a_write_leaves_the_old_file_whole(assets, moment):
    cached(KEY, good)

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        setattr(os, moment, die)
        cached(KEY, lambda: good(2.0), force=True)

    assert os.waitpid(in_child(work), 0)[1] == signal.SIGKILL
    assert cached(KEY, never) == cost()
    cached(KEY, lambda: good(3.0), force=True)  # and clears away what the dead left
    assert {path.suffix for path in assets.rglob("*") if path.is_file()} == {".json", ".lock"}


@needs_fork
def test_a_kill_at_any_time_leaves_the_old_or_the_new(assets):
    cached(KEY, good)
    rng = random.Random(0)

    def work() -> None:
        for seconds in range(1, 10**6):
            cached(KEY, lambda seconds=seconds: good(float(seconds)), force=True)

    for _ in range(20):
        child = in_child(work)
        time.sleep(rng.uniform(0.002, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert cached(KEY, never).cpu_expert >= 1


@needs_fork
def test_of_four_processes_one_measures(tmp_path):
    log = tmp_path / "log"

    def slowly() -> Measured:
        with open(log, "a") as file:
            file.write("measured\n")
        time.sleep(0.3)
        return good()

    def work() -> None:
        found = cached(KEY, slowly)
        (tmp_path / f"found-{os.getpid()}").write_text(str(found.cpu_expert))

    children = [in_child(work) for _ in range(4)]
    for child in children:
        assert os.waitpid(child, 0)[1] == 0
        assert (tmp_path / f"found-{child}").read_text() == "1.0"
    assert log.read_text() == "measured\n"
