"""What this machine offers, what stands in the way, and what to do about it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from numba.core.caching import NullCache

from hybrimoe.calibration.measure import cpu_name
from hybrimoe.kernels.cpu.experts import run_experts
from hybrimoe.kernels.gpu.triton_experts import available as has_triton
from hybrimoe.limits import host_memory
from hybrimoe.models.releases import BELOW, NEWEST, OLDEST, release_of, release_text, untested
from hybrimoe.simd.compile import folder_problem
from hybrimoe.simd.isa import HOST_ISA
from hybrimoe.simd.threads import launch, usable_cores
from hybrimoe.sizes import size_text

MARKS = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
PINNED = 1 << 30
"""Bytes of page-locked memory below which copies to a GPU are slow."""
LITTLE_DISK = 20 << 30
ROOT = Path("/")


@dataclass(frozen=True)
class Finding:
    """One line of the doctor. state: "ok", "warn" (slower than it could be) or "fail"."""

    name: str
    state: str
    text: str
    advice: str = ""


def examine(root: Path = ROOT) -> list[Finding]:
    """Everything that is looked at, in the order it is printed; `root` holds /proc and /sys."""
    return [
        *(instructions(), cores(root), threads(), openmp(root), waiting(root)),
        *(memory(root), huge_pages(root), locked_memory(), subsystem(root)),
        *(gpu(root), triton(), compiled_kernels(), disk(), *versions()),
    ]


def to_dict(findings: list[Finding]) -> dict[str, Any]:
    """Plain data. healthy: nothing failed."""
    healthy = all(finding.state != "fail" for finding in findings)
    return {"healthy": healthy, "findings": [asdict(finding) for finding in findings]}


def as_text(findings: list[Finding]) -> str:
    """One line per finding, and its advice below it."""
    lines = []
    for finding in findings:
        lines.append(f"{MARKS[finding.state]}  {finding.name:13} {finding.text}")
        if finding.advice:
            lines.append(f"      {'':13} -> {finding.advice}")
    return "\n".join(lines)


def instructions() -> Finding:
    """The path the kernels take on this processor."""
    text = f"{cpu_name()}: {HOST_ISA} kernels"
    if HOST_ISA == "portable":
        advice = "no AVX2, AVX512-VNNI or NEON was found: int4 and int8 experts run much slower"
        if os.environ.get("HYBRIMOE_ISA"):
            advice = "HYBRIMOE_ISA is set; unset it for the fastest path"
        return Finding("instructions", "warn", text, advice)
    return Finding("instructions", "ok", text)


def cores(root: Path = ROOT) -> Finding:
    """Cores of the machine, and those that affinity and the container's quota leave."""
    physical, logical = psutil.cpu_count(logical=False), psutil.cpu_count()
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical
    quota = cpu_quota(root)
    text = f"{physical} cores, {logical} threads; {allowed} allowed"
    text += f", a quota of {quota:g}" if quota is not None else ""
    text += f"; experts use {usable_cores()}"
    if quota is not None and quota < usable_cores():
        advice = (
            f"more threads than the quota of {quota:g} cores allows are stopped in the middle of a "
            f"layer: set OMP_NUM_THREADS={max(int(quota), 1)} and threads={max(int(quota), 1)}"
        )
        return Finding("cores", "warn", text, advice)
    return Finding("cores", "ok", text)


def threads(count: int | None = None, usable: int | None = None) -> Finding:
    """Whether torch has more threads than cores."""
    count = torch.get_num_threads() if count is None else count
    usable = usable_cores() if usable is None else usable
    variables = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "MKL_NUM_THREADS")
    given = [f"{name}={os.environ[name]}" for name in variables if name in os.environ]
    text = f"torch has {count}" + (f" ({', '.join(given)})" if given else "")
    if count > usable:
        advice = (
            f"more threads than the {usable} cores wait for each other: OMP_NUM_THREADS={usable}"
        )
        return Finding("threads", "warn", text, advice)
    return Finding("threads", "ok", text)


def openmp(root: Path = ROOT) -> Finding:
    """The one OpenMP runtime that torch and the kernels share."""
    if launch.library is None or not launch.parallel:
        advice = "experts run on one thread; install torch from its usual wheels"
        return Finding("OpenMP", "fail", "no runtime with GOMP_parallel", advice)
    loaded = openmp_runtimes(_read(root / "proc/self/maps"))
    if len(loaded) > 1:
        advice = (
            "two runtimes in one process fight for the cores; remove the package that brings one"
        )
        return Finding("OpenMP", "warn", ", ".join(loaded), advice)
    return Finding("OpenMP", "ok", str(launch.library))


def openmp_runtimes(maps: str) -> list[str]:
    """Names of the OpenMP libraries in the text of /proc/self/maps."""
    names = (Path(line.split()[-1]).name for line in maps.splitlines() if line.strip())
    return sorted({name for name in names if re.match(r"lib(gomp|iomp5|omp)\b[-.\w]*$", name)})


def waiting(root: Path = ROOT) -> Finding:
    """Idle OpenMP threads spin; on a machine that others use too that costs a thousandfold."""
    policy = os.environ.get("OMP_WAIT_POLICY", "not set")
    load = _read(root / "proc/loadavg").split()
    busy = float(load[0]) if load else 0.0
    text = f"OMP_WAIT_POLICY is {policy}, {busy:.1f} processes want to run"
    if policy.lower() != "passive" and busy > usable_cores():
        advice = "others use the cores: set OMP_WAIT_POLICY=passive before Python starts"
        return Finding("waiting", "warn", text, advice)
    return Finding("waiting", "ok", text)


def memory(root: Path = ROOT) -> Finding:
    """What may still be allocated, and what says so."""
    have, total = host_memory(root), psutil.virtual_memory().total
    text = f"{size_text(have.free)} of {size_text(total)} available ({have.limit})"
    if have.free < 2 << 30:
        return Finding("memory", "warn", text, "few models fit; `hybrimoe plan` says which")
    return Finding("memory", "ok", text)


def huge_pages(root: Path = ROOT) -> Finding:
    """Experts ask for huge pages, which spare the processor a miss per 4 KiB."""
    text = _read(root / "sys/kernel/mm/transparent_hugepage/enabled").strip()
    found = re.search(r"\[(\w+)\]", text)
    if found is None:
        return Finding("huge pages", "ok", "this system does not say")
    if found[1] == "never":
        advice = "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled"
        return Finding("huge pages", "warn", "off", advice)
    return Finding("huge pages", "ok", found[1])


def locked_memory(limit: int | None = None, has_gpu: bool | None = None) -> Finding:
    """How much memory may be page-locked; only copies to a GPU need that."""
    has_gpu = torch.cuda.is_available() if has_gpu is None else has_gpu
    limit = _memlock() if limit is None else limit
    text = "no limit" if limit < 0 else f"a limit of {size_text(limit)}"
    if has_gpu and 0 <= limit < PINNED:
        advice = "where page-locking is refused, copies block the CPU: `ulimit -l unlimited`"
        return Finding("locked memory", "warn", text, advice)
    return Finding("locked memory", "ok", text)


def subsystem(root: Path = ROOT) -> Finding:
    """Whether Linux runs inside of Windows, with the limits that has."""
    release = _read(root / "proc/version")
    if "microsoft" not in release.lower():
        return Finding("system", "ok", f"{platform.system()} {platform.release()}")
    advice = (
        "WSL gets half of the memory and page-locks little of it: raise memory= in "
        "%UserProfile%\\.wslconfig, and keep checkpoints on the Linux disk, not under /mnt"
    )
    return Finding("system", "warn", "Linux under Windows (WSL)", advice)


def gpu(root: Path = ROOT) -> Finding:
    """The accelerator, its memory and its driver."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        name = torch.cuda.get_device_name()
        driver = _read(root / "proc/driver/nvidia/version").splitlines()
        text = f"{name}, {size_text(free)} of {size_text(total)} free, CUDA {torch.version.cuda}"
        return Finding("GPU", "ok", f"{text}{', ' + driver[0] if driver else ''}")
    if (root / "proc/driver/nvidia/version").exists():
        advice = f"torch {torch.__version__} cannot use it: install a build with CUDA"
        return Finding("GPU", "warn", "an NVIDIA driver, but no CUDA device for torch", advice)
    return Finding("GPU", "ok", "none: every expert runs on the CPU")


def triton() -> Finding:
    """The kernels that make two launches of a layer on a GPU."""
    if torch.cuda.is_available() and not has_triton():
        return Finding(
            "Triton", "warn", "missing", "GPU experts run on plain torch: install triton"
        )
    return Finding("Triton", "ok", "there" if has_triton() else "not needed without a GPU")


def compiled_kernels() -> Finding:
    """Where machine code is kept, and whether that can be written and trusted."""
    cache: Any = run_experts._cache
    if isinstance(cache, NullCache):
        advice = "each process compiles anew: set NUMBA_CACHE_DIR to a private, writable folder"
        return Finding("kernel cache", "warn", "none can be used", advice)
    problem = folder_problem(cache.cache_path)
    if problem:
        return Finding("kernel cache", "warn", problem, "or set NUMBA_CACHE_DIR to another folder")
    return Finding("kernel cache", "ok", str(cache.cache_path))


def disk() -> Finding:
    """Room for downloads."""
    from huggingface_hub.constants import HF_HUB_CACHE  # read late: it follows the environment

    folder = Path(HF_HUB_CACHE)
    there = next(place for place in (folder, *folder.parents) if place.exists())
    free = shutil.disk_usage(there).free
    text = f"{size_text(free)} free for {folder}"
    if free < LITTLE_DISK:
        return Finding(
            "disk", "warn", text, "few MoE checkpoints fit: set HF_HOME to a larger disk"
        )
    return Finding("disk", "ok", text)


def versions() -> Iterator[Finding]:
    """Python and the libraries that matter."""
    names = ("torch", "numba", "safetensors", "huggingface_hub", "accelerate")
    found = [f"{name} {_version(name)}" for name in names]
    python = platform.python_version()
    yield Finding("versions", "ok", f"Python {python}, {', '.join(found)}")
    yield transformers_version(_version("transformers"))


def transformers_version(version: str) -> Finding:
    """Whether a release of transformers is one that works."""
    if not OLDEST <= release_of(version) < BELOW:
        return Finding("transformers", "fail", version, "pip install 'transformers>=5.7,<6'")
    if untested(version):
        newest = release_text(NEWEST)
        text = f"{version}, newer than {newest}, the newest release hybrimoe was tested with"
        advice = f"if something is wrong: pip install 'transformers=={newest}.*'"
        return Finding("transformers", "warn", text, advice)
    return Finding("transformers", "ok", version)


def cpu_quota(root: Path = ROOT) -> float | None:
    """Cores that the control groups of this process allow, in versions 1 and 2; None for all."""
    found = []
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, controllers, path = ([*line.split(":", 2), "", ""])[:3]
        if number == "0" and not controllers:
            found += [_quota_2(level) for level in _levels(root / "sys/fs/cgroup", path)]
        elif "cpu" in controllers.split(","):
            found += [_quota_1(level) for level in _levels(root / "sys/fs/cgroup/cpu", path)]
    return min((quota for quota in found if quota is not None), default=None)


def _levels(mount: Path, path: str) -> list[Path]:
    folder = mount / path.strip("/")
    return [level for level in (folder, *folder.parents) if level.is_relative_to(mount)]


def _quota_2(folder: Path) -> float | None:
    fields = _read(folder / "cpu.max").split()
    if len(fields) != 2 or not all(field.isdigit() for field in fields):
        return None
    return int(fields[0]) / int(fields[1])


def _quota_1(folder: Path) -> float | None:
    quota, period = (_read(folder / f"cpu.cfs_{n}_us").strip() for n in ("quota", "period"))
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else None


def _memlock() -> int:
    """Bytes, -1 without a limit."""
    if sys.platform == "win32":
        return -1
    import resource

    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return -1 if soft == resource.RLIM_INFINITY else soft


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
