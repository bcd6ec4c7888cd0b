"""Figures from traces and results (extra `plot`: matplotlib).

Every function returns a matplotlib Figure; `save` writes it. Lanes differ in lightness and in
hatching, so that they can be told apart in grey.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hybrimoe.errors import ConfigError
from hybrimoe.files import write_atomically
from hybrimoe.policy.timeline import Array
from hybrimoe.simulation.simulator import Result

try:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ConfigError("figures need matplotlib: pip install 'hybrimoe[plot]'") from error

COLOURS = {"GPU": "#1b4965", "CPU": "#f4a259", "LINK": "#cfe8ef", "POLICY": "#8d99ae"}
HATCHES = {"GPU": "", "CPU": "///", "LINK": "...", "POLICY": "xxx"}
NAMES = {"GPU": "GPU", "CPU": "CPU", "LINK": "link", "POLICY": "policy"}
LANES = ("GPU", "CPU", "LINK", "POLICY")


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
    plain(axes)
    return figure


def _seconds(result: Result) -> float:
    seconds = result.decode_s_per_token
    return (result.prefill_s or 0.0) if seconds is None else seconds


def plain(axes: Any) -> None:
    axes.spines["top"].set_visible(False)
    axes.spines["right"].set_visible(False)
