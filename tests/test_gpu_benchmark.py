"""The GPU benchmark's own code, on the emulated accelerator: it must not rot between two GPUs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
CHECKED = ("kernels", "models", "races", "leaks")
MEASURED = ("qwen3-30b-a3b", "deepseek-v2-lite")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpu") / "gpu.json"
    command = [sys.executable, BENCHMARKS / "gpu.py", "--emulated", "--tiny"]
    command += ["--minutes", "60", "--out", path]  # a busy machine skips nothing
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    print(done.stdout[-4000:], done.stderr[-2000:])
    assert done.returncode == 0
    return json.loads(path.read_text())


def test_every_section_ran_to_its_end(results):
    sections = results["sections"]

    assert list(sections) == ["rates", *CHECKED, *MEASURED]
    for content in sections.values():
        assert "errors" not in content
        assert content["skipped"] == []
        assert content["seconds"] > 0


def test_every_check_ran_and_passed(results):
    for name in CHECKED:
        checks = results["sections"][name]["checks"]
        assert checks
        assert all(check["passed"] for check in checks)


def test_every_preset_and_rival_was_measured(results):
    from hybrimoe.policy.presets import PRESETS

    for name in MEASURED:
        rows = results["sections"][name]["rows"]
        runners = {row["runner"] for row in rows}
        assert runners == {"transformers, all on the GPU", "accelerate", "hybrimoe", "costs"}
        presets = {row["preset"] for row in rows if row.get("weights") == "int4"}
        assert presets == set(PRESETS)
        for row in rows:
            if row["runner"] == "hybrimoe":
                assert row["bound_share_1"] > 0
                assert 0 <= row["hit_rate_1"] <= 1
            if row["runner"] == "costs":
                assert min(row["CPU_spans"], row["GPU_spans"], row["layer_spans"]) > 0
            else:
                assert row["decode_1_ms"] > 0


def test_a_section_that_fails_is_recorded_and_does_not_stop_the_rest(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from gpu_sections import Sections

    run = Sections(tmp_path / "gpu.json", {}, minutes=1)

    def broken(section):
        section.row(number=1)
        raise RuntimeError("the driver says no")

    run.run("first", 0.5, broken)
    run.run("second", 0.5, lambda section: section.check("holds", True))
    run.run("third", 0.5, lambda section: section.check("does not hold", False))
    kept = json.loads((tmp_path / "gpu.json").read_text())["sections"]

    assert kept["first"]["rows"] == [{"number": 1}]
    assert "the driver says no" in kept["first"]["errors"][0]["traceback"]
    assert kept["second"]["checks"] == [{"check": "holds", "passed": True}]
    assert run.failed == ["first", "third"]


def test_what_there_is_no_time_for_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    from gpu_sections import Sections

    run = Sections(tmp_path / "gpu.json", {}, minutes=0)
    run.run("late", 1.0, lambda section: section.check("never", False))

    assert run.results["sections"]["late"]["skipped"] == ["late"]
    assert run.failed == []
