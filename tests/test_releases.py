"""Which releases are supported, what is said of others, and names that differ between them."""

import re
import tomllib
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import hybrimoe
from hybrimoe.models import releases
from hybrimoe.models.releases import BELOW, NEWEST, OLDEST, cache_argument, cache_in, release_text

ROOT = Path(__file__).parents[1]
SOURCE = Path(hybrimoe.__file__).parent
NEXT = f"{NEWEST[0]}.{NEWEST[1] + 1}.0"


def floors() -> dict[str, str]:
    """The oldest release that pyproject.toml allows of each package that users or tests need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    needed = project["dependencies"] + [n for name in TRIED for n in extras[name]]
    return dict(re.match(r"([\w.-]+)>=([\d.]+)", line).groups() for line in needed)


TRIED = ("plot", "bench", "gguf", "test")
"""Extras whose floors are run; lm-eval asks for more than a test can install."""


def test_every_floor_is_run():
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    pins = dict(re.match(r"([\w.-]+)==([\d.]+)", line).groups() for line in lines if "==" in line)

    assert pins == {
        name: f"{floor}{'.0' * (2 - floor.count('.'))}" for name, floor in floors().items()
    }


def test_the_supported_releases_are_those_of_the_project_file():
    text = (ROOT / "pyproject.toml").read_text()

    assert f'"transformers>={release_text(OLDEST)},<{BELOW[0]}"' in text


@pytest.mark.parametrize(
    ("version", "says"),
    [
        (release_text(OLDEST), False),
        (f"{release_text(NEWEST)}.3", False),
        (NEXT, True),
        (f"{NEXT}.dev0", True),
        (f"{BELOW[0]}.0.0", False),  # pip refuses it, and so does the doctor
    ],
)
def test_only_a_release_that_came_after_the_tests_is_spoken_of(version, says):
    assert (releases.untested(version) is not None) is says


def test_a_newer_release_is_warned_of_at_the_first_wrap_only(monkeypatch, model):
    monkeypatch.setattr(releases.importlib.metadata, "version", lambda name: NEXT)
    releases.warn_if_untested.cache_clear()
    with pytest.warns(RuntimeWarning, match=rf"transformers {NEXT} is newer than .*verify"):
        hybrimoe.wrap(model, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hybrimoe.wrap(hybrimoe.unwrap(model), device="cpu")


def test_a_tested_release_is_not_warned_of(monkeypatch):
    monkeypatch.setattr(releases.importlib.metadata, "version", lambda name: release_text(NEWEST))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        releases.warn_if_untested.__wrapped__()


def test_the_cache_is_found_under_every_name_and_the_newest_first():
    assert cache_in({"cache": None, "past_key_values": 2}) == 2
    assert cache_in({"past_key_values": 2, "cache": 1}) == 1
    assert cache_in({"cache_params": 3}) == 3
    assert cache_in({"logits": 4}) is None


def test_looking_for_the_cache_of_an_output_asks_for_no_old_name(model, caplog, recwarn):
    out = model(torch.arange(5)[None], use_cache=True)
    cache = cache_in(out)
    model(torch.tensor([[7]]), **cache_argument(model, cache))

    assert cache.get_seq_length() == 6
    assert "deprecated" not in caplog.text
    assert not [w for w in recwarn if "deprecated" in str(w.message)]


class Before(nn.Module):
    """A model of an earlier release."""

    def forward(self, input_ids, past_key_values=None):
        return input_ids


def test_an_earlier_model_gets_its_cache_by_the_earlier_name():
    assert cache_argument(Before(), 1) == {"past_key_values": 1}


def test_only_one_file_spells_what_was_renamed():
    converters = {*releases.CONVERTER_STATE} - {"base_model_prefix"}  # models have one too, as ever
    names = re.compile("|".join({*releases.CACHE_NAMES[1:], *converters}))
    spelt = {p.name for p in SOURCE.rglob("*.py") if names.search(p.read_text())}

    assert spelt == {"releases.py"}
