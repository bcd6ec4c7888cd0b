"""The paper's open questions, a table each.

    python benchmarks/questions.py --traces FOLDER [--quick] [--only NAME]

Look-ahead depth, compute-cost-aware MRS, constant against contended link time, per-layer against
model-wide slots. Fixed priorities against better search is in bounds.py. Data and halves are those
of policies.py; alphas were tuned on the first half.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.plan import Plan, place_shards
from hybrimoe.policy.prefetchers import Never
from hybrimoe.policy.presets import PRESETS
from hybrimoe.policy.profiles import PROFILES
from hybrimoe.policy.rankings import MRS, Ranking, UsageStats
from hybrimoe.policy.routing import Load
from hybrimoe.policy.schedulers import Scheduler, Split
from hybrimoe.policy.timeline import Timeline
from hybrimoe.simulation.foreign import read_trace
from hybrimoe.simulation.synthesis import synthesise
from markdown import table
from oracle import perfect_forecasts
from policies import DEFAULT, Half, decode_s, halves, mixtral

RESIDENCY = (0.25, 0.5, 0.75)
RECALL = (0.80, 0.72, 0.67, 0.62)  # of routers run early: measured on tiny-moe, the last by others


@dataclass(frozen=True)
class CostAware(Ranking):
    """MRS of the CPU seconds an expert takes in a step, instead of its router score.

    fixed, token: seconds per expert, and per token of it.
    """

    alpha: float = 0.1
    fixed: float = 1.0
    token: float = 0.0

    def observe(self, books: UsageStats, load: Load) -> None:
        seconds = np.zeros(books.score.shape[1])
        seconds[load.experts] = self.fixed + self.token * load.tokens
        books.score[load.layer] += self.alpha * (seconds - books.score[load.layer])

    def worth(self, books: UsageStats) -> np.ndarray:
        return books.score


@dataclass(frozen=True)
class Blind(Scheduler):
    """Plans as `Split` does where the link and the CPU do not slow each other down."""

    def plan(self, load: Load, ready: np.ndarray, timeline: Timeline, cost: CostModel) -> Plan:
        alone = dataclasses.replace(
            cost,
            cpu_expert_contended=cost.cpu_expert,
            link_bandwidth_contended=cost.link_bandwidth,
        )
        shares = Split().plan(load, ready, timeline, alone).shards
        return place_shards(load, ready, shares, timeline, cost)


def mean_ms(half: Half, residency: float, base: str = "hybrimoe", **own) -> float:
    return float(np.mean([1e3 * decode_s(half, p, base, residency, **own) for p in PROFILES]))


def depths(gpt: Half, steps: int) -> dict[str, list[float]]:
    """Milliseconds per token by depth, for forecasts from ids, from routers, and perfect ones."""
    sure = Half(perfect_forecasts(gpt.trace), gpt.prior)
    routers = synthesise(
        *(26, 64, 6),
        **{"tokens": steps, "sequences": 2, "recall": RECALL, "lru_hit_rate": 0.477, "seed": 5},
        model="deepseek-v2-lite",
    )
    first, second = routers.split()
    router = Half(second, first.frequencies())
    found = {}
    for name, half in (
        ("gpt-oss, table of ids", gpt),
        ("gpt-oss, perfect", sure),
        ("synthetic 64 experts, routers", router),
    ):
        for residency in (0.25, 0.5):
            for label, base in (("default", "hybrimoe"), ("paper's policies", "hybrimoe-paper")):
                own = PRESETS[base].prefetcher
                found[f"{name}, {label}, {residency:.0%}"] = [
                    mean_ms(
                        half,
                        residency,
                        base,
                        prefetcher=dataclasses.replace(own, depth=d)
                        if d
                        else Never(window=own.window),
                    )
                    for d in range(5)
                ]
    return found


def cost_aware(gpt: Half, prompts: dict[str, Half]) -> dict[str, dict[str, float]]:
    """Milliseconds of MRS by score and by CPU seconds at stake, the default's rules otherwise."""
    rules = {"admission": True, "backfill": True}
    found: dict[str, dict[str, float]] = {}
    for what, half in {"gpt-oss decode": gpt, **prompts}.items():
        for residency in RESIDENCY:
            one = {"MRS .1": [], "cost-aware, alpha .1": [], "cost-aware, alpha .05": []}
            for name in PROFILES:
                cost = cost_of(name, half)
                seconds = {"fixed": cost.cpu_expert, "token": cost.cpu_token}
                for label, ranking in (
                    ("MRS .1", MRS(alpha=0.1, **rules)),
                    ("cost-aware, alpha .1", CostAware(alpha=0.1, **seconds, **rules)),
                    ("cost-aware, alpha .05", CostAware(alpha=0.05, **seconds, **rules)),
                ):
                    ms = 1e3 * decode_s(half, name, "hybrimoe", residency, cache=ranking)
                    one[label].append(ms)
            found[f"{what} {residency:.0%}"] = {k: float(np.mean(v)) for k, v in one.items()}
    return found


def cost_of(name: str, half: Half) -> CostModel:
    from hybrimoe.policy.profiles import profile, shape

    return profile(name).cost(shape(half.trace.model))


def contended(gpt: Half, prompts: dict[str, Half]) -> dict[str, list[float]]:
    """Speed of planning with contention known over planning without, by profile."""
    found = {}
    for what, half in {"gpt-oss decode": gpt, **prompts}.items():
        for residency in (0.25, 0.5):
            blind = [decode_s(half, p, "hybrimoe", residency, scheduler=Blind()) for p in PROFILES]
            aware = [decode_s(half, p, "hybrimoe", residency) for p in PROFILES]
            found[f"{what} {residency:.0%}"] = [b / a for b, a in zip(blind, aware)]
    return found


def scopes(gpt: Half, prompts: dict[str, Half]) -> dict[str, list[float]]:
    """Speed of model-wide slots over a quota per layer, by residency, mean over profiles."""
    wide = dataclasses.replace(DEFAULT.ranking, scope="model")
    return {
        what: [mean_ms(half, r) / mean_ms(half, r, cache=wide) for r in RESIDENCY]
        for what, half in {"gpt-oss decode": gpt, **prompts}.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", help="depth, cost, contention or slots")
    options = parser.parse_args()
    steps = 100 if options.quick else 300
    _, gpt = halves(read_trace(options.traces / "gptoss20b_decode.npz"), steps)
    prompts = {
        f"mixtral prefill {n}": halves(mixtral(options.traces, n, 16), 8)[1] for n in (32, 512)
    }
    results: dict = {}

    def section(name: str, title: str) -> bool:
        wanted = options.only in (None, name)
        if wanted:
            print(f"\n### {title}\n", flush=True)
        return wanted

    if section("depth", "Look-ahead depth, ms per token, mean over profiles"):
        results["depth"] = found = depths(gpt, steps)
        rows = [(name, *(f"{ms:.3f}" for ms in times)) for name, times in found.items()]
        print(table(("forecasts, policies, residency", *(f"depth {d}" for d in range(5))), rows))
    if section("cost", "MRS by router score against CPU seconds at stake, ms, mean over profiles"):
        results["cost"] = aware = cost_aware(gpt, prompts)
        names = list(next(iter(aware.values())))
        rows = [(what, *(f"{one[n]:.2f}" for n in names)) for what, one in aware.items()]
        print(table(("data, residency", *names), rows))
    if section("contention", "Gain of planning with contended speeds over constant ones"):
        results["contention"] = gains = contended(gpt, prompts)
        rows = [(what, *(f"{g:.3f}x" for g in by)) for what, by in gains.items()]
        print(table(("data, residency", *PROFILES), rows))
    if section("slots", "Gain of model-wide slots over a quota per layer, mean over profiles"):
        results["slots"] = gains = scopes(gpt, prompts)
        rows = [(what, *(f"{g:.3f}x" for g in by)) for what, by in gains.items()]
        print(table(("data", *(f"{r:.0%}" for r in RESIDENCY)), rows))
    print(json.dumps({"benchmark": "questions", "steps": steps, "results": results}))


if __name__ == "__main__":
    main()
