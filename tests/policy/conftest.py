"""The committed cut of real routing."""

from pathlib import Path

import pytest

from hybrimoe.simulation.foreign import read_trace
from hybrimoe.simulation.trace import RoutingTrace

CUT = Path(__file__).parents[1] / "assets" / "traces" / "gptoss20b_cut.npz"


@pytest.fixture(scope="session")
def cut() -> RoutingTrace:
    return read_trace(CUT)
