"""Cost models: their laws, their file, and learning from measurements."""

import json
import math

import numpy as np
import pytest
from policy_cases import make_cost

from hybrimoe.errors import ProfileError
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.profiles import PROFILES, SHAPES, Profile, profile, rates_of, shape
from hybrimoe.policy.timeline import Lane, Span


def test_the_three_laws() -> None:
    cost = make_cost(gpu_launch=0.25, link_latency=0.5)
    assert cost.cpu(3) == 0.5 + 1.0 + 3.0
    assert cost.cpu(3, first=False) == 4.0
    assert cost.gpu(1) == 1.25
    assert cost.gpu(16) == 2.25
    assert cost.link(100) == 4.5


def test_contended_numbers_are_used_when_asked_for() -> None:
    cost = make_cost(cpu_expert_contended=3.0, link_bandwidth_contended=12.5)
    assert cost.cpu(1, contended=True) == 4.5
    assert cost.link(100, contended=True) == 8.0


def test_a_file_gives_back_the_same_model(tmp_path) -> None:
    cost = make_cost(shards=8)
    cost.save(tmp_path / "cost.json")
    assert CostModel.load(tmp_path / "cost.json") == cost
    assert [p.name for p in tmp_path.iterdir()] == ["cost.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "cost.json"
    make_cost().save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        make_cost(cpu_first=9.0).save(path)
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cpu_expert": 0}, "cpu_expert must be positive, got 0"),
        ({"link_bandwidth": -1.0}, "link_bandwidth must be positive, got -1.0"),
        ({"gpu_read": math.nan}, "gpu_read must be a finite number, got nan"),
        ({"cpu_first": -0.1}, "cpu_first must be at least 0"),
        ({"gpu_token": "fast"}, "gpu_token must be a finite number, got 'fast'"),
        ({"speed": 1.0}, "speed is no field"),
        ({"version": 9}, "version must be 1, got 9"),
    ],
)
def test_an_impossible_number_is_named(change, message) -> None:
    with pytest.raises(ProfileError, match=message):
        CostModel.from_dict(make_cost().to_dict() | change)


def test_a_missing_number_is_named() -> None:
    numbers = make_cost().to_dict()
    del numbers["gpu_read"]
    with pytest.raises(ProfileError, match="gpu_read is missing"):
        CostModel.from_dict(numbers)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"cost"'])
def test_a_file_that_is_no_model_is_refused(tmp_path, text: str) -> None:
    (tmp_path / "cost.json").write_text(text)
    with pytest.raises(ProfileError):
        CostModel.load(tmp_path / "cost.json")


def test_measured_spans_pull_each_lane_by_itself() -> None:
    cost = make_cost()
    spans = [
        Span(Lane.CPU, 0.0, 2 * (0.5 + 2 + 4), "cpu", experts=2, tokens=4),
        Span(Lane.LINK, 0.0, 4.0, "copy", bytes=100),
    ]
    whole = cost.refined(spans, weight=1.0)
    assert whole.cpu(1) == pytest.approx(2 * cost.cpu(1))
    assert whole.link(100) == pytest.approx(4.0)
    assert whole.gpu(1) == cost.gpu(1)
    part = cost.refined(spans, weight=0.1)
    assert cost.cpu(1) < part.cpu(1) < 1.1 * cost.cpu(1)


def test_refining_approaches_the_truth() -> None:
    truth, cost = make_cost(link_bandwidth=10.0), make_cost()
    for _ in range(60):
        cost = cost.refined([Span(Lane.LINK, 0.0, truth.link(100), "copy", bytes=100)])
    assert cost.link(100) == pytest.approx(truth.link(100), rel=0.01)


def test_the_first_cost_of_a_layer_on_the_gpu_is_learnt_with_the_rest() -> None:
    cost = make_cost(gpu_first=3.0)
    span = Span(Lane.GPU, 0.0, 2 * (3.0 + 2 * cost.gpu(1)), "experts", experts=2, tokens=2)
    learnt = cost.refined([span], weight=1.0)
    assert (learnt.gpu_first, learnt.gpu(1)) == (6.0, 2 * cost.gpu(1))


def test_an_interrupted_span_moves_nothing() -> None:
    cost = make_cost()
    right = [Span(Lane.CPU, 0.0, cost.cpu(1), "cpu", experts=1, tokens=1)] * 9
    late = Span(Lane.CPU, 0.0, 100 * cost.cpu(1), "cpu", experts=1, tokens=1)
    assert cost.refined([*right, late], weight=1.0) == cost


def test_spans_that_took_or_did_nothing_move_nothing() -> None:
    cost = make_cost()
    spans = [Span(lane, 0.0, 0.0, "", experts=1, tokens=1) for lane in Lane]
    spans += [Span(Lane.GPU, 0.0, 1.0, "no expert"), Span(Lane.POLICY, 0.0, 1.0, "plan")]
    assert cost.refined(spans, weight=1.0) == cost


def test_the_source_is_for_people_only(tmp_path) -> None:
    cost = make_cost(source="a stopwatch")
    assert cost == make_cost()
    cost.save(tmp_path / "cost.json")
    assert CostModel.load(tmp_path / "cost.json").source == "a stopwatch"
    assert cost.refined([Span(Lane.LINK, 0.0, 9.0, "", bytes=100)]).source == "a stopwatch"
    with pytest.raises(ProfileError, match="source must be a text, got 3"):
        make_cost(source=3)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("model", SHAPES)
def test_a_measured_machine_can_be_simulated_with_other_experts(name: str, model: str) -> None:
    here, like = profile(name), shape("qwen3-30b-a3b")
    machine = rates_of(here.cost(like), like, "this machine")
    expected, found = here.cost(shape(model)), machine.cost(shape(model))
    assert found.vector == pytest.approx(expected.vector, rel=1e-6)
    assert found.dense(100) == pytest.approx(expected.dense(100), rel=1e-6)
    assert Profile.from_dict(machine.to_dict()).name == "this machine"


def test_a_cost_of_nothing_becomes_the_least_cost() -> None:
    machine = rates_of(make_cost(cpu_first=0, cpu_token=0, gpu_token=0), shape("mixtral-8x7b"), "m")
    assert machine.cpu_first_s > 0
    assert np.isfinite(machine.cpu_rate)


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("model", SHAPES)
def test_every_profile_prices_every_shape(name: str, model: str) -> None:
    cost = profile(name).cost(shape(model))
    assert cost.gpu(1) < cost.cpu(1) < 1.0
    assert cost.cpu(1, contended=True) >= cost.cpu(1)
    assert json.loads(json.dumps(cost.to_dict()))["expert_bytes"] == shape(model).expert_bytes


def test_a_profile_gives_itself_back_and_names_what_is_wrong() -> None:
    numbers = profile("laptop").to_dict()
    assert Profile.from_dict(numbers) == profile("laptop")
    with pytest.raises(ProfileError, match="cpu_rate must be a positive number, got 0"):
        Profile.from_dict(numbers | {"cpu_rate": 0})
    with pytest.raises(ProfileError, match="wheels is no field"):
        Profile.from_dict(numbers | {"wheels": 4})
    del numbers["layer_s"]
    with pytest.raises(ProfileError, match="layer_s is missing"):
        Profile.from_dict(numbers)
    with pytest.raises(ProfileError, match="profile must be one of"):
        profile("abacus")
    with pytest.raises(ProfileError, match="model must be one of"):
        shape("abacus")


def test_the_vector_cannot_disagree_with_the_fields() -> None:
    assert make_cost(cpu_token=7.0).vector[2] == 7.0
    assert np.isfinite(make_cost().vector).all()
