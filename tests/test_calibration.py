"""Measuring a machine: what is timed, what stands in, and when."""

import dataclasses
import functools
import json
import time

import huggingface_hub
import numpy as np
import pytest
import torch

import hybrimoe
from hybrimoe import session
from hybrimoe.calibration import measure as calibration
from hybrimoe.calibration import pool_cost, probes
from hybrimoe.calibration import store as calibration_cache
from hybrimoe.calibration.measure import Subject, fingerprint, measure, stand_in
from hybrimoe.cli import calibrate as calibration_commands
from hybrimoe.cli.main import main
from hybrimoe.errors import ConfigError, InsufficientMemoryError, ProfileError, WrappedModelError
from hybrimoe.formats.gate import Gate
from hybrimoe.formats.layout import expert_layout
from hybrimoe.kernels.cpu.run_layer import PackedLayer
from hybrimoe.policy.profiles import SHAPES, Profile
from hybrimoe.runtime.devices.emulated import EmulatedAccelerator
from hybrimoe.runtime.pool import ExpertPool

LATENCY_S, LINK = 10e-6, 2e9
FIRST_S, READ_S, TOKEN_S, LAUNCH_S = 50e-6, 30e-6, 3e-6, 5e-6


class Clockwork(EmulatedAccelerator):
    """An accelerator that claims to be hardware, and whose operations take what a law says."""

    name = "clockwork"
    measured = True

    def __init__(self, slots: int = 10**6) -> None:
        super().__init__()
        self.most, self.allocated = slots, []
        self.began: dict[int, tuple[float, float]] = {}

    def allocate(self, slots, slot_bytes):
        self.allocated.append(slots)
        if slots > self.most:
            raise InsufficientMemoryError(f"{slots} slots do not fit")
        super().allocate(slots, slot_bytes)

    def copy(self, source, slot, first, after):
        event = super().copy(source, slot, first, after)
        return self._takes(event, LATENCY_S + source.size / LINK)

    def experts(self, layer, x, slots, weights, shards, out, after):
        event = super().experts(layer, x, slots, weights, shards, out, after)
        used = np.unique(slots).size
        return self._takes(event, FIRST_S + used * (max(READ_S, TOKEN_S * len(x)) + LAUNCH_S))

    def span(self, event):
        return self.began[id(event)]

    def _takes(self, event, seconds):
        now = time.perf_counter()
        self.began[id(event)] = now, now + seconds
        return event


@pytest.fixture(autouse=True)
def quickly(tmp_path, monkeypatch):
    """A cache of assets of its own, and measurements of milliseconds."""
    here = functools.partial(huggingface_hub.cached_assets_path, assets_dir=tmp_path)
    monkeypatch.setattr(calibration_cache, "cached_assets_path", here)
    monkeypatch.setattr(calibration_cache, "TRUSTED", 10.0)  # busy machines run these tests too
    for name in ("CPU_S", "GPU_S", "LINK_S"):
        monkeypatch.setattr(calibration, name, 0.02)
    monkeypatch.setattr(probes, "ROTATED", 1 << 20)
    monkeypatch.setitem(SHAPES, "tiny", SHAPES["qwen3-30b-a3b"].__class__(64, 32, 64))
    monkeypatch.setattr(calibration_commands, "SHAPES", ("tiny",))


@pytest.fixture
def wrapped(model):
    hybrimoe.wrap(model, weights="int8", device="cpu", threads=1)
    return model


def subject(experts: int = 16) -> Subject:
    layout = expert_layout("float32", 64, 32, True, False)
    blobs = np.zeros((experts, layout.expert_bytes), np.uint8)
    layer = PackedLayer("float32", layout, Gate(0), 64, blobs)
    return Subject("float32", layout, lambda: [layer])


def test_gpu_and_link_are_what_their_clocks_say():
    accelerator = Clockwork()
    cost = measure(subject(), accelerator, 1).cost

    for tokens in (1, 4, 64):
        expected = max(READ_S, TOKEN_S * tokens) + LAUNCH_S
        assert cost.gpu(tokens) == pytest.approx(expected, rel=0.02)
    assert cost.gpu_first == pytest.approx(FIRST_S, rel=0.02)
    assert cost.link_latency == pytest.approx(LATENCY_S, rel=0.02)
    assert cost.link_bandwidth == pytest.approx(LINK, rel=0.1)
    assert "clockwork" in cost.source
    assert cost.cpu_expert <= cost.cpu_expert_contended
    assert cost.expert_bytes == subject().layout.expert_bytes


def test_an_accelerator_is_left_as_it_was_even_if_measuring_fails(monkeypatch):
    accelerator = Clockwork()
    measure(subject(), accelerator, 1)
    assert accelerator.allocated[-1] == 0
    assert not accelerator.pinned

    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(probes, "gpu_samples", fail)
    with pytest.raises(RuntimeError, match="broken"):
        measure(subject(), accelerator, 1)
    assert accelerator.allocated[-1] == 0
    assert not accelerator.pinned


def test_where_memory_cannot_be_pinned_copies_are_measured_pageable():
    accelerator = Clockwork()

    def refuse(operation: str) -> None:
        if operation == "pin":
            raise InsufficientMemoryError("no more locked pages")

    accelerator.fault = refuse
    cost = measure(subject(), accelerator, 1).cost
    assert cost.link_bandwidth == pytest.approx(LINK, rel=0.1)


def test_fewer_slots_are_taken_where_memory_is_short():
    accelerator = Clockwork(slots=3)
    cost = measure(subject(), accelerator, 1).cost
    assert cost.gpu(1) == pytest.approx(READ_S + LAUNCH_S, rel=0.02)
    with pytest.raises(InsufficientMemoryError):
        measure(subject(), Clockwork(slots=0), 1)


def test_without_an_accelerator_the_cpu_is_measured_and_the_rest_stands_in():
    measured, shipped = measure(subject(), None, 1).cost, stand_in(subject().layout)
    assert measured.gpu_read == shipped.gpu_read
    assert measured.link_bandwidth == shipped.link_bandwidth
    assert measured.cpu(1) != shipped.cpu(1)
    assert "shipped desktop profile" in measured.source
    assert "nothing is measured" in shipped.source


def test_with_one_core_contention_is_that_of_the_stand_in(monkeypatch):
    monkeypatch.setattr(calibration, "usable_cores", lambda: 1)
    measured, shipped = measure(subject(), None, 1).cost, stand_in(subject().layout)
    ratio = shipped.cpu_expert_contended / shipped.cpu_expert
    assert measured.cpu_expert_contended == pytest.approx(ratio * measured.cpu_expert)


def test_the_copying_thread_gets_a_core_of_its_own(monkeypatch):
    used = []
    monkeypatch.setattr(calibration, "usable_cores", lambda: 4)

    def samples(layers, threads, budget_s, traffics=(None,)):
        used.append((threads, len(traffics)))
        return [[probes.Sample(1, 1, 1e-3)] for _ in traffics]

    monkeypatch.setattr(probes, "cpu_samples", samples)
    for threads, expected in ((4, [(3, 2), (4, 1)]), (2, [(2, 2)])):
        used.clear()
        measure(subject(), None, threads)
        assert used == expected


def test_a_fingerprint_tells_apart_what_costs_differ_by():
    layout = expert_layout("float32", 128, 32, True, False)
    keys = [
        fingerprint(subject(), None, 1),
        fingerprint(subject(), None, 2),
        fingerprint(subject(), Clockwork(), 1),
        fingerprint(subject()._replace(layout=layout), None, 1),
        fingerprint(subject()._replace(fmt="int8"), None, 1),
    ]
    texts = {json.dumps(key) for key in keys}
    assert len(texts) == len(keys)
    assert keys[0] == json.loads(json.dumps(keys[0]))
    assert {"torch", "numba", "hybrimoe", "cpu", "driver", "cores"} <= set(keys[0])


def test_a_named_shape_is_measured_once_per_machine(monkeypatch):
    cost = hybrimoe.calibrate(shape="tiny", weights="native", device="cpu", threads=1)
    monkeypatch.setattr(calibration, "measure", None)
    assert hybrimoe.calibrate(shape="tiny", weights="native", device="cpu", threads=1) == cost
    with pytest.raises(TypeError):
        hybrimoe.calibrate(shape="tiny", weights="native", device="cpu", threads=1, force=True)


def test_a_wrapped_model_is_measured_with_its_own_experts(wrapped):
    layer = wrapped.hybrimoe.pool.layers[0]
    before = layer.blobs.copy()
    cost = hybrimoe.calibrate(wrapped, device="cpu")
    assert cost.expert_bytes == layer.layout.expert_bytes
    assert cost.shards == layer.layout.shards
    assert "1 threads" in cost.source
    assert np.array_equal(layer.blobs, before)


def test_arguments_are_checked_before_anything_is_measured(wrapped, monkeypatch):
    monkeypatch.setattr(calibration, "measure", None)
    with pytest.raises(WrappedModelError, match=r"call hybrimoe\.wrap"):
        hybrimoe.calibrate(torch.nn.Linear(2, 2))
    with pytest.raises(ConfigError, match=r"weights is the wrapped model's own.*got 'int4'"):
        hybrimoe.calibrate(wrapped, weights="int4")
    with pytest.raises(ConfigError, match="weights must be one of native, int8, int4, got 'int3'"):
        hybrimoe.calibrate(weights="int3")
    with pytest.raises(ConfigError, match="threads must be a positive integer or None, got 0"):
        hybrimoe.calibrate(threads=0)
    with pytest.raises(ConfigError, match="device must be one of auto, cpu, cuda, got 'tpu'"):
        hybrimoe.calibrate(device="tpu")
    with pytest.raises(ProfileError, match="model must be one of"):
        hybrimoe.calibrate(shape="abacus")
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="device='cuda' needs a CUDA device"):
            hybrimoe.calibrate(device="cuda")


def wrap_on(monkeypatch, model, accelerator, gpu_first=0.0, **settings):
    """Wrap, and tell which accelerators were measured."""
    asked = []

    def calibrated(subject, accelerator, threads):
        asked.append((accelerator, threads))
        return dataclasses.replace(stand_in(subject.layout), gpu_first=gpu_first)

    monkeypatch.setattr(pool_cost, "calibrated", calibrated)
    monkeypatch.setattr(session, "open_accelerator", lambda config: accelerator)
    hybrimoe.wrap(model, device="emulated", vram=0.25, threads=1, **settings)
    return asked


def test_a_wrap_measures_an_accelerator_whose_times_mean_something(monkeypatch, model):
    accelerator = Clockwork()
    assert wrap_on(monkeypatch, model, accelerator) == [(accelerator, 1)]


@pytest.mark.parametrize(("gpu_first", "used"), [(0.0, True), (10.0, False)])
def test_plans_know_how_long_an_accelerator_takes_to_start(monkeypatch, model, gpu_first, used):
    wrap_on(monkeypatch, model, Clockwork(), gpu_first=gpu_first, preset="hybrimoe")
    model(torch.arange(4)[None])
    assert (model.hybrimoe.stats()["hybrid"]["gpu_experts"] > 0) is used


def test_an_emulated_accelerator_is_never_timed(monkeypatch, model):
    assert wrap_on(monkeypatch, model, EmulatedAccelerator(1 << 40)) == []
    assert "nothing is measured" in model.hybrimoe.hybrid.cost.source


def test_deterministic_placement_uses_a_fixed_table(monkeypatch, model):
    assert wrap_on(monkeypatch, model, Clockwork(), deterministic=True) == []
    assert "nothing is measured" in model.hybrimoe.hybrid.cost.source


def test_a_deck_deals_every_expert_before_any_comes_back():
    layers = subject().make() * 2
    deck = probes.Deck(layers)
    for _ in range(3):
        dealt = [deck.deal(4)[1] for _ in range(8)]
        for half in (dealt[:4], dealt[4:]):
            assert sorted(np.concatenate(half).tolist()) == list(range(16))


def test_memory_traffic_flows_only_between_start_and_stop():
    with probes.MemoryTraffic() as traffic:
        target, source = traffic._target, traffic._source
        for value in (2, 3):
            source[:] = value
            traffic.start(0.0)
            while target.min() != value:
                time.sleep(0.001)
            traffic.stop(0.0, 0.0)
            source[:] = 9
            time.sleep(0.01)
            assert target.max() == value
    assert not traffic._thread.is_alive()


def test_only_copies_within_the_cpus_work_count_as_contended():
    accelerator = Clockwork()
    accelerator.allocate(1, 8)
    traffic = probes.LinkTraffic(accelerator, np.zeros((2, 8), np.uint8), copy_s=1.0)
    traffic.start(2.0)
    events = traffic._events
    assert len(events) == 5
    spans = [(9, 11), (11, 13), (13, 16), (19, 21), (21, 23)]
    accelerator.began = {id(event): span for event, span in zip(events, spans)}
    traffic.stop(10, 20)
    assert [sample.seconds for sample in traffic.samples] == [2, 3]
    assert all(event.done for event in events)


def test_runs_that_would_take_too_long_are_left_to_the_law():
    some = probes.cpu_samples(subject().make(), 1, 1e-6)[0]
    assert [(sample.experts, sample.tokens) for sample in some] == [(1, 1)]
    every = probes.cpu_samples(subject(4).make(), 1, 10.0 * 0.001 + 0.05)[0]
    assert max(sample.experts for sample in every) <= 4


def test_the_command_writes_what_the_simulator_reads(capsys, tmp_path):
    out = tmp_path / "machine.json"
    arguments = ["calibrate", "--shape", "tiny", "--device", "cpu", "-o", str(out)]
    assert main([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert Profile.from_dict(json.loads(out.read_text())).to_dict() == found["profile"]
    assert found["cost"]["cpu_expert"] > 0

    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert "tiny int4" in text
    assert "shipped desktop profile" in text
    with pytest.raises(SystemExit):
        main(["calibrate", "--threads", "0"])


def test_experts_on_the_disk_are_measured_on_random_ones_of_their_layout(monkeypatch):
    monkeypatch.setattr(probes, "ROTATED", 1 << 16)
    pool, layout = ExpertPool(), expert_layout("int4", 64, 64, True, False)
    placeholders = np.full((4, layout.expert_bytes), 0xFF, np.uint8)
    pool.add(PackedLayer("int4", layout, Gate(0), 64, placeholders))
    pool.tier = object()
    subject = calibration.pooled_subject(pool)
    assert subject.layout == layout
    assert all((found.blobs != 0xFF).any() for found in subject.make())
