"""Settings of the whole suite and the bundled model."""

import os
import shutil
import sys
import tempfile
import warnings

# Read when torch loads OpenMP: spinning workers slow each other down on busy machines.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network
# Packed models are kept beside the cache of the hub: not beside the user's.
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="hybrimoe-tests-")
os.environ["HF_HUB_CACHE"] = os.path.join(os.environ["HF_HOME"], "hub")

import pytest
import torch
from hypothesis import Phase, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizer
from transformers.utils import logging

from hybrimoe.models.releases import warn_if_untested
from paths import TINY_MOE

logging.disable_progress_bar()
families: list[str] = []
"""What the workers measured, a line per family."""
with warnings.catch_warnings():  # these tests are what a newer transformers is tried with
    warnings.simplefilter("ignore")
    warn_if_untested()
# For tests/mutations: there a failure is all that is asked for.
settings.register_profile("first-failure", phases=[Phase.explicit, Phase.generate])


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizer:
    return AutoTokenizer.from_pretrained(TINY_MOE)


@pytest.fixture
def model() -> PreTrainedModel:
    """A fresh tiny-moe in its own bfloat16."""
    return AutoModelForCausalLM.from_pretrained(TINY_MOE).eval()


@pytest.fixture
def model32() -> PreTrainedModel:
    """A fresh tiny-moe in float32."""
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()


def pytest_unconfigure() -> None:
    """Away with the cache of this run."""
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands what it measured to the process that prints."""
    parity, output = sys.modules.get("parity"), getattr(session.config, "workeroutput", None)
    if parity is not None and output is not None:
        output["families"] = [str(result) for result in parity.measured]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Take it from the worker."""
    families.extend(getattr(node, "workeroutput", {}).get("families", []))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line per family that was measured."""
    parity = sys.modules.get("parity")
    lines = families + [str(result) for result in (parity.measured if parity else [])]
    if lines:
        terminalreporter.section("families, wrapped against unwrapped")
        for line in lines:
            terminalreporter.write_line(line)
