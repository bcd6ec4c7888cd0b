"""`hybrimoe doctor`: each finding is provoked by files or numbers of a machine that has it."""

import json
from pathlib import Path

import pytest
import torch
from numba.core.caching import NullCache

from hybrimoe.cli import doctor
from hybrimoe.cli.main import main
from hybrimoe.kernels.cpu.experts import run_experts
from hybrimoe.simd.threads import launch, usable_cores

KEYS = {"name", "state", "text", "advice"}


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_the_command_prints_one_line_per_finding_or_one_object(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    names = [finding["name"] for finding in found["findings"]]
    assert found["healthy"]
    assert all(set(finding) == KEYS for finding in found["findings"])
    assert names == [line[6:19].strip() for line in text.splitlines() if line[:4].strip()]
    assert {"instructions", "cores", "OpenMP", "memory", "GPU", "kernel cache"} <= set(names)


def test_a_failure_ends_with_code_1(capsys, monkeypatch):
    monkeypatch.setattr(launch, "parallel", False)

    assert main(["doctor"]) == 1
    assert "FAIL  OpenMP" in capsys.readouterr().out


def test_the_portable_path_is_called_slow(monkeypatch):
    monkeypatch.delenv("HYBRIMOE_ISA", raising=False)
    monkeypatch.setattr(doctor, "HOST_ISA", "portable")
    assert "much slower" in doctor.instructions().advice
    monkeypatch.setenv("HYBRIMOE_ISA", "portable")

    assert "unset it" in doctor.instructions().advice


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/cpu.max": "50000 100000"}, 0.5),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000"}, None),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "150000",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
            },
            1.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu,cpuacct:/a\n",
                "sys/fs/cgroup/cpu/a/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/a/cpu.cfs_period_us": "100000",
            },
            None,
        ),
    ],
)
def test_quotas_of_both_cgroup_versions_are_read(tmp_path, files, quota):
    assert doctor.cpu_quota(tree(tmp_path, files)) == quota


def test_a_quota_below_the_cores_in_use_is_a_warning(tmp_path):
    files = {"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000"}
    found = doctor.cores(tree(tmp_path, files))

    assert found.state == "warn"
    assert "OMP_NUM_THREADS=1" in found.advice
    assert doctor.cores(tree(tmp_path / "free", {"proc/self/cgroup": ""})).state == "ok"


def test_more_threads_than_cores_are_a_warning(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    found = doctor.threads(count=64, usable=2)

    assert (found.state, "OMP_NUM_THREADS=2" in found.advice) == ("warn", True)
    assert "OMP_NUM_THREADS=64" in found.text
    assert doctor.threads(count=2, usable=2).state == "ok"


def test_two_openmp_runtimes_are_a_warning(tmp_path):
    maps = "7f00-7f01 r-xp 0 00:00 0 /a/libgomp.so.1\n7f00-7f01 r-xp 0 00:00 0 /b/libiomp5.so\n"
    found = doctor.openmp(tree(tmp_path, {"proc/self/maps": maps}))

    assert (found.state, found.text) == ("warn", "libgomp.so.1, libiomp5.so")
    assert doctor.openmp_runtimes(maps.splitlines()[0]) == ["libgomp.so.1"]


def test_spinning_on_a_busy_machine_is_a_warning(tmp_path, monkeypatch):
    busy = tree(tmp_path, {"proc/loadavg": f"{usable_cores() + 3}.00 1 1 1/1 1"})
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert doctor.waiting(busy).state == "warn"
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")

    assert doctor.waiting(busy).state == "ok"


def test_little_memory_is_a_warning(tmp_path):
    files = {
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": str(1 << 30),
        "sys/fs/cgroup/memory.current": "0",
    }

    assert doctor.memory(tree(tmp_path, files)).state == "warn"


@pytest.mark.parametrize(
    ("text", "state", "said"),
    [
        ("always [madvise] never", "ok", "madvise"),
        ("always madvise [never]", "warn", "off"),
        ("", "ok", "does not say"),
    ],
)
def test_huge_pages(tmp_path, text, state, said):
    files = {"sys/kernel/mm/transparent_hugepage/enabled": text} if text else {}
    found = doctor.huge_pages(tree(tmp_path, files))

    assert found.state == state
    assert said in found.text


def test_locked_memory_matters_with_a_gpu_only():
    assert doctor.locked_memory(64 << 10, has_gpu=True).state == "warn"
    assert doctor.locked_memory(64 << 10, has_gpu=False).state == "ok"
    assert doctor.locked_memory(-1, has_gpu=True).text == "no limit"


def test_windows_below_linux_is_a_warning(tmp_path):
    files = {"proc/version": "Linux version 5.15.90.1-microsoft-standard-WSL2"}

    assert ".wslconfig" in doctor.subsystem(tree(tmp_path, files)).advice
    assert doctor.subsystem(tmp_path / "none").state == "ok"


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_a_driver_without_a_device_is_a_warning(tmp_path):
    files = {"proc/driver/nvidia/version": "NVRM version: 580.1"}

    assert "build with CUDA" in doctor.gpu(tree(tmp_path, files)).advice
    assert doctor.gpu(tmp_path / "none").state == "ok"


def test_a_cache_that_others_may_write_is_a_warning(monkeypatch):
    monkeypatch.setattr(doctor, "folder_problem", lambda path: f"{path} belongs to another user")
    assert doctor.compiled_kernels().state == "warn"
    monkeypatch.setattr(run_experts, "_cache", NullCache())

    assert "NUMBA_CACHE_DIR" in doctor.compiled_kernels().advice


@pytest.mark.parametrize(
    ("version", "state"),
    [
        *(("5.7.0", "ok"), ("5.24.1", "ok"), ("5.25.0", "warn"), ("5.99.0.dev0", "warn")),
        *(("5.6.9", "fail"), ("6.0.0", "fail"), ("missing", "fail")),
    ],
)
def test_only_releases_that_were_tested_are_healthy(version, state):
    found = doctor.transformers_version(version)

    assert found.state == state
    assert ("pip install" in found.advice) is (state != "ok")
