"""The tokens per second that a plan names: what they count, and where they are from."""

import dataclasses

import pytest
import torch

import hybrimoe
from hybrimoe.formats.gate import Gate
from hybrimoe.memory import speed
from hybrimoe.models.bytes import Footprint
from hybrimoe.models.forward import ForwardMemory
from hybrimoe.models.spec import ExpertSpec
from hybrimoe.policy.cost import CostModel
from paths import TINY_MOE

BYTE_S = 1e-10
"""Seconds per byte of experts in `kept`."""


@pytest.fixture
def kept(monkeypatch) -> CostModel:
    """A calibration of this machine by which reading is all that experts cost."""
    cost = CostModel(1e-5, BYTE_S * 4096, 0, 1, 1, 0, 0, 1, 4096, 1, 1, source="measured here")
    monkeypatch.setattr(speed, "kept", lambda key: cost)
    return cost


@pytest.fixture
def nothing_kept(monkeypatch) -> None:
    monkeypatch.setattr(speed, "kept", lambda key: None)


def footprint(dense: int = 0, operations: int = 0, **changes) -> Footprint:
    """Two layers of 16 experts, two of which each token activates."""
    shape = ExpertSpec(
        *("", 16, 512, 256, True, False, torch.bfloat16, Gate(0), ()), 16 * 3 * 512 * 256 * 2
    )
    layers = (dataclasses.replace(shape, **changes),) * 2
    return Footprint(layers, 2, dense, dense, 64, ForwardMemory(0, 0, True, operations))


def seconds(found: Footprint, weights: str = "int4") -> float:
    return 1 / speed.expected_speed(found, weights, 0).decode_tokens_s


def test_it_comes_from_this_machines_calibration_if_there_is_one(kept):
    found = hybrimoe.plan(TINY_MOE).speed

    assert (found.measured, found.source) == (True, "measured here")


def test_without_one_it_says_so_and_asks_for_it(nothing_kept):
    found = hybrimoe.plan(TINY_MOE)

    assert not found.speed.measured
    assert "shipped desktop profile, nothing is measured" in found.speed.source
    assert "run `hybrimoe calibrate`" in str(found)


def test_few_cores_are_not_taken_for_the_eight_of_the_profile(nothing_kept, monkeypatch):
    rates, sources = [], []
    for cores in (1, 2, 8, 16):
        monkeypatch.setattr(speed.launch, "threads", lambda cores=cores: cores)
        found = speed.expected_speed(footprint(dense=10**9), "int4", 0)
        rates.append(found.decode_tokens_s)
        sources.append(found.source)

    assert rates[0] < rates[1] < rates[2] == rates[3]
    assert rates[1] == pytest.approx(2 * rates[0], rel=0.01)
    assert ["scaled to" in source for source in sources] == [True, True, False, False]


def test_every_part_of_a_token_is_counted(kept):
    read = 2 * 2 * footprint().layers[0].layout("int4").expert_bytes * BYTE_S
    handed = 2 * speed.LAYER_S
    share = speed.TORCH_SHARE[torch.bfloat16] / speed.read_share("int4")

    assert seconds(footprint()) == pytest.approx(read + handed)
    host = seconds(footprint(operations=100)) - seconds(footprint())
    assert host == pytest.approx(100 * speed.OPERATION_S)
    dense = seconds(footprint(dense=10**8)) - seconds(footprint())
    assert dense == pytest.approx(10**8 * BYTE_S / share)


@pytest.mark.parametrize(
    ("found", "bound"),
    [
        (footprint(operations=1000), "Python and torch"),
        (footprint(dense=10**9), "torch's dense layers"),
        (footprint(hidden=8192, inner=8192), "DRAM"),
    ],
)
def test_what_takes_most_of_the_time_is_named(kept, found, bound):
    assert speed.expected_speed(found, "native", 0).bound == bound


def test_the_format_that_files_prescribe_is_the_one_that_is_read(kept):
    mixed = footprint()
    one = dataclasses.replace(mixed.layers[0], kept="int8")
    mixed = dataclasses.replace(mixed, layers=(one, dataclasses.replace(one, kept="int4")))
    got = seconds(mixed) - 2 * speed.LAYER_S
    narrow, wide = (footprint(kept=fmt).packed_bytes("native") for fmt in ("int4", "int8"))

    assert mixed.packed_bytes("native") == (narrow + wide) / 2
    assert got == pytest.approx(2 * 2 * BYTE_S * (narrow + wide) / 2 / 32)


def test_more_slots_on_a_gpu_are_expected_to_be_faster(nothing_kept):
    found = [hybrimoe.plan(TINY_MOE, vram=share, weights="int4").speed for share in (0.1, 0.5, 1.0)]
    rates = [speed.decode_tokens_s for speed in found]

    assert rates == sorted(rates)
    assert {speed.bound for speed in found} <= {"DRAM", "the CPU", "the GPU", "the link"}
