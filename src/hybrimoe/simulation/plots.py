"""Figures from traces and results (extra `plot`: matplotlib).

Every function returns a matplotlib Figure; `save` writes it. Lanes differ in lightness and in
hatching, so that they can be told apart in grey.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe.errors import ConfigError
from hybrimoe.files import write_atomically
from hybrimoe.policy.timeline import Array, Lane, Span
from hybrimoe.simulation.simulator import Result

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ConfigError("figures need matplotlib: pip install 'hybrimoe[plot]'") from error

COLOURS = {"GPU": "#1b4965", "CPU": "#f4a259", "LINK": "#cfe8ef", "POLICY": "#8d99ae"}
HATCHES = {"GPU": "", "CPU": "///", "LINK": "...", "POLICY": "xxx"}
NAMES = {"GPU": "GPU", "CPU": "CPU", "LINK": "link", "POLICY": "policy"}
INK = {"GPU": "white", "CPU": "black", "LINK": "black", "POLICY": "black"}
LANES = ("GPU", "CPU", "LINK", "POLICY")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
ROWS = ("CPU", "LINK", "GPU")  # of a timeline, from the bottom
PAST_JOIN = 1.06  # how far a timeline goes on
WIDE_ENOUGH = 0.008  # share of a timeline that one letter of a label takes


def save(figure: Any, path: str | Path) -> None:
    """Write a figure; the file's ending says the format."""
    path = Path(path)
    ending = ending_of(path)
    buffer = io.BytesIO()
    figure.savefig(buffer, format=ending, dpi=120, bbox_inches="tight")
    write_atomically(path, buffer.getvalue())


def ending_of(path: Path) -> str:
    """The format that a file's name asks for; raises ConfigError for one that cannot be drawn."""
    ending = path.suffix.lstrip(".").lower() or "png"
    known = Figure().canvas.get_supported_filetypes()
    if ending not in known:
        raise ConfigError(
            f"a figure's name must end in one of {', '.join(sorted(known))}, got {path.name!r}"
        )
    return ending


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
    _plain(axes)
    return figure


def draw_heatmap(frequency: Array, title: str = "") -> Any:
    """How often each expert of each layer ran: [L, E] shares of a layer's tokens."""
    layers, experts = frequency.shape
    figure = Figure(figsize=(min(3 + experts * 0.16, 12), min(1.6 + layers * 0.16, 9)))
    axes = figure.add_subplot()
    image = axes.imshow(
        100 * frequency, cmap="cividis_r", aspect="auto", interpolation="nearest", vmin=0
    )
    bar = figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label(f"% of the layer's tokens (uniform: {100 / experts:.1f} %)")
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"{title}: how often each expert runs".lstrip(": "), fontsize=10, loc="left")
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
    _plain(axes)
    return figure


def draw_lanes(results: Sequence[Result], title: str = "") -> Any:
    """How long a token takes under each preset, and below it how long each lane was busy meanwhile.

    The lanes work side by side: the longest of them bounds the token, and the others hide behind it.
    title: what was replayed, such as the model and the trace; the machine is added.
    """
    decode = results[0].decode_s_per_token is not None
    ordered = sorted(results, key=_seconds, reverse=True)
    figure = Figure(figsize=(8, 1.5 + 0.62 * len(ordered)))
    axes = figure.add_subplot()
    rows = np.arange(len(ordered))
    total = 1e3 * np.array([_seconds(result) for result in ordered])
    what = "time per token" if decode else "time to first token"
    axes.barh(rows + 0.22, total, 0.34, color="#4d4d4d", label=what)
    for row, value in enumerate(total.tolist()):
        axes.text(value + 0.01 * total.max(), row + 0.22, f"{value:.2f}", va="center", fontsize=9)
    for i, lane in enumerate(LANES if decode else ()):
        busy = 1e3 * np.array([result.lanes[lane] for result in ordered])
        style: dict[str, Any] = {
            "color": COLOURS[lane],
            "hatch": HATCHES[lane],
            "label": f"{NAMES[lane]} busy",
        }
        axes.barh(rows - 0.03 - 0.115 * i, busy, 0.1, edgecolor="black", linewidth=0.4, **style)
    axes.set_xlim(0, 1.12 * total.max())
    axes.set_ylim(-0.6, len(ordered) - 0.45)
    axes.set_yticks(rows, [result.preset for result in ordered])
    axes.set_xlabel("milliseconds per token" if decode else "milliseconds")
    machine = f"{results[0].profile}, {results[0].slots} experts on the GPU"
    axes.set_title(f"{title}\n{machine}".lstrip("\n"), fontsize=10, loc="left")
    figure.legend(fontsize=8, loc="outside lower center", ncols=5, frameon=False)
    figure.set_layout_engine("constrained")
    _plain(axes)
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
    _plain(axes)
    return figure


def _seconds(result: Result) -> float:
    seconds = result.decode_s_per_token
    return (result.prefill_s or 0.0) if seconds is None else seconds


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


def _plain(axes: Any) -> None:
    axes.spines["top"].set_visible(False)
    axes.spines["right"].set_visible(False)
