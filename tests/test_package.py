"""What `import hybrimoe` offers, and what it does not cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import hybrimoe


def test_importing_costs_nothing_until_something_is_asked_for():
    code = "import sys, hybrimoe; print({'numba', 'torch', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)

    assert done.stdout == "set()\n"


def test_every_public_name_can_be_had_from_where_type_checkers_see_it():
    tree = ast.parse(Path(hybrimoe.__file__).read_text())
    seen = {
        node.module: tuple(alias.name for alias in node.names)
        for branch in tree.body
        if isinstance(branch, ast.If)  # TYPE_CHECKING
        for node in branch.body
        if isinstance(node, ast.ImportFrom)
    }

    assert seen == hybrimoe._HOMES
    assert sorted(name for names in seen.values() for name in names) == hybrimoe.__all__
    for name in hybrimoe.__all__:
        assert getattr(hybrimoe, name).__module__.startswith("hybrimoe.")
        assert name in dir(hybrimoe)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'hybrimoe' has no attribute 'rap'"):
        hybrimoe.rap  # noqa: B018
