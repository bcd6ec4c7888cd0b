"""The committed cut of real routing."""

from pathlib import Path

import pytest

from hybrimoe.policy.routing import RoutingTrace
from hybrimoe.policy.sources import read_trace

CUT = Path(__file__).parents[1] / "assets" / "traces" / "gptoss20b_cut.npz"


@pytest.fixture(scope="session")
def cut() -> RoutingTrace:
    return read_trace(CUT)
