"""Figures can be drawn from what the simulator returns, and say what they show."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")

import figures
from hybrimoe.errors import ConfigError
from hybrimoe.simulation import plots
from hybrimoe.simulation.foreign import read_trace
from hybrimoe.simulation.simulator import Result, simulate

CUT = Path(__file__).parent / "assets" / "traces" / "gptoss20b_cut.npz"


@pytest.fixture(scope="module")
def result() -> Result:
    return simulate(read_trace(CUT).select(range(6)), "laptop", spans=True)


def texts(figure) -> set[str]:
    return {text.get_text() for text in figure.axes[0].texts}


def test_a_layers_timeline_has_three_lanes_and_names_its_experts(result):
    figure = figures.draw_layer(result.spans, 12, 5)
    axes = figure.axes[0]

    assert [label.get_text() for label in axes.get_yticklabels()] == ["CPU", "link", "GPU"]
    assert "microseconds" in axes.get_xlabel()
    asked = {f"e{e}" for e in read_trace(CUT).loads(5)[12].experts}
    assert {text.split(" ")[0] for text in texts(figure)} & asked
    starts = [patch.get_x() for patch in axes.patches]
    assert min(starts) >= 0


def test_a_timeline_of_nothing_is_refused(result):
    with pytest.raises(ConfigError, match="no layer 99"):
        figures.draw_layer(result.spans, 99)
    with pytest.raises(ConfigError, match="step 7"):
        figures.draw_layer(result.spans, 0, 7)


@pytest.mark.parametrize("ending", ["png", "svg", "pdf"])
def test_figures_are_saved_whole(result, tmp_path, ending):
    plots.save(plots.draw_lanes([result]), tmp_path / f"lanes.{ending}")

    assert [path.name for path in tmp_path.iterdir()] == [f"lanes.{ending}"]


def test_an_unknown_kind_of_file_is_refused(result, tmp_path):
    with pytest.raises(ConfigError, match="must end in one of"):
        plots.save(plots.draw_lanes([result]), tmp_path / "lanes.doc")
    assert not list(tmp_path.iterdir())


def test_axes_have_units():
    heat = plots.draw_heatmap(np.full((3, 8), 0.125), "m").axes
    hits = figures.draw_hit_rates([0.25, 0.5], {"Belady": [0.8, 0.9], "LRU": [0.6, 0.8]}).axes[0]
    beside = figures.draw_beside(["a", "b"], [1.0, 2.0], [1.1, 2.0], "seconds").axes[0]

    assert heat[1].get_ylabel().startswith("% of the layer's tokens")
    assert (hits.get_xlabel(), hits.get_ylabel()) == ("resident experts, % of all", "hit rate, %")
    assert beside.get_ylabel() == "seconds"
    assert {"+10%", "+0%"} == {text.get_text() for text in beside.texts}


def luminance(colour: str) -> float:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return 0.299 * red + 0.587 * green + 0.114 * blue


def test_lanes_differ_in_grey_or_hatching():
    lanes = ("GPU", "CPU", "LINK")
    shades = sorted(luminance(plots.COLOURS[lane]) for lane in lanes)

    assert min(b - a for a, b in zip(shades, shades[1:])) > 30
    assert len(set(plots.HATCHES.values())) == len(plots.HATCHES)
