"""Every mutation still fits the source, so that `mutate.py` keeps meaning something."""

import pytest
from mutate import MUTATIONS, ROOT


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_text_to_break_occurs_once_and_its_tests_exist(mutation):
    text = (ROOT / "src" / "hybrimoe" / mutation.file).read_text()
    assert text.count(mutation.before) == 1
    assert mutation.after != mutation.before
    assert all((ROOT / test).exists() for test in mutation.tests.split())
