"""How much memory this process may still take, and what says so."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import psutil

from hybrimoe.errors import InsufficientMemoryError
from hybrimoe.sizes import size_text

MARGIN = 256 << 20
"""Bytes left to everything else: a machine filled to the last page kills somebody."""
UNLIMITED = 1 << 60
"""cgroup v1 and the resource limits write "no limit" as a huge number."""


class HostMemory(NamedTuple):
    """Bytes this process may still allocate, and the limit that is reached first."""

    free: int
    limit: str


def host_memory(root: Path = Path("/"), mapped: int = 0) -> HostMemory:
    """The tightest of what the machine, the control groups and the process limits leave.

    root: where /proc and /sys are read. mapped: bytes of files that will be mapped meanwhile: no
    memory to the machine, but limits of the process count them.
    """
    machine = HostMemory(int(psutil.virtual_memory().available), "memory of the machine")
    found = [machine, *_cgroups(root), *_process_limits(root, mapped)]
    return min(found, key=lambda memory: memory.free)


def ensure_host_fits(
    need: int, what: str, nearest: str, have: HostMemory | None = None, held: int = 0
) -> None:
    """Raise InsufficientMemoryError before anything is allocated, if `need` bytes are too many.

    nearest: the nearest setting that works, as a sentence. held: bytes of the need that this process
    has already.
    """
    have = host_memory() if have is None else have
    room = max(have.free - MARGIN, 0) + held
    if need > room:
        raise InsufficientMemoryError(
            f"{what} needs {size_text(need)} of host memory, {size_text(room)} available "
            f"({have.limit}, {size_text(MARGIN)} left over); {nearest}",
            need=need,
            have=room,
            nearest=nearest,
        )


def _cgroups(root: Path) -> Iterator[HostMemory]:
    """What every level above this process leaves, in version 2 and version 1."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = ([*line.split(":", 2), "", ""])[:3]
        if number == "0" and not controllers:
            yield from _levels(root / "sys/fs/cgroup", path, _version_2)
        elif "memory" in controllers.split(","):
            yield from _levels(root / "sys/fs/cgroup/memory", path, _version_1)


def _levels(mount: Path, path: str, read: object) -> Iterator[HostMemory]:
    folder = mount / path.strip("/")
    # In a container the path may be the host's, which does not exist here; its parents then do.
    for level in (folder, *folder.parents):
        if not level.is_relative_to(mount):
            return
        memory = read(level)  # type: ignore[operator]
        if memory is not None:
            yield memory


def _version_2(folder: Path) -> HostMemory | None:
    limits = [_number(folder / name) for name in ("memory.max", "memory.high")]
    limit = min((number for number in limits if number is not None), default=None)
    return _left(folder, limit, "memory.current", ("inactive_file", "active_file"))


def _version_1(folder: Path) -> HostMemory | None:
    limit = _number(folder / "memory.limit_in_bytes")
    files = ("total_inactive_file", "total_active_file")
    return _left(folder, limit, "memory.usage_in_bytes", files)


def _left(folder: Path, limit: int | None, usage: str, files: tuple[str, ...]) -> HostMemory | None:
    used = _number(folder / usage)
    if limit is None or used is None or limit >= UNLIMITED:
        return None
    statistics = dict(
        line.split()
        for line in _read(folder / "memory.stat").splitlines()
        if len(line.split()) == 2
    )
    # The page cache of the group counts as used, but is given back before anybody is killed.
    cached = sum(int(statistics.get(name, 0)) for name in files)
    name = f"cgroup limit of {size_text(limit)} in {folder}"
    return HostMemory(max(limit - max(used - cached, 0), 0), name)


def _process_limits(root: Path, mapped: int) -> Iterator[HostMemory]:
    try:
        import resource  # Windows has none
    except ImportError:
        return
    pages = {"RLIMIT_AS": "VmSize", "RLIMIT_DATA": "VmData"}
    status = dict(
        line.split(":", 1) for line in _read(root / "proc/self/status").splitlines() if ":" in line
    )
    for limit, field in pages.items():
        soft = resource.getrlimit(getattr(resource, limit))[0]
        if soft == resource.RLIM_INFINITY or soft >= UNLIMITED or field not in status:
            continue
        used = int(status[field].split()[0]) * 1024
        files = f", which counts {size_text(mapped)} of mapped files" if mapped else ""
        name = f"{limit} of {size_text(soft)}{files}"
        yield HostMemory(max(soft - used - mapped, 0), name)


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
