"""Settings of the whole suite and the bundled model."""

import os
import sys
import warnings

# Read when torch loads OpenMP: spinning workers slow each other down on busy machines.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here needs the network

import pytest
import torch
from hypothesis import Phase, settings
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizer
from transformers.utils import logging

from hybrimoe.runtime.releases import warn_if_untested
from paths import TINY_MOE

logging.disable_progress_bar()
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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """One line per family that was measured."""
    parity = sys.modules.get("parity")
    if parity is not None and parity.measured:
        terminalreporter.section("families, wrapped against unwrapped")
        for result in parity.measured:
            terminalreporter.write_line(str(result))
