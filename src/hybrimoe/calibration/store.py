"""Measured cost models on disk: one file per machine, expert shape, format and number of threads.

A reader sees a whole file or none, and believes only a file of this very machine. One process
measures while the others wait for its result. Nothing that goes wrong with the file stops anything:
it costs a measurement and one warning.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from huggingface_hub import cached_assets_path

from hybrimoe.errors import ProfileError
from hybrimoe.files import write_atomically
from hybrimoe.policy.cost import CostModel

VERSION = 1
WAIT_S = 120.0
"""For another process that measures: five seconds, and the compilation of the kernels before."""

TRUSTED = 0.2
"""A measurement that misses its own runs by more was disturbed, and is not kept."""

Key = dict[str, Any]


class Measured(NamedTuple):
    """A new cost model, and the median relative error on the runs it comes from."""

    cost: CostModel
    misfit: float


def cached(key: Key, measure: Callable[[], Measured], force: bool = False) -> CostModel:
    """The cost model kept under a key, or a new one, measured once for all processes and kept.

    force: measure even if there is one.
    """
    try:
        path = file_of(key)
        # The lock file stays: removing it would let two processes hold two different locks.
        lock = FileLock(path.with_suffix(".lock"), timeout=WAIT_S)
        lock.acquire()
    except Timeout:
        _warn(f"another process has measured for {WAIT_S:.0f} s; this one now does so too")
        return measure().cost
    except (OSError, ValueError, NotImplementedError) as error:  # no folder, or no locks there
        _warn(f"the calibration cannot be kept, so the next process measures again: {error}")
        return measure().cost
    try:
        found = None if force else _read(path, key)
        if found is None:
            found, misfit = measure()
            if misfit > TRUSTED:
                _warn(
                    f"calibration was noisy ({misfit:.0%} off the fitted model); used now, not kept: "
                    "calibrate again when the machine is idle"
                )
            else:
                _write(path, key, found)
        return found
    finally:
        lock.release()


def kept(key: Key) -> CostModel | None:
    """The cost model kept under a key, or None; measures nothing."""
    try:
        return _read(file_of(key), key)
    except (OSError, ValueError):
        return None


def file_of(key: Key) -> Path:
    """Where the cost model of a key lies; OSError or ValueError where no folder can be made."""
    folder = cached_assets_path("hybrimoe", namespace="calibration", subfolder=f"v{VERSION}")
    return folder / f"{_digest(key)[:24]}.json"


def _read(path: Path, key: Key) -> CostModel | None:
    """What a file holds, or None where there is none or it cannot be believed."""
    try:
        content = json.loads(path.read_bytes())
        if content["version"] != VERSION or content["key"] != key:
            raise ProfileError("it was measured by another version or on another machine")
        if content["sha256"] != _digest(content["cost"]):
            raise ProfileError("its checksum is wrong")
        return CostModel.from_dict(content["cost"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _warn(f"{path} is no calibration of this machine and is measured anew: {error}")
        return None


def _write(path: Path, key: Key, cost: CostModel) -> None:
    """Keep a cost model, and remove what processes that were killed here left behind."""
    numbers = cost.to_dict()
    content = {"version": VERSION, "key": key, "cost": numbers, "sha256": _digest(numbers)}
    try:
        for part in path.parent.glob(f".{path.name}.*"):
            part.unlink(missing_ok=True)  # only who holds the lock writes here
        write_atomically(path, json.dumps(content, indent=2).encode())
    except OSError as error:
        _warn(f"{path} cannot be written, so the next process measures again: {error}")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)
