"""Policies against each other and against their bounds, on real routing.

    python benchmarks/policies.py --traces FOLDER [--quick] [--only NAME] [--plot DIR]

Decode is gpt-oss-20b (ids recorded by others; forecasts from an online table), prefill is
Mixtral-8x7b (shares of MMLU prompts) and tiny-moe, recorded here with its routers' forecasts.
Parameters are tuned on one half of the sequences, everything shown is from the other half; who is
resident at the start comes from the first half as well. Times are the simulator's.
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np

from hybrimoe.cli.traces import shorten
from hybrimoe.policy.engine import Policies
from hybrimoe.policy.prefetchers import Never, NextLayer
from hybrimoe.policy.presets import PRESETS
from hybrimoe.policy.profiles import PROFILES
from hybrimoe.policy.rankings import LFU, LRU, LRU2, MRS, NextToken, Ranking
from hybrimoe.policy.schedulers import DALI, Fiddler, Hybrid
from hybrimoe.simulation.belady import Belady
from hybrimoe.simulation.foreign import read_trace
from hybrimoe.simulation.simulator import simulate
from hybrimoe.simulation.synthesis import hit_rate
from hybrimoe.simulation.trace import RoutingTrace
from markdown import table
from shares import from_fractions

RESIDENCY = (0.25, 0.5, 0.75)
DEFAULT = PRESETS["hybrimoe"]
TOLERANCE = 1.03


@dataclasses.dataclass(frozen=True)
class Half:
    """A trace to report on, and how often experts ran in the half that was tuned on."""

    trace: RoutingTrace
    prior: np.ndarray


def halves(trace: RoutingTrace, steps: int) -> tuple[Half, Half]:
    """The half to tune on and the half to report on, each shortened."""
    first, second = trace.split()
    prior = first.frequencies()
    return Half(shorten(first, steps), prior), Half(shorten(second, steps), prior)


def decode_s(half: Half, profile: str, preset: str | Policies, vram: float = 0.25, **own) -> float:
    found = simulate(half.trace, profile, preset, vram=vram, prior=half.prior, **own)
    value = found.prefill_s if found.decode_s_per_token is None else found.decode_s_per_token
    assert value is not None
    return value


def caches(half: Half, residency: float) -> dict[str, tuple[float, float]]:
    """Hit rate and uploads of caches alone, and the bound."""
    slots = round(residency * half.trace.layers * half.trace.experts)
    tried: dict[str, Ranking] = {
        **{"LRU": LRU(), "LFU": LFU(), "LRU-2": LRU2()},
        **{"MRS .5 (paper)": MRS(alpha=0.5), "MRS .1": MRS(alpha=0.1), "MRS .05": MRS(alpha=0.05)},
        "MRS .1, model-wide": MRS(alpha=0.1, scope="model"),
        "MRS .1, admitting": MRS(alpha=0.1, admission=True),
        "MRS .1, admitting, model-wide": MRS(alpha=0.1, admission=True, scope="model"),
        "NextToken": NextToken(),
        "NextToken, admitting": NextToken(admission=True),
        "NextToken, admitting, model-wide": NextToken(admission=True, scope="model"),
        "Belady, per layer": Belady.of(half.trace),
        "Belady, model-wide": Belady.of(half.trace, "model"),
    }
    return {name: hit_rate(half.trace, ranking, slots) for name, ranking in tried.items()}


def show_caches(found: dict[float, dict[str, tuple[float, float]]]) -> str:
    rows = []
    for name in found[0.25]:
        cells = []
        for rates in found.values():
            hits, uploads = rates[name]
            lru, bound = rates["LRU"][0], rates["Belady, per layer"][0]
            share = (hits - lru) / max(bound - lru, 1e-9)
            cells += [f"{hits:.1%}", f"{uploads:.1f}", f"{share:+.0%}"]
        rows.append((name, *cells))
    head = ["cache"]
    for residency in found:
        head += [f"hits {residency:.0%}", "copies/token", "of LRU to bound"]
    return table(head, rows)


def mean_ms(half: Half, residency: float, **own) -> float:
    """Mean milliseconds per token over all profiles."""
    return float(np.mean([1e3 * decode_s(half, p, "hybrimoe", residency, **own) for p in PROFILES]))


def compare(half: Half, tried: dict[str, dict], residency: float) -> dict[str, dict[str, float]]:
    """Milliseconds per profile for variants of the default."""
    return {
        name: {p: 1e3 * decode_s(half, p, "hybrimoe", residency, **own) for p in PROFILES}
        for name, own in tried.items()
    }


def show_compare(found: dict[str, dict[str, float]]) -> str:
    first = next(iter(found.values()))
    rows = []
    for name, times in found.items():
        ratio = float(np.mean([first[p] / times[p] for p in times]))
        rows.append((name, *(f"{t:.2f}" for t in times.values()), f"{ratio:.3f}x"))
    return table(("variant", *PROFILES, "speed against the first"), rows)


def grid(cells: dict[str, Half], presets: dict[str, Policies]) -> list[dict]:
    """Seconds of every preset in every cell of data x residency x profile."""
    rows = []
    for what, half in cells.items():
        for residency in RESIDENCY:
            for profile in PROFILES:
                times = {n: decode_s(half, profile, p, residency) for n, p in presets.items()}
                row = {"what": what, "residency": residency, "profile": profile}
                rows.append(row | {"seconds": times})
                print(".", end="", file=sys.stderr, flush=True)
    return rows


def show_grid(rows: list[dict]) -> str:
    cells = []
    for r in rows:
        times = r["seconds"]
        best = min(times, key=times.get)
        behind = times["hybrimoe"] / times[best] - 1
        cells.append(
            (
                f"{r['what']} {r['residency']:.0%} {r['profile']}",
                f"{1e3 * times['hybrimoe']:.2f}",
                f"{times['hybrimoe-paper'] / times['hybrimoe']:.2f}x",
                f"{times['ktransformers'] / times['hybrimoe']:.2f}x",
                f"{times['llamacpp'] / times['hybrimoe']:.2f}x",
                best,
                f"{behind:+.1%}" if behind else "",
            )
        )
    head = ("cell", "default ms", "over paper", "over ktransformers", "over llamacpp", "best")
    return table((*head, "default behind best"), cells)


def tuned(half: Half) -> tuple[str, dict[str, float]]:
    """The ranking that is fastest on the half to tune on."""
    rules = {"admission": True, "backfill": True}
    tried: dict[str, Ranking] = {
        f"MRS, alpha {alpha}": MRS(alpha=alpha, **rules) for alpha in (0.05, 0.1, 0.2, 0.5)
    }
    for alpha, weight, rate in (
        *((0.15, 0.7, 0.05), (0.1, 0.7, 0.05), (0.25, 0.7, 0.05)),
        *((0.15, 0.3, 0.05), (0.15, 1.5, 0.05), (0.15, 0.7, 0.02), (0.15, 0.7, 0.1)),
    ):
        name = f"NextToken, alpha {alpha}, weight {weight}, rate {rate}"
        tried[name] = NextToken(alpha=alpha, weight=weight, rate=rate, **rules)
    found = {name: mean_ms(half, 0.25, cache=ranking) for name, ranking in tried.items()}
    return min(found, key=found.get), found


def mixtral(folder: Path, tokens: int, prompts: int) -> RoutingTrace:
    """Prefill of MMLU prompts from every subject."""
    with np.load(folder / "mixtral8x7b_mmlu_prompt_fractions.npz") as stored:
        every = np.concatenate([stored[name][:3] for name in stored.files])
    step = max(len(every) // (2 * prompts), 1)
    return from_fractions(every[::step], tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--tiny", type=Path, nargs="*", default=[], help="traces of tiny-moe")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="caches, tune, slots, schedulers or grid")
    parser.add_argument("--plot", type=Path, help="folder for the hit-rate figure")
    options = parser.parse_args()
    steps = 300 if options.quick else 900
    tune, report = halves(read_trace(options.traces / "gptoss20b_decode.npz"), steps)
    results: dict = {}

    def section(name: str, title: str) -> bool:
        wanted = options.only in (None, name)
        if wanted:
            print(f"\n### {title}\n", flush=True)
        return wanted

    if section("caches", "Caches alone, gpt-oss-20b decode, held-back half"):
        results["caches"] = {r: caches(report, r) for r in RESIDENCY}
        print(show_caches(results["caches"]))
        if options.plot:
            _plot(results["caches"], options.plot)
    if section("tune", "Rankings on the half to tune on, ms per token at 25 %"):
        best, results["tune"] = tuned(tune)
        rows = [(name, f"{ms:.3f}") for name, ms in results["tune"].items()]
        print(table(("setting", "ms/token, mean over profiles"), rows), f"\n\nBest: {best}.")
    if section("slots", "Slots and rankings in the default, 25 %, ms per token"):
        ours, rules = DEFAULT.ranking, {"admission": True, "backfill": True}
        tried = {
            "NextToken, per layer, admitting, backfill (default)": {"cache": ours},
            "model-wide": {"cache": dataclasses.replace(ours, scope="model")},
            "without admission": {"cache": dataclasses.replace(ours, admission=False)},
            "without backfill": {"cache": dataclasses.replace(ours, backfill=False)},
            "MRS .1, same rules": {"cache": MRS(alpha=0.1, **rules)},
            "MRS .5, same rules": {"cache": MRS(alpha=0.5, **rules)},
            "LRU-2, same rules": {"cache": LRU2(**rules)},
            "Belady, backfill (bound of caches)": {
                "cache": dataclasses.replace(Belady.of(report.trace), backfill=True)
            },
        }
        results["slots"] = compare(report, tried, 0.25)
        print(show_compare(results["slots"]))
    if section("schedulers", "Schedulers and prefetchers in the default, 25 %, ms per token"):
        tried = {
            "Split + Impact (default)": {},
            **{s.__name__: {"scheduler": s()} for s in (Hybrid, DALI, Fiddler)},
            "Never": {"prefetcher": Never()},
            "NextLayer": {"prefetcher": NextLayer()},
        }
        results["schedulers"] = compare(report, tried, 0.25)
        print(show_compare(results["schedulers"]))
    if section("grid", "Default against every preset"):
        prefill = {n: halves(mixtral(options.traces, n, 40), 8)[1] for n in (32, 128, 512, 1024)}
        cells = {"gpt-oss decode": Half(shorten(report.trace, steps // 2), report.prior)}
        cells |= {f"mixtral prefill {n}": half for n, half in prefill.items()}
        for path in options.tiny:
            cells |= tiny_cells(path)
        results["grid"] = rows = grid(cells, PRESETS)
        print("", file=sys.stderr)
        print(show_grid(rows))
        decode = [r for r in rows if (r["what"], r["residency"]) == ("gpt-oss decode", 0.25)]
        gain = np.mean([r["seconds"]["hybrimoe-paper"] / r["seconds"]["hybrimoe"] for r in decode])
        late = [
            r for r in rows if r["seconds"]["hybrimoe"] > TOLERANCE * min(r["seconds"].values())
        ]
        print(
            f"\ngpt-oss decode at 25 %: {gain:.3f}x over hybrimoe-paper, mean over "
            "profiles (wanted 1.15). "
            f"Cells more than 3 % behind the best preset: {len(late)} of {len(rows)}."
        )
    print(json.dumps({"benchmark": "policies", "steps": steps, "results": results}))


def tiny_cells(path: Path) -> dict[str, Half]:
    """Prefill and decode of a recorded trace, the second half of its sequences."""
    trace = read_trace(path)
    first, second = trace.split()
    prior = first.frequencies()
    steps = {
        "prefill": np.flatnonzero(second.prefill),
        "decode": np.flatnonzero(~second.prefill),
    }
    return {
        f"{path.stem} {name}": Half(second.select(picked[:400]), prior)
        for name, picked in steps.items()
    }


def _plot(found: dict[float, dict[str, tuple[float, float]]], folder: Path) -> None:
    import figures
    from hybrimoe.simulation import plots

    kept = {
        "Belady": "Belady, per layer",
        "MRS, alpha .1": "MRS .1",
        "MRS, alpha .5": "MRS .5 (paper)",
        "NextToken": "NextToken",
        **{"LRU-2": "LRU-2", "LRU": "LRU", "LFU": "LFU"},
    }
    rates = {name: [found[r][key][0] for r in found] for name, key in kept.items()}
    figure = figures.draw_hit_rates(list(found), rates, "gpt-oss-20b, decode, held-back half")
    plots.save(figure, folder / "hit_rates.png")


if __name__ == "__main__":
    main()
