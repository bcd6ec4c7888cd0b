"""The command line itself: what it loads, and what it checks before it works."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import hybrimoe
from hybrimoe import choices
from hybrimoe.cli.main import main
from hybrimoe.policy import presets, profiles
from paths import TINY_MOE

TRACE = TINY_MOE.parent / "traces" / "gptoss20b_cut.npz"
LOADED = """
import sys
from hybrimoe.cli.main import main
code = None
try:
    code = main(sys.argv[1:])
except SystemExit as ended:
    code = ended.code
print(code, sorted({"torch", "transformers", "numba"} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ([], 2),
        (["--help"], 0),
        (["--version"], 0),
        (["simulate", "--help"], 0),
        (["plan"], 2),
        (["generate", "x", "--prompt", "y", "--vram", "lots"], 2),
        (["plan", "./nowhere"], 2),
        (["simulate", "none.npz", "--presets", "fastest"], 2),
        (["simulate", "none.npz"], 2),
        (["simulate", str(TRACE), "--plot", "no/folder/x.png"], 2),
        (["calibrate", "-o", "no/folder/x.json"], 2),
    ],
)
def test_help_and_wrong_usage_load_nothing_heavy(arguments, code):
    done = subprocess.run(
        [sys.executable, "-c", LOADED, *arguments], capture_output=True, text=True, check=True
    )

    assert done.stdout.splitlines()[-1] == f"{code} []"


def test_without_a_command_it_helps(capsys):
    assert main([]) == 2
    assert "COMMAND" in capsys.readouterr().err


def test_the_version_is_the_packages(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])

    assert ended.value.code == 0
    assert capsys.readouterr().out == f"hybrimoe {hybrimoe.__version__}\n"


def test_names_to_choose_from_are_those_of_what_they_name():
    assert tuple(presets.PRESETS) == choices.PRESETS
    assert tuple(profiles.PROFILES) == choices.PROFILES
    assert tuple(profiles.SHAPES) == choices.SHAPES


@pytest.fixture
def idle(monkeypatch):
    """No command gets to its work."""

    def never(*_, **__):
        pytest.fail("the work must not start")

    replays = "simulation.simulator.simulate", "simulation.foreign.read_trace"
    for name in (*replays, "record", "calibrate"):
        monkeypatch.setattr(f"hybrimoe.{name}", never)


def commands(path) -> list[list[str]]:
    """Every command that writes a file, asked to write it there."""
    prompts = path.parents[-2] / "p.txt"
    trace = ["trace", str(TINY_MOE), "--prompts", str(prompts)]
    return [
        ["simulate", str(TRACE), "--plot", str(path)],
        [*trace, "-o", str(path)],
        [*trace, "-o", "x.npz", "--heatmap", str(path)],
        ["calibrate", "-o", str(path)],
    ]


@pytest.mark.parametrize("number", range(4))
def test_where_nothing_can_be_written_is_said_first(number, idle, capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "here.png").mkdir()
    for path, said in (
        (tmp_path / "no" / "x.png", "must lie in a folder that exists"),
        (tmp_path / "here.png", "is a folder"),
    ):
        assert main(commands(path)[number]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda *_: False)
    assert main(commands(tmp_path / "x.png")[number]) == 2
    assert "that you may write to" in capsys.readouterr().err


@pytest.mark.parametrize("number", [0, 2])
def test_a_figure_that_cannot_be_drawn_is_said_first(number, idle, capsys, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    assert main(commands(tmp_path / "x.docx")[number]) == 2
    assert "must end in one of" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.delitem(sys.modules, "hybrimoe.simulation.plots", raising=False)
    monkeypatch.delattr("hybrimoe.simulation.plots", raising=False)
    assert main(commands(tmp_path / "x.png")[number]) == 2
    assert "pip install 'hybrimoe[plot]'" in capsys.readouterr().err


@pytest.mark.skipif(not os.path.exists("/dev/null"), reason="devices of POSIX")
@pytest.mark.parametrize("number", range(4))
def test_a_device_is_not_replaced_by_a_file(number, idle, capsys):
    pytest.importorskip("matplotlib")
    assert main(commands(Path("/dev/null"))[number]) == 2
    assert "'/dev/null' is a device or a pipe" in capsys.readouterr().err


def test_a_prompt_without_a_token_is_said_first(capsys):
    assert main(["demo", "--prompt", ""]) == 2
    assert "--prompt must have at least one token, got ''" in capsys.readouterr().err


def test_a_file_in_the_place_of_the_kept_packs_is_named(capsys):
    assert main(["cache", "--folder", __file__]) == 2
    assert f"--folder must be a folder, '{__file__}' is a file" in capsys.readouterr().err


def test_files_that_are_missing_are_named(capsys, tmp_path):
    assert main(["simulate", str(tmp_path / "t.npz")]) == 2
    assert f"no file '{tmp_path / 't.npz'}'" in capsys.readouterr().err
    out = str(tmp_path / "t.npz")
    assert main(["trace", str(TINY_MOE), "--prompts", "no.txt", "-o", out]) == 2
    assert "--prompts must be a file that exists, no file 'no.txt'" in capsys.readouterr().err


def test_the_demo_says_what_was_saved_gained_and_changed(capsys, monkeypatch):
    monkeypatch.setattr("hybrimoe.cli.demo.TIMED_TOKENS", 4)
    monkeypatch.setattr("hybrimoe.cli.demo.ROUNDS", 1)
    assert main(["demo", "--tokens", "4", "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out.splitlines()[-1])

    assert all(line.startswith("hybrimoe: compiling") for line in err.splitlines())
    for said in (
        "  memory   the experts take 7.9 MiB as int4",
        "  speed ",
        "  right    yes: all 12",
    ):
        assert said in out
    for jargon in ("NMSE", "ended last", "cosine", "uploads"):
        assert jargon not in out[: out.index("{")]
    assert found["right"] is True
    assert found["before_tokens_s"] > 0
    assert found["after_tokens_s"] > 0
    assert found["shared"]["hybrid"]["slots"] == 96


def test_a_demo_without_its_model_says_where_that_is(capsys, tmp_path, monkeypatch):
    assert main(["demo", "--model", str(tmp_path)]) == 2
    assert f"got '{tmp_path}'" in capsys.readouterr().err


def test_a_reader_that_has_had_enough_gets_no_traceback(tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hybrimoe", "cache", "--folder", str(tmp_path), "--json"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)

    assert (done.returncode, done.stderr) == (1, "")
