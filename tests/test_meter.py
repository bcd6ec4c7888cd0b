"""What the lanes really did, and its export."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hybrimoe
from hybrimoe.errors import ConfigError
from hybrimoe.policy.timeline import Lane, Span
from hybrimoe.runtime.meter import Meter, Step
from paths import TINY_MOE


class Clock:
    """Stands for an accelerator whose operations end when told to."""

    def __init__(self) -> None:
        self.done: dict[str, tuple[float, float]] = {}

    def happened(self, event):
        return event in self.done

    def span(self, event):
        return self.done[event]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()


@pytest.fixture
def wrapped(model):
    yield hybrimoe.wrap(model, device="emulated", vram=0.25, trace=True)
    hybrimoe.unwrap(model)


@pytest.fixture
def generated(wrapped):
    inputs = AutoTokenizer.from_pretrained(TINY_MOE)("import os", return_tensors="pt")
    wrapped.generate(**inputs, max_new_tokens=8, do_sample=False)
    return wrapped.hybrimoe


def step(layer=0, start=0.0, cpu_end=1.0, launched=None, copied=False) -> Step:
    return Step(layer, start, cpu_end, launched, copied)


def test_an_operation_counts_once_it_happened_and_only_once():
    clock = Clock()
    meter = Meter(clock, 2, keep=True)
    meter.ordered("copy", Span(Lane.LINK, 0, 0, "e1", layer=1, bytes=8))
    meter.ended(step(), 1.0)
    assert meter.seconds.sum() == 0
    clock.done["copy"] = meter.origin + 3.0, meter.origin + 3.5
    for _ in range(2):
        meter.ended(step(), 1.0)
    assert meter.seconds[1, Lane.LINK] == pytest.approx(0.5)
    assert [span.start for span in meter.spans] == [pytest.approx(3.0)]


@pytest.mark.parametrize(
    ("end", "copied", "last"),
    [(0.5, True, Lane.CPU), (1.5, False, Lane.GPU), (1.5, True, Lane.LINK)],
)
def test_who_ended_last_is_known_once_the_accelerator_is_through(end, copied, last):
    clock = Clock()
    meter = Meter(clock, 1)
    meter.ended(step(launched="experts", copied=copied), 1.0)
    assert meter.held_up.sum() == 0
    clock.done["experts"] = meter.origin, meter.origin + end
    meter.settle()
    assert meter.held_up[0].tolist() == [int(lane == last) for lane in Lane]
    assert meter.wait[0] == pytest.approx(max(end - 1.0, 0.0))


def test_a_step_without_the_accelerator_ends_with_the_cpu():
    meter = Meter(Clock(), 1)
    meter.ended(step(), 1.0)
    assert meter.held_up[0, Lane.CPU] == 1


def test_lanes_and_counts_of_the_layers_add_up_to_the_totals(generated):
    counts = generated.stats()["hybrid"]
    for lane, total in counts["lane_s"].items():
        assert sum(layer[f"{lane.lower()}_s"] for layer in counts["layers"]) == pytest.approx(total)
        assert total > 0
    for name in ("hits", "misses", "late"):
        assert sum(layer[name] for layer in counts["layers"]) == counts[name]
    assert sum(counts["ended_last"].values()) == 12 * 8
    assert counts["lane_s"]["CPU"] + counts["lane_s"]["POLICY"] < counts["layer_s"]


def test_the_trace_holds_every_copy_and_launch_measured_and_predicted(generated, tmp_path):
    generated.export_trace(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    for lane in ("CPU", "GPU", "LINK"):
        for kind in ("measured", "predicted"):
            assert any(e["pid"] == kind and e["tid"] == lane and e["dur"] > 0 for e in spans)
    link = [e for e in spans if e["pid"] == "measured" and e["tid"] == "LINK"]
    assert sum(e["args"]["bytes"] for e in link) == generated.stats()["hybrid"]["link_bytes"]


def test_statistics_and_spans_start_anew(generated):
    generated.reset_stats()
    counts = generated.stats()["hybrid"]
    assert counts["layer_s"] == 0
    assert counts["bound_share"] is None
    assert all(not spans for spans in generated.hybrid.spans().values())


def test_without_trace_there_is_nothing_to_export(model, tmp_path):
    for settings in ({"device": "emulated"}, {"device": "cpu"}):
        hybrimoe.wrap(model, **settings)
        with pytest.raises(ConfigError, match=r"trace=True|accelerator"):
            model.hybrimoe.export_trace(tmp_path / "trace.json")
        hybrimoe.unwrap(model)
    assert not list(tmp_path.iterdir())
