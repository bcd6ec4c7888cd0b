"""Figures of benchmarks only: one layer's spans, hit rates, bars beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from hybrimoe.errors import ConfigError
from hybrimoe.policy.timeline import Lane, Span
from hybrimoe.simulation.plots import COLOURS, HATCHES, NAMES, plain

INK = {"GPU": "white", "CPU": "black", "LINK": "black", "POLICY": "black"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
ROWS = ("CPU", "LINK", "GPU")  # of a timeline, from the bottom
PAST_JOIN = 1.06  # how far a timeline goes on
WIDE_ENOUGH = 0.008  # share of a timeline that one letter of a label takes


def draw_layer(spans: Sequence[Span], layer: int, step: int = 0, title: str = "") -> Any:
    """One layer's timeline: what GPU, link and CPU do from the end of its router to its join.

    spans: of a replay, as `simulate(..., spans=True)` returns them; step: which of its steps.
    """
    start, end = _window(spans, layer, step)
    width = (end - start) * 1e6
    figure = Figure(figsize=(9, 2.5))
    axes = figure.add_subplot()
    for span in _merged(spans):
        if span.lane is not Lane.POLICY and span.start < end and span.start + span.seconds > start:
            _block(axes, span, layer, start, width)
    axes.axvline(width, color="black", linewidth=1.2, linestyle="--")
    axes.text(width, 2.62, "join", ha="center", fontsize=8)
    axes.set_yticks(range(3), [NAMES[lane] for lane in ROWS])
    axes.set_xlim(0, width * PAST_JOIN)
    axes.set_ylim(-0.5, 2.55)
    axes.set_xlabel("microseconds since the layer's router was done")
    axes.set_title(title or f"layer {layer}", fontsize=10, loc="left", pad=12)
    plain(axes)
    return figure


def draw_hit_rates(
    residency: Sequence[float], rates: Mapping[str, Sequence[float]], title: str = ""
) -> Any:
    """Hit rate against the share of experts that are resident; "Belady" is drawn as a bound."""
    figure = Figure(figsize=(6, 4))
    axes = figure.add_subplot()
    shares = 100 * np.asarray(residency)
    shades = np.linspace(0.0, 0.72, max(len(rates), 2))
    for i, (name, values) in enumerate(rates.items()):
        style: dict[str, Any] = {"marker": MARKERS[i % len(MARKERS)], "color": str(shades[i])}
        if name == "Belady":
            style = {"color": "black", "linestyle": "--", "linewidth": 1}
        label = "Belady (bound)" if name == "Belady" else name
        axes.plot(shares, 100 * np.asarray(values), label=label, markersize=5, **style)
    axes.set_xlabel("resident experts, % of all")
    axes.set_ylabel("hit rate, %")
    axes.set_title(title, fontsize=10, loc="left")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    plain(axes)
    return figure


def draw_beside(
    rows: Sequence[str], paper: Sequence[float], ours: Sequence[float], unit: str, title: str = ""
) -> Any:
    """The paper's bars beside ours, with the ratio above each pair."""
    figure = Figure(figsize=(max(1.3 * len(rows), 6), 3.6))
    axes = figure.add_subplot()
    at = np.arange(len(rows))
    axes.bar(at - 0.2, paper, 0.38, color="#cfe8ef", edgecolor="black", hatch="///", label="paper")
    axes.bar(at + 0.2, ours, 0.38, color="#1b4965", edgecolor="black", label="simulated")
    for x, (theirs, mine) in enumerate(zip(paper, ours)):
        axes.text(x, max(theirs, mine) * 1.02, f"{mine / theirs - 1:+.0%}", ha="center", fontsize=8)
    axes.set_xticks(at, rows, fontsize=8)
    axes.set_ylabel(unit)
    axes.set_ylim(0, 1.15 * max(*paper, *ours))
    axes.set_title(title, fontsize=10, loc="left")
    axes.legend(fontsize=8)
    plain(axes)
    return figure


def _window(spans: Sequence[Span], layer: int, step: int) -> tuple[float, float]:
    """When a layer's plan was there, and when its last expert was done."""
    plans = [s for s in spans if s.lane is Lane.POLICY and s.what == "plan"]
    layers = max((s.layer for s in spans), default=-1) + 1
    index = step * layers + layer
    if not 0 <= layer < layers or index >= len(plans):
        raise ConfigError(f"the spans hold no layer {layer} in step {step}")
    start = plans[index].start + plans[index].seconds
    later = plans[index + 1].start if index + 1 < len(plans) else float("inf")
    work = [s for s in spans if s.lane in (Lane.CPU, Lane.GPU) and s.layer == layer]
    return start, max(s.start + s.seconds for s in work if start <= s.start < later)


def _merged(spans: Sequence[Span]) -> list[Span]:
    """Copies of one expert that follow each other become one block."""
    found: list[Span] = []
    for span in sorted(spans, key=lambda s: (s.lane, s.start)):
        last = found[-1] if found else None
        follows = last is not None and (last.lane, last.what) == (span.lane, span.what)
        if last is not None and follows and span.start - last.start - last.seconds < 1e-9:
            found[-1] = last._replace(seconds=last.seconds + span.seconds)
        else:
            found.append(span)
    return found


def _block(axes: Any, span: Span, layer: int, start: float, width: float) -> None:
    name, row = span.lane.name, ROWS.index(span.lane.name)
    left = max((span.start - start) * 1e6, 0.0)
    length = min((span.start + span.seconds - start) * 1e6, width * PAST_JOIN) - left
    axes.barh(
        *(row, length, 0.62, left),
        color=COLOURS[name],
        hatch=HATCHES[name],
        edgecolor="black" if name != "GPU" else "white",
        linewidth=0.6,
    )
    what = span.what.removesuffix(f" of layer {layer}")
    seen = min(length, width - left)
    if seen < WIDE_ENOUGH * width * len(what):
        what = what.split(" ")[0]
    if seen > WIDE_ENOUGH * width * len(what):
        box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
        style = {} if name == "GPU" else {"bbox": box}
        at = left + seen / 2
        axes.text(at, row, what, ha="center", va="center", fontsize=7, color=INK[name], **style)
