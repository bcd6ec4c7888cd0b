"""The README's quickstart runs, and the messages that the docs explain are messages of the sources."""

import ast
import re
from pathlib import Path

import pytest
import torch

import hybrimoe
from paths import TINY_MOE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
QUICKSTARTS = re.findall(
    r"<!-- quickstart -->\n```python\n(.*?)```\n<!-- /quickstart -->", README, re.DOTALL
)
TROUBLE = (ROOT / "docs" / "troubleshooting.md").read_text()
TABLE = TROUBLE.partition("<!-- messages -->")[2].partition("<!-- /messages -->")[0]
MODEL = '"Qwen/Qwen3-30B-A3B"'
OTHERS = {"got an unexpected keyword argument"}  # Python's own


def texts() -> list[str]:
    """Every text in the sources; what is put into it when it is raised is a "\\0"."""
    found = []
    for path in sorted((ROOT / "src").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "\0" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def messages() -> list[str]:
    """What stands in the table's first column, between backticks."""
    rows = [line.split(" | ")[0] for line in TABLE.splitlines() if line.startswith("| `")]
    return [message for row in rows for message in re.findall("`([^`]+)`", row)]


TEXTS = texts()


def is_known(message: str) -> bool:
    """Whether one text of the sources has all parts of it, in their order."""
    pattern = re.compile(".*".join(map(re.escape, message.split("..."))), re.DOTALL)
    return any(pattern.search(text) for text in TEXTS)


def test_there_are_messages():
    assert len(messages()) >= 20


@pytest.mark.parametrize("message", [m for m in messages() if m not in OTHERS])
def test_a_message_that_is_explained_can_occur(message):
    assert is_known(message)


def test_a_message_that_cannot_occur_is_told():
    assert not is_known("needs ... of patience")


@pytest.mark.parametrize("example", QUICKSTARTS)
def test_a_quickstart_runs_on_another_name(example, capsys):
    assert MODEL in example
    names = {"__name__": "readme"}
    torch.manual_seed(0)
    exec(compile(example.replace(MODEL, repr(str(TINY_MOE))), "README.md", "exec"), names)

    assert names["model"].hybrimoe.config.weights == "int4"
    if "report()" in example:
        assert "A mixture of experts is" in capsys.readouterr().out
        assert names["model"].hybrimoe.report().decode_tokens > 0
    with pytest.warns(UserWarning, match="dequantized"):
        hybrimoe.unwrap(names["model"])


def test_there_are_quickstarts():
    assert len(QUICKSTARTS) == 3
