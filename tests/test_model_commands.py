"""`hybrimoe plan`, `generate` and `bench`, as a new user types them."""

import io
import json
import re
import shutil
from pathlib import Path

import pytest

from hybrimoe.cli import main
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
        (["generate", TINY, "--prompt", "x", "--weights", "int2"], "invalid choice: 'int2'"),
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
        (["plan", "./nowhere"], "no folder with a checkpoint"),
        (["plan", "nobody/has-this-model"], "the hub does not give it"),
        (["generate", "./nowhere", "--prompt", "x"], "NAME has no tokenizer"),
        (
            ["generate", TINY, "--prompt", "x", "--chat"],
            "--chat needs a model with a chat template",
        ),
        (["generate", TINY, "--prompt", ""], "--prompt must have at least one token"),
        (["bench", "./nowhere"], "no folder with a checkpoint"),
    ],
)
def test_failures_are_one_line_without_a_traceback(capsys, arguments, message):
    assert main(arguments) == 1
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


def test_generate_on_an_accelerator(capsys):
    arguments = ["--device", "emulated", "--vram", "0.5", "--json"]
    assert main(["generate", TINY, "--prompt", "def main(", *QUICK, *arguments]) == 0

    assert json.loads(capsys.readouterr().out)["report"]["hybrid"]["slots"] == 192


def test_generate_refuses_what_does_not_fit_before_it_loads(capsys, monkeypatch):
    import hybrimoe
    import hybrimoe.memory_plan
    from hybrimoe.runtime.host import HostMemory

    def never(*_, **__):
        pytest.fail("the model must not be loaded")

    monkeypatch.setattr(
        hybrimoe.memory_plan, "host_memory", lambda: HostMemory(300 << 20, "a test")
    )
    monkeypatch.setattr(hybrimoe, "from_pretrained", never)
    arguments = ["generate", TINY, "--prompt", "x", "--max-new-tokens", "100000"]
    assert main(arguments) == 1
    out, err = capsys.readouterr()

    assert out == ""
    assert re.search(r"needs .* of host memory \(a test\), 44.0 MiB can be had; no format", err)


def test_bench_compares_both_in_one_table(capsys):
    arguments = ["bench", TINY, "--prompt-tokens", "8", "--tokens", "4", "--rounds", "2"]
    assert main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)

    assert [line.split()[0] for line in lines[2:5]] == ["plain", "wrapped", "ratio"]
    assert lines[-1] == "greedy tokens equal: 5 of 5"
    for name in ("plain", "wrapped"):
        assert found[name]["prefill_tokens_s"] > 0
        assert found[name]["decode_tokens_s"] > 0
    assert (found["equal_tokens"], found["of_tokens"]) == (5, 5)


def test_an_interruption_is_a_message(capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("hybrimoe.memory_plan.plan", interrupt)

    assert main(["plan", TINY]) == 1
    assert capsys.readouterr().err == "hybrimoe plan: interrupted\n"
