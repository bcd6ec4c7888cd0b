"""What happened and where the time went: text for people, a dict for programs."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrimoe.config import Config
    from hybrimoe.runtime.experts import PooledExperts
    from hybrimoe.runtime.hybrid import Hybrid
    from hybrimoe.runtime.stats import Stats


NAMES = {"CPU": "CPU", "GPU": "accelerator", "LINK": "link", "POLICY": "policies"}


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

    @classmethod
    def of(
        cls,
        config: Config,
        layers: list[PooledExperts],
        stats: Stats,
        pool_bytes: int,
        threads: int,
        hybrid: Hybrid | None = None,
    ) -> Report:
        """Put the counters of a runtime together."""
        return cls(
            weights=config.weights,
            format=layers[0].packed.fmt,
            threads=threads,
            expert_bytes_before=sum(layer.native_bytes for layer in layers),
            expert_bytes_after=pool_bytes,
            prefill_tokens=stats.prefill_tokens,
            prefill_s=stats.prefill_s,
            decode_tokens=stats.decode_tokens,
            decode_s=stats.decode_s,
            experts_s=sum(layer.seconds for layer in stats.layers),
            layers=tuple(_layer_report(layer, stats) for layer in layers),
            hybrid=hybrid.to_dict() if hybrid else None,
        )

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data."""
        return asdict(self)

    def __str__(self) -> str:
        before, after = self.expert_bytes_before / 2**20, self.expert_bytes_after / 2**20
        total = self.prefill_s + self.decode_s
        lines = [
            f"hybrimoe: {len(self.layers)} layers of experts on {self._places()}",
            f"  format    {self.format}: {before:.1f} MiB of experts before, {after:.1f} MiB now",
            _rate("prefill", self.prefill_tokens, self.prefill_s),
            _rate("decode", self.decode_tokens, self.decode_s),
        ]
        if total > 0:
            share = self.experts_s / total
            lines.append(
                f"  time      {total:.2f} s: experts {share:.0%}, the rest of the model {1 - share:.0%}"
            )
        lines += self._shared()
        busiest = sorted(self.layers, key=lambda layer: -layer.ms * layer.launches)[:3]
        lines += [
            f"  slowest   {layer.name}: {layer.ms:.3f} ms per launch, {layer.experts:.1f} experts, "
            f"{layer.gb_s:.1f} GB/s of weights"
            for layer in busiest
            if layer.launches
        ]
        return "\n".join(lines)

    def _places(self) -> str:
        cpu = f"the CPU, {self.threads} threads"
        return f"{cpu}, and the accelerator ({self.hybrid['device']})" if self.hybrid else cpu

    def _shared(self) -> list[str]:
        """What the policies did, if an accelerator shares the work."""
        if not self.hybrid or not self.hybrid["hits"] + self.hybrid["misses"]:
            return []
        counts, tokens = self.hybrid, max(self.prefill_tokens + self.decode_tokens, 1)
        ran = counts["gpu_experts"] + counts["cpu_experts"]
        return [
            f"  cache     {counts['slots']} slots, {counts['hit_rate']:.1%} hits, "
            f"{counts['uploads'] / tokens:.2f} uploads and {counts['link_bytes'] / tokens / 1e6:.2f} "
            "MB over the link per token",
            f"  experts   {counts['gpu_experts'] / ran:.0%} on the accelerator, "
            f"{counts['cpu_experts'] / ran:.0%} on the CPU",
            *_lanes(counts),
            *_comparisons(counts["guard"]),
            *(f"  replaced  {what}" for what in counts["replaced"].values()),
        ]

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


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


def _lanes(counts: dict[str, Any]) -> list[str]:
    """How busy each lane was while layers ran, and what the others waited for."""
    whole, lanes, last = counts["layer_s"], counts["lane_s"], counts["ended_last"]
    if not whole:
        return []
    busy = ", ".join(f"{NAMES[lane]} {lanes[lane] / whole:.0%}" for lane in NAMES)
    steps = max(sum(last.values()), 1)
    slowest = max(last, key=last.__getitem__)
    lines = [
        f"  busy      {busy} of the layers' time",
        f"  idle      the {NAMES[slowest]} ended last in {last[slowest] / steps:.0%} of the steps: the "
        f"others waited for it, the CPU for {counts['wait_s'] / whole:.0%} of the time",
    ]
    if counts["bound_share"] is not None:
        share = counts["bound_share"]
        lines.append(f"  bound     decode at {share:.0%} of what memory and link could deliver")
    return lines


def _comparisons(guard: dict[str, Any] | None) -> list[str]:
    """What the pure modes took, where they were tried."""
    lines = []
    for phase, result in (guard or {}).items():
        times = ", ".join(f"{name} {ms:.2f}" for name, ms in result["compared_ms"].items())
        if times:
            lines.append(f"  compared  {phase}: {times} ms per token; chosen: {result['chosen']}")
    return lines


def _rate(name: str, tokens: int, seconds: float) -> str:
    if not tokens:
        return f"  {name:9} no tokens yet"
    return f"  {name:9} {tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s"
