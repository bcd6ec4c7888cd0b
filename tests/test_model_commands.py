"""`hybrimoe plan`, `generate` and `bench`, as a new user types them."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest
import torch

import hybrimoe
from hybrimoe.cli import side_by_side
from hybrimoe.cli.main import main
from paths import TINY_MOE

TINY = str(TINY_MOE)
QUICK = ("--max-new-tokens", "4", "--greedy")


@pytest.fixture
def chatty(tmp_path) -> Path:
    """The bundled model with a chat template."""
    folder = shutil.copytree(TINY_MOE, tmp_path / "chatty")
    path = folder / "tokenizer_config.json"
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    return folder


def test_plan_prints_text_or_one_object(capsys):
    assert main(["plan", TINY, "--context", "512"]) == 0
    assert "It fits: hybrimoe.from_pretrained(" in capsys.readouterr().out
    assert main(["plan", TINY, "--context", "512", "--ram", "24GiB"]) == 0
    assert "(ram='24GiB')" in capsys.readouterr().out
    assert main(["plan", TINY, "--weights", "int4", "--vram", "3MiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert (found["weights"], found["fits"], found["context"]) == ("int4", True, 4096)
    assert found["slots"] > 0


def test_plan_of_what_does_not_fit_ends_with_code_1(capsys):
    assert main(["plan", TINY, "--ram", "10MiB"]) == 1
    assert "It does not fit; no format fits" in capsys.readouterr().out
    assert main(["plan", TINY, "--ram", "10MiB", "--json"]) == 1

    assert json.loads(capsys.readouterr().out)["fits"] is False


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan", TINY, "--vram", "lots"], "vram must be a size like '10GiB'"),
        (["plan", TINY, "--context", "0"], "must be a whole number of at least 1"),
        (["plan"], "the following arguments are required: NAME"),
        (["generate", TINY], "required: --prompt"),
        (
            ["generate", TINY, "--prompt", "x", "--weights", "int2"],
            "must be one of native, int8, int4",
        ),
        (["bench", TINY, "--rounds", "none"], "must be a whole number of at least 1, got 'none'"),
    ],
)
def test_wrong_usage_ends_with_code_2(capsys, arguments, message):
    with pytest.raises(SystemExit) as ended:
        main(arguments)

    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["generate", TINY, "--prompt", "x", "--chat"],
            "--chat needs a model with a chat template",
        ),
        (["generate", TINY, "--prompt", ""], "--prompt must have at least one token"),
    ],
)
def test_failures_are_one_line_without_a_traceback(capsys, arguments, message):
    assert main(arguments) == 2
    out, err = capsys.readouterr()

    assert out == ""
    assert message in err
    assert err.startswith(f"hybrimoe {arguments[0]}: ")
    assert len(err.strip().splitlines()) == 1


def test_generate_streams_to_stdout_and_reports_to_stderr(capsys):
    assert main(["generate", TINY, "--prompt", "def main(", *QUICK, "--stats"]) == 0
    out, err = capsys.readouterr()
    assert main(["generate", TINY, "--prompt", "def main(", *QUICK, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert out.strip() == found["text"].strip()
    assert out.strip()
    assert "hybrimoe: 12 layers of experts on the CPU" in err
    assert (found["new_tokens"], found["weights"]) == (4, "native")
    assert found["report"]["decode_tokens"] == 3


def test_generate_takes_a_chat_template_and_stdin(capsys, chatty, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    arguments = ["generate", str(chatty), "--prompt", "-", *QUICK, "--json", "--weights", "int4"]
    assert main(arguments) == 0
    plain = json.loads(capsys.readouterr().out)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello"))
    assert main([*arguments, "--chat"]) == 0
    chat = json.loads(capsys.readouterr().out)

    assert chat["prompt_tokens"] > plain["prompt_tokens"]
    assert chat["weights"] == "int4"


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """The bundled model as `save_packed` writes it."""
    folder = tmp_path_factory.mktemp("packed")
    hybrimoe.save_packed(hybrimoe.from_pretrained(TINY_MOE, weights="int4"), folder)
    return folder


def test_packed_files_are_planned_and_generate_as_they_are(capsys, packed):
    assert main(["plan", str(packed), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert main(["generate", str(packed), "--prompt", "def main(", *QUICK, "--json"]) == 0
    written = json.loads(capsys.readouterr().out)
    assert (
        main(["generate", TINY, "--weights", "int4", "--prompt", "def main(", *QUICK, "--json"])
        == 0
    )

    assert (found["weights"], found["fits"]) == ("int4", True)
    assert written["text"] == json.loads(capsys.readouterr().out)["text"]
    assert written["weights"] == "int4"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["bench"], "packed experts only; give it the original checkpoint"),
        (["plan", "--weights", "int8"], "weights must be 'int4', which the experts .* packed as"),
    ],
)
def test_what_packed_files_cannot_do_is_one_line(capsys, packed, command, message):
    assert main([command[0], str(packed), *command[1:]]) == 2
    out, err = capsys.readouterr()

    assert out == ""
    assert re.search(message, err)
    assert len(err.strip().splitlines()) == 1


def test_a_folder_that_lost_its_tokenizer_is_one_line(capsys, packed, tmp_path):
    folder = shutil.copytree(packed, tmp_path / "folder")
    for path in folder.glob("tokenizer*"):
        path.unlink()

    assert main(["generate", str(folder), "--prompt", "hi"]) == 2
    assert re.search("has no tokenizer: .*save_pretrained", capsys.readouterr().err)


def test_statistics_start_after_everything_is_compiled(capsys, monkeypatch):
    resets = []
    reset = hybrimoe.Runtime.reset_stats
    monkeypatch.setattr(
        hybrimoe.Runtime, "reset_stats", lambda self: (resets.append(self.stats()), reset(self))
    )
    assert main(["generate", TINY, "--prompt", "def main(", *QUICK, "--json"]) == 0

    (warm,) = resets
    assert warm["prefill_tokens"] > 0
    assert warm["decode_tokens"] == 1


def test_generate_on_an_accelerator(capsys):
    arguments = ["--device", "emulated", "--vram", "0.5", "--json"]
    assert main(["generate", TINY, "--prompt", "def main(", *QUICK, *arguments]) == 0

    assert json.loads(capsys.readouterr().out)["report"]["hybrid"]["slots"] == 192


def test_generate_refuses_what_does_not_fit_before_it_loads(capsys, monkeypatch):
    import hybrimoe.memory.plan
    from hybrimoe.limits import HostMemory

    def never(*_, **__):
        pytest.fail("the model must not be loaded")

    monkeypatch.setattr(
        hybrimoe.memory.plan, "host_memory", lambda **_: HostMemory(300 << 20, "a test")
    )
    monkeypatch.setattr(hybrimoe, "from_pretrained", never)
    arguments = ["generate", TINY, "--prompt", "x", "--max-new-tokens", "100000"]
    assert main(arguments) == 1
    out, err = capsys.readouterr()

    assert out == ""
    assert re.search(r"needs .* of host memory \(a test\), 44.0 MiB available; no format", err)


class Slow:
    """Takes 3 s for the prompt and 0.5 s for each token after the first, by a clock of its own."""

    def __init__(self):
        self.now = 100.0

    def generate(self, prompt, streamer, max_new_tokens, **_):
        streamer.put(prompt)
        self.now += 3
        for _ in range(max_new_tokens):
            streamer.put(None)
            self.now += 0.5
        streamer.end()
        return torch.cat((prompt, torch.arange(max_new_tokens)[None]), 1)


def test_bench_times_the_prompt_and_the_tokens_after_it_in_one_run(monkeypatch):
    slow = Slow()
    monkeypatch.setattr(side_by_side.time, "perf_counter", lambda: slow.now)
    prefill, decode, tokens = side_by_side.timed(slow, torch.zeros(1, 7), 4)

    assert (prefill, decode, len(tokens)) == (3.0, 2.0, 5)


def test_bench_compares_both_in_one_table(capsys):
    arguments = ["bench", TINY, "--prompt-tokens", "8", "--tokens", "4", "--rounds", "2"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert [line.split()[0] for line in lines[2:5]] == ["plain", "wrapped", "ratio"]
    assert "greedy tokens equal: 5 of 5" in lines
    for name in ("plain", "wrapped"):
        assert found[name]["prefill_tokens_s"] > 0
        assert found[name]["decode_tokens_s"] > 0
    assert (found["equal_tokens"], found["of_tokens"]) == (5, 5)


def test_an_interruption_is_a_message(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hybrimoe.memory.plan.plan", interrupt)

    assert main(["plan", TINY]) == 1
    assert capsys.readouterr().err == "hybrimoe plan: interrupted\n"
