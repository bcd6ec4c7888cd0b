"""`hybrimoe trace` and `hybrimoe simulate`."""

import json
from pathlib import Path

import numpy as np
import pytest

from hybrimoe.cli.main import main
from hybrimoe.cli.traces import read_prompts, shorten
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.presets import PRESETS
from hybrimoe.policy.profiles import LAPTOP
from hybrimoe.simulation.foreign import read_trace
from hybrimoe.simulation.trace import RoutingTrace

ASSETS = Path(__file__).parent / "assets"
CUT = ASSETS / "traces" / "gptoss20b_cut.npz"
KEYS = (
    *("preset", "decode_s_per_token", "prefill_s", "hit_rate"),
    *("uploads_per_token", "link_bytes_per_token", "idle"),
)


def simulate(*arguments: str) -> int:
    return main(["simulate", str(CUT), "--steps", "60", *arguments])


def test_json_is_one_object_with_an_entry_per_preset(capsys):
    assert simulate("--profile", "laptop", "--vram", "6GiB", "--presets", "all", "--json") == 0
    found = json.loads(capsys.readouterr().out)

    assert [result["preset"] for result in found["results"]] == list(PRESETS)
    for result in found["results"]:
        assert set(KEYS) <= set(result)
    assert found["profile"] == "laptop"


@pytest.mark.parametrize(("vram", "slots"), [("0.25", 192), ("2799360000", 200), ("6GiB", 460)])
def test_vram_is_bytes_a_size_or_a_fraction(capsys, vram, slots):
    assert simulate("--vram", vram, "--presets", "cpu", "--json") == 0

    assert json.loads(capsys.readouterr().out)["slots"] == slots


def test_the_table_names_what_was_simulated(capsys):
    assert simulate("--presets", "hybrimoe,cpu") == 0
    lines = capsys.readouterr().out.splitlines()

    assert lines[0].startswith("gpt-oss-20b on desktop: 192 of 768 experts (25%) on the GPU; 60 of")
    assert [line.split()[0] for line in lines[1:]] == ["preset", "hybrimoe", "cpu"]


def test_profiles_come_from_files_too(capsys, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(LAPTOP.to_dict()))
    trace = read_trace(CUT).select(range(2))
    trace.save(tmp_path / "t.npz")
    assert main(["simulate", str(tmp_path / "t.npz"), "--profile", str(tmp_path / "p.json")]) == 0
    assert "on laptop" in capsys.readouterr().out
    costs = CostModel(0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1)
    costs.save(tmp_path / "c.json")
    assert main(["simulate", str(tmp_path / "t.npz"), "--profile", str(tmp_path / "c.json")]) == 0
    (tmp_path / "p.json").write_text("[]")
    assert main(["simulate", str(tmp_path / "t.npz"), "--profile", str(tmp_path / "p.json")]) == 1
    assert "must hold one JSON object" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--profile", "abacus"], "none of a6000, desktop, laptop, h200"),
        (["--vram", "lots"], "must be a size like '10GiB'"),
        (["--presets", "fastest"], "'fastest' is none of all, hybrimoe"),
        (["--steps", "0"], "must be a whole number of at least 1"),
    ],
)
def test_wrong_usage_ends_with_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        simulate(*arguments)

    assert ended.value.code == 2
    assert message in capsys.readouterr().err


def test_what_cannot_be_simulated_is_an_error_with_the_numbers(capsys, tmp_path):
    assert simulate("--vram", "20MB") == 2
    assert "holds 1 experts" in capsys.readouterr().err
    assert main(["simulate", str(tmp_path / "none.npz")]) == 2
    assert "none.npz" in capsys.readouterr().err
    (tmp_path / "cut.npz").write_bytes(CUT.read_bytes()[:5000])
    assert main(["simulate", str(tmp_path / "cut.npz")]) == 1
    assert "no complete npz" in capsys.readouterr().err


def test_shortened_traces_keep_whole_sequences_from_all_over():
    trace = read_trace(CUT)
    some = shorten(trace, 500)

    assert 350 <= some.steps <= 500
    assert np.unique(some.sequence).size > 1
    assert shorten(trace, 10**6) is trace


def test_prompts_are_lines_or_json(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n two\n")
    (tmp_path / "p.json").write_text('{"a": "x", "b": "y"}')
    assert read_prompts(tmp_path / "p.txt") == ["one", " two"]
    assert read_prompts(tmp_path / "p.json") == ["x", "y"]


def test_trace_writes_what_simulate_reads(capsys, tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "p.txt").write_text("def main():\nIn the beginning\n")
    out, picture = tmp_path / "T.npz", tmp_path / "heat.png"
    arguments = ["trace", str(ASSETS / "tiny-moe"), "--prompts", str(tmp_path / "p.txt")]
    arguments += ["-o", str(out), "--tokens", "4", "--json"]
    assert main([*arguments, "--heatmap", str(picture)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["sequences"], facts["forecast_depth"], facts["layers"]) == (2, 3, 12)
    assert picture.read_bytes()[:4] == b"\x89PNG"

    assert main([*arguments, "--append"]) == 0
    assert np.unique(RoutingTrace.load(out).sequence).size == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["T.npz", "heat.png", "p.txt"]

    chart = tmp_path / "lanes.png"
    assert main(["simulate", str(out), "--plot", str(chart)]) == 0
    assert chart.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(("text", "message"), [("", "holds no prompt"), ("{", "cannot be read")])
def test_prompts_that_are_none_are_refused(capsys, tmp_path, text, message):
    path = tmp_path / "p.json"
    path.write_text(text or "[]")
    out = tmp_path / "T.npz"
    options = ["--prompts", str(path), "-o", str(out)]
    assert main(["trace", str(ASSETS / "tiny-moe"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()
