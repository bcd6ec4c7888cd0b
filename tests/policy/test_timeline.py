"""The timeline: lanes, forks, spans."""

from hybrimoe.policy.timeline import Lane, Span, Timeline, perfetto


def test_work_on_one_lane_queues_and_lanes_are_independent() -> None:
    timeline = Timeline()
    assert timeline.push(Lane.LINK, 2.0) == 2.0
    assert timeline.push(Lane.LINK, 1.0) == 3.0
    assert timeline.push(Lane.GPU, 1.0) == 1.0
    assert timeline.push(Lane.GPU, 1.0, after=5.0) == 6.0


def test_nothing_starts_before_now() -> None:
    timeline = Timeline(now=4.0)
    assert timeline.push(Lane.CPU, 1.0) == 5.0
    assert timeline.busy(Lane.CPU) == 1.0


def test_a_join_moves_the_clock_and_leaves_the_link_running() -> None:
    timeline = Timeline()
    timeline.push(Lane.LINK, 9.0)
    timeline.join(3.0)
    assert timeline.now == 3.0
    assert timeline.busy(Lane.LINK) == 6.0
    assert timeline.busy(Lane.GPU) == 0.0


def test_a_fork_leaves_the_original_alone() -> None:
    timeline = Timeline(trace=True)
    timeline.push(Lane.GPU, 1.0)
    fork = timeline.fork()
    fork.push(Lane.GPU, 5.0)
    assert timeline.free[Lane.GPU] == 1.0
    assert len(timeline.spans or ()) == 1
    assert fork.spans is None


def test_spans_export_to_one_track_per_lane_in_microseconds() -> None:
    spans = [Span(Lane.GPU, 1.0, 0.5, "experts", layer=3, experts=4, tokens=9)]
    *names, event = perfetto(spans)
    assert {n["args"]["name"] for n in names} == {"CPU", "GPU", "LINK", "POLICY"}
    assert (event["ts"], event["dur"], event["tid"]) == (1e6, 5e5, "GPU")
    assert event["args"]["layer"] == 3
