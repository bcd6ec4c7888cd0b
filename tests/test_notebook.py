"""The notebook under examples/ runs, shows what is stored, and stores nothing of a machine."""

import re
from importlib.util import find_spec

import pytest
from nbclient.exceptions import CellExecutionError
from nbformat.v4 import new_code_cell, new_notebook

import run_notebook

# A path from a root: of Unix, of a home, of Windows, or as an address.
LOCAL_PATH = re.compile(
    r"""(?:^|[\s"'(=`\[,;>])(?:~/|file:|/\w[\w.+-]*/)[\w./]|\b[A-Za-z]:\\+\w""", re.MULTILINE
)

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def stored():
    return run_notebook.read()


@pytest.fixture(scope="module")
def fresh(stored):
    return run_notebook.run(stored)


def code(book):
    return [cell for cell in book.cells if cell.cell_type == "code"]


def kinds(cell) -> set[str]:
    """What a cell shows: streams by name, and the kinds of data beside their plain text."""
    found = set()
    for output in cell.outputs:
        found |= {output.name} if output.output_type == "stream" else set(output.data)
    return found


def texts(book):
    """Everything in it that can be read: no pictures."""
    for cell in book.cells:
        yield cell.source
        for output in cell.get("outputs", []):
            yield output.get("text", "")
            data = output.get("data", {})
            yield from (text for kind, text in data.items() if kind.startswith("text/"))


def result(cell) -> str:
    """The plain text of a cell's last value."""
    return "".join(o.data["text/plain"] for o in cell.outputs if o.output_type == "execute_result")


def test_every_cell_runs(fresh):
    assert [cell.execution_count for cell in code(fresh)] == list(range(1, len(code(fresh)) + 1))
    assert not [o for cell in code(fresh) for o in cell.outputs if o.output_type == "error"]


def test_nothing_is_complained_of(fresh):
    assert not [cell.source for cell in code(fresh) if "stderr" in kinds(cell)]


def test_what_is_claimed_to_be_equal_is(stored, fresh):
    claims = [i for i, cell in enumerate(code(stored)) if result(cell) == "True"]

    assert len(claims) == 3  # the shared experts, the policy, unwrap
    assert [result(code(fresh)[i]) for i in claims] == ["True"] * 3


def test_what_is_stored_is_what_the_cells_show(stored, fresh):
    for old, new in zip(code(stored), code(fresh), strict=True):
        assert old.execution_count == new.execution_count
        if find_spec("matplotlib") or "matplotlib" not in old.source:
            assert kinds(old) == kinds(new), old.source


def test_a_figure_and_tables_are_stored(stored):
    shown = [kinds(cell) for cell in code(stored)]

    assert sum("image/png" in kind for kind in shown) == 1
    assert sum("text/html" in kind for kind in shown) == 3


def test_nothing_stored_tells_of_a_machine(stored):
    found = [match[0] for text in texts(stored) for match in LOCAL_PATH.finditer(text)]

    assert not found
    assert stored.metadata == run_notebook.METADATA
    assert not any(cell.metadata for cell in stored.cells)


@pytest.mark.parametrize(
    "text",
    [
        "/home/ann/model",
        "in '/tmp/ipykernel_1/2.py'",
        "path=/usr/lib",
        "~/.cache/hub",
        "file:///srv/x",
        "C:\\Users\\ann",
        "a\n/opt/venv/lib",
        "<td>/srv/models</td>",
        "&#x27;/srv/models&#x27;",
    ],
)
def test_a_local_path_would_be_found(text):
    assert LOCAL_PATH.search(text)


@pytest.mark.parametrize(
    "text",
    ["../tests/assets/tiny-moe", "12 tokens/s", "GB/s, MB/token", "Qwen/Qwen3-30B-A3B", "</td>"],
)
def test_what_is_no_local_path_is_left_alone(text):
    assert not LOCAL_PATH.search(text)


def test_a_cell_that_fails_is_an_error():
    with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
        run_notebook.run(new_notebook(cells=[new_code_cell("1 / 0")]))
