"""A memory plan: its numbers, and how it reads as lines of text and as a table for notebooks."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from hybrimoe.errors import InsufficientMemoryError
from hybrimoe.memory.speed import Speed
from hybrimoe.sizes import size_text
from hybrimoe.sources.headers import Checkpoint

NAMES = {
    "dense": "dense weights",
    "experts": "experts",
    "kv_cache": "KV cache",
    "activations": "activations",
    "workspace": "workspace",
    "slots": "expert slots",
}


@dataclass(frozen=True)
class FormatPlan:
    """One weight format: bytes of the packed experts, of host memory, and whether it fits."""

    weights: str
    experts_bytes: int
    peak_bytes: int
    steady_bytes: int
    fits: bool


@dataclass(frozen=True)
class MemoryPlan:
    """Where the bytes of a model go on this machine, and whether they fit. Bytes and seconds.

    parts: dense, experts, kv_cache, activations, workspace. layers: packed experts by layer. weights:
    how experts are kept, "mixed" where that differs; kept: the same by layer. gpu, ram: what lies
    where once the model runs. load_peak_bytes, steady_bytes: host memory while it loads, and while
    `context` tokens are generated; plain_bytes: what plain transformers would take; have_bytes:
    what is available. gpu_have_bytes: None without a GPU. traced: cache and activations were counted
    on the model itself, not estimated. call: what to run, or what fits instead; empty where
    nothing does.
    """

    model: str
    family: str
    weights: str
    context: int
    experts: int
    top_k: int
    slots: int
    parts: dict[str, int]
    layers: dict[str, int]
    kept: dict[str, str]
    gpu: dict[str, int]
    ram: dict[str, int]
    load_peak_bytes: int
    steady_bytes: int
    plain_bytes: int
    have_bytes: int
    have_limit: str
    gpu_have_bytes: int | None
    fits: bool
    nearest: str
    call: str
    formats: tuple[FormatPlan, ...]
    traced: bool
    checkpoint: Checkpoint | None
    speed: Speed | None
    notes: tuple[str, ...]

    @property
    def peak_bytes(self) -> int:
        """The most host memory it takes, loading or running."""
        return max(self.load_peak_bytes, self.steady_bytes)

    @property
    def gpu_bytes(self) -> int:
        """Everything on the GPU."""
        return sum(self.gpu.values())

    def ensure_fits(self) -> MemoryPlan:
        """Return the plan, or raise InsufficientMemoryError with need, have and what would work."""
        if self.fits:
            return self
        need, have, where = self.peak_bytes, self.have_bytes, f"host memory ({self.have_limit})"
        if need <= have:
            need, have, where = self.gpu_bytes, self.gpu_have_bytes or 0, "GPU memory"
        raise InsufficientMemoryError(
            f"{self.model} with experts as {self.weights} and {self.context} tokens needs "
            f"{size_text(need)} of {where}, {size_text(have)} available; {self.nearest}",
            need=need,
            have=have,
            nearest=self.nearest,
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as plain data."""
        return asdict(self) | {"peak_bytes": self.peak_bytes, "gpu_bytes": self.gpu_bytes}

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html(self)

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))  # IPython's own would show every field


def as_text(plan: MemoryPlan) -> str:
    """Twenty lines or so, for a terminal."""
    lines = [_head(plan)]
    lines += [f"  {name:14} {size:>11}  {where}" for name, size, where in _rows(plan)]
    lines += [f"  {name:14} {size:>11}  of {have}" for name, size, have in _totals(plan)]
    lines += [f"  {'speed':14} {_speed(plan)}"] if plan.speed else []
    lines += ["", f"  {'weights':10}{'experts':>11}{'peak':>11}  fits"]
    lines += [f"  {row[0]:10}{row[1]:>11}{row[2]:>11}  {row[3]}" for row in _formats(plan)]
    lines += ["", _verdict(plan)]
    lines += [f"note: {note}" for note in plan.notes]
    return "\n".join(lines)


def as_html(plan: MemoryPlan) -> str:
    """The same as one small table."""
    cells = [("th", _head(plan), 3)]
    rows = [_html_row(*cells)]
    rows += [_html_row(("td", n, 1), ("td", s, 1), ("td", w, 1)) for n, s, w in _rows(plan)]
    rows += [
        _html_row(("td", n, 1), ("td", s, 1), ("td", f"of {h}", 1)) for n, s, h in _totals(plan)
    ]
    if plan.speed:
        rows.append(_html_row(("td", "speed", 1), ("td", _speed(plan), 2)))
    for weights, experts, peak, fits in _formats(plan):
        text = f"experts {experts}, peak {peak}: fits: {fits}"
        rows.append(_html_row(("td", f"weights={weights}", 1), ("td", text, 2)))
    rows.append(_html_row(("th", _verdict(plan), 3)))
    rows += [_html_row(("td", f"note: {note}", 3)) for note in plan.notes]
    return f"<table>{''.join(rows)}</table>"


def _head(plan: MemoryPlan) -> str:
    found = plan.checkpoint
    files = ""
    if found:
        count = "1 file" if found.files == 1 else f"{found.files} files"
        files = f", {count} of {size_text(found.nbytes)} ({found.place})"
    return (
        f"{plan.model}: {plan.family}, {plan.experts} experts in {len(plan.layers)} layers, "
        f"top-{plan.top_k}{files}"
    )


def _rows(plan: MemoryPlan) -> Iterable[tuple[str, str, str]]:
    """Part, size, place."""
    for part, size in plan.parts.items():
        what = f"as {_kept(plan)}, " if part == "experts" else ""
        what += f"{plan.context} tokens, " if part == "kv_cache" else ""
        yield NAMES[part], size_text(size), what + ("GPU" if part in plan.gpu else "RAM")
    if plan.gpu:
        slots = f"{plan.slots} of {plan.experts} experts, copies on the GPU"
        yield NAMES["slots"], size_text(plan.gpu["slots"]), slots


def _kept(plan: MemoryPlan) -> str:
    """The format of the experts, or how many layers have which."""
    counts = Counter(plan.kept.values())
    if len(counts) == 1:
        return next(iter(counts))
    return " and ".join(f"{fmt} in {n} layers" for fmt, n in counts.most_common())


def _totals(plan: MemoryPlan) -> Iterable[tuple[str, str, str]]:
    """What is needed and what there is."""
    have = f"{size_text(plan.have_bytes)} ({plan.have_limit})"
    yield "RAM, loading", size_text(plan.load_peak_bytes), have
    yield "RAM, running", size_text(plan.steady_bytes), have
    if plan.gpu:
        known = plan.gpu_have_bytes
        yield (
            "GPU",
            size_text(plan.gpu_bytes),
            "an unknown size" if known is None else size_text(known),
        )


def _formats(plan: MemoryPlan) -> Iterable[tuple[str, str, str, str]]:
    for row in plan.formats:
        verdict = "yes" if row.fits else "no"
        yield row.weights, size_text(row.experts_bytes), size_text(row.peak_bytes), verdict


def _speed(plan: MemoryPlan) -> str:
    assert plan.speed is not None
    rate = f"about {plan.speed.decode_tokens_s:.1f} tokens/s, bound by {plan.speed.bound}"
    advice = "" if plan.speed.measured else " (run `hybrimoe calibrate`)"
    return f"{rate}; {plan.speed.source}{advice}"


def _verdict(plan: MemoryPlan) -> str:
    if plan.fits:
        return f"It fits: {plan.call}"
    return f"It does not fit; {plan.nearest}" + (f": {plan.call}" if plan.call else "")


def _html_row(*cells: tuple[str, str, int]) -> str:
    inside = (
        f"<{tag} colspan={span} style='text-align:left'>{html.escape(text)}</{tag}>"
        for tag, text, span in cells
    )
    return f"<tr>{''.join(inside)}</tr>"
