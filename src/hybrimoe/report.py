"""What happened and where the time went: text for people, a dict for programs."""

from __future__ import annotations

import html
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrimoe.config import Config
    from hybrimoe.modules.pooled_experts import PooledExperts
    from hybrimoe.runtime.coordinator import Hybrid
    from hybrimoe.runtime.counters import Stats
    from hybrimoe.runtime.disk.tier import DiskTier


NAMES = {"CPU": "CPU", "GPU": "accelerator", "LINK": "link", "POLICY": "policies"}
SLOWEST = 3
"""Layers that the text names; `to_dict` has all."""
LEFT = "style='text-align:left'"  # notebooks align tables right
Row = tuple[str, str]
"""What a line is about, and the rest of it."""


@dataclass(frozen=True)
class LayerReport:
    """One layer. ms: mean per launch; experts: mean read per launch; gb_s: weight bytes read."""

    name: str
    launches: int
    experts: float
    ms: float
    gb_s: float


@dataclass(frozen=True)
class Report:
    """Totals since the last reset of the statistics. Seconds and bytes unless the name says else."""

    weights: str
    format: str
    threads: int
    expert_bytes_before: int
    expert_bytes_after: int
    prefill_tokens: int
    prefill_s: float
    decode_tokens: int
    decode_s: float
    experts_s: float
    layers: tuple[LayerReport, ...]
    hybrid: dict[str, Any] | None = None
    disk: dict[str, Any] | None = None
    compile_s: float = 0.0

    @classmethod
    def of(
        cls,
        config: Config,
        layers: list[PooledExperts],
        stats: Stats,
        pool_bytes: int,
        threads: int,
        hybrid: Hybrid | None = None,
        tier: DiskTier | None = None,
    ) -> Report:
        """Put the counters of a runtime together."""
        return cls(
            weights=config.weights,
            format=", ".join(dict.fromkeys(layer.packed.fmt for layer in layers)),
            threads=threads,
            expert_bytes_before=sum(layer.native_bytes for layer in layers),
            expert_bytes_after=pool_bytes,
            prefill_tokens=stats.prefill_tokens,
            prefill_s=stats.prefill_s,
            decode_tokens=stats.decode_tokens,
            decode_s=stats.decode_s,
            experts_s=sum(layer.seconds for layer in stats.layers),
            compile_s=stats.compile_s,
            layers=tuple(_layer_report(layer, stats) for layer in layers),
            hybrid=hybrid.to_dict() if hybrid else None,
            disk=tier.to_dict() if tier else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        return "\n".join([self._title(), *(f"  {name:9} {text}" for name, text in self._rows())])

    def _repr_html_(self) -> str:
        """The same rows as a small table."""
        head = f"<tr><th colspan=2 {LEFT}>{html.escape(self._title())}</th></tr>"
        return f"<table>{head}{''.join(map(_html_row, self._rows()))}</table>"

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """The text, where IPython has no tables."""
        printer.text(str(self))

    def _title(self) -> str:
        where = f"the CPU, {self.threads} threads"
        if self.hybrid:
            where += f", and the accelerator ({self.hybrid['device']})"
        return f"hybrimoe: {len(self.layers)} layers of experts on {where}"

    def _rows(self) -> Iterator[Row]:
        before, after = self.expert_bytes_before / 2**20, self.expert_bytes_after / 2**20
        yield "format", f"{self.format}: {before:.1f} MiB of experts before, {after:.1f} MiB now"
        yield "prefill", _rate(self.prefill_tokens, self.prefill_s)
        yield "decode", _rate(self.decode_tokens, self.decode_s)
        total = self.prefill_s + self.decode_s
        if total > 0:
            share = self.experts_s / total
            parts = f"experts {share:.0%}, the rest of the model {1 - share:.0%}"
            yield "time", f"{total:.2f} s: {parts}"
        if self.compile_s > 0:
            yield "compiled", f"kernels for {self.compile_s:.2f} s, which is in no other line"
        if self.hybrid:
            yield from _shared(self.hybrid, self.prefill_tokens + self.decode_tokens)
        if self.disk:
            yield from _on_disk(self.disk)
        for layer in sorted(self.layers, key=lambda layer: -layer.ms * layer.launches)[:SLOWEST]:
            if layer.launches:
                yield "slowest", _layer_text(layer)


def _layer_report(layer: PooledExperts, stats: Stats) -> LayerReport:
    if layer.index >= len(stats.layers) or not stats.layers[layer.index].launches:
        return LayerReport(layer.name, 0, 0.0, 0.0, 0.0)
    counts = stats.layers[layer.index]
    read = counts.activated * layer.packed.layout.expert_bytes
    return LayerReport(
        layer.name,
        counts.launches,
        counts.activated / counts.launches,
        counts.seconds / counts.launches * 1e3,
        read / counts.seconds / 1e9,
    )


def _layer_text(layer: LayerReport) -> str:
    return (
        f"{layer.name}: {layer.ms:.3f} ms per launch, {layer.experts:.1f} experts, "
        f"{layer.gb_s:.1f} GB/s of weights"
    )


def _on_disk(counts: dict[str, Any]) -> Iterator[Row]:
    """What RAM held of the experts, and what the disk cost."""
    mib = {name: counts[name] / 2**20 for name in ("ram_bytes", "read_bytes")}
    yield (
        "ram",
        f"{counts['slots']} of {counts['experts']} experts in {mib['ram_bytes']:.1f} MiB: "
        f"{counts['hit_rate']:.1%} hits, {counts['late']} on their way, {counts['misses']} misses",
    )
    speed = counts["read_bytes"] / max(counts["disk_s"], 1e-9) / 1e9
    yield (
        "disk",
        f"{counts['reads']} experts, {mib['read_bytes']:.1f} MiB in {counts['disk_s']:.2f} s "
        f"({speed:.2f} GB/s); waited for {counts['waited_s']:.2f} s",
    )


def _shared(counts: dict[str, Any], tokens: int) -> Iterator[Row]:
    """What the policies did with an accelerator that shares the work."""
    memory, ran = counts["memory"], counts["gpu_experts"] + counts["cpu_experts"]
    if memory["shrinks"]:
        first = memory["slots_at_first"]
        left = f"{memory['slots']} of {first} slots left" if first else "no slots"
        yield "memory", f"{left}: {memory['reason']}"
    if not ran:
        return
    if counts["slots"]:
        yield "cache", _cache_text(counts, max(tokens, 1))
    on_gpu, on_cpu = counts["gpu_experts"] / ran, counts["cpu_experts"] / ran
    yield "experts", f"{on_gpu:.0%} on the accelerator, {on_cpu:.0%} on the CPU"
    yield from _lanes(counts)
    yield from _comparisons(counts["guard"])
    for what in counts["replaced"].values():
        yield "replaced", what


def _cache_text(counts: dict[str, Any], tokens: int) -> str:
    return (
        f"{counts['slots']} slots, {counts['hit_rate']:.1%} hits, "
        f"{counts['uploads'] / tokens:.2f} uploads and {counts['link_bytes'] / tokens / 1e6:.2f} MB "
        "over the link per token"
    )


def _lanes(counts: dict[str, Any]) -> Iterator[Row]:
    """How busy each lane was while layers ran, and what the others waited for."""
    whole, lanes, last = counts["layer_s"], counts["lane_s"], counts["ended_last"]
    if not whole:
        return
    busy = ", ".join(f"{NAMES[lane]} {lanes[lane] / whole:.0%}" for lane in NAMES)
    yield "busy", f"{busy} of the layers' time"
    slowest = max(last, key=last.__getitem__)
    share, waited = last[slowest] / max(sum(last.values()), 1), counts["wait_s"] / whole
    yield (
        "idle",
        f"bottleneck: {NAMES[slowest]} in {share:.0%} of the layer steps; the CPU waited for "
        f"{waited:.0%} of the time",
    )
    if counts["bound_share"] is not None:
        share = counts["bound_share"]
        yield "bound", f"decode at {share:.0%} of what memory and link could deliver"


def _comparisons(guard: dict[str, Any] | None) -> Iterator[Row]:
    """What the pure modes took, where they were tried."""
    for phase, result in (guard or {}).items():
        times = ", ".join(f"{name} {ms:.2f}" for name, ms in result["compared_ms"].items())
        if times:
            yield "compared", f"{phase}: {times} ms per token; chosen: {result['chosen']}"


def _rate(tokens: int, seconds: float) -> str:
    if not tokens:
        return "no tokens yet"
    return f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s"


def _html_row(row: Row) -> str:
    name, text = map(html.escape, row)
    return f"<tr><th {LEFT}>{name}</th><td {LEFT}>{text}</td></tr>"
