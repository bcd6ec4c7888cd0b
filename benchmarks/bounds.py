"""How far every policy is from what no policy can beat, on real routing.

    python benchmarks/bounds.py --traces FOLDER [--quick]     needs scipy: pip install hybrimoe[bench]

Belady bounds caches, forecasts that come true bound prefetchers, and the best of all divisions of a
layer's experts bounds schedulers: by trying every one where there are few experts, else by a mixed
integer programme whose optimum no schedule can beat. Data and halves are those of policies.py.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.engine import Policies
from hybrimoe.policy.plan import Plan, by_tokens, makespan, place_shards
from hybrimoe.policy.prefetchers import Impact, Never
from hybrimoe.policy.presets import PRESETS
from hybrimoe.policy.profiles import PROFILES
from hybrimoe.policy.routing import Load
from hybrimoe.policy.schedulers import DALI, Fiddler, Hybrid, Scheduler, Split, Static
from hybrimoe.policy.timeline import Timeline
from hybrimoe.simulation.belady import Belady
from hybrimoe.simulation.foreign import read_trace
from hybrimoe.simulation.simulator import simulate
from hybrimoe.simulation.synthesis import synthesise
from markdown import table
from oracle import Exact, perfect_forecasts
from policies import DEFAULT, Half, decode_s, halves, mixtral

Case = tuple[Load, np.ndarray, Timeline, CostModel]


@dataclass(frozen=True)
class Beam(Scheduler):
    """Divides one expert after the other, those with most tokens first, and keeps the best starts.

    width: plans that are kept; experts not yet divided count where their weights are.
    """

    width: int = 8

    def plan(self, load: Load, ready: np.ndarray, timeline: Timeline, cost: CostModel) -> Plan:
        lanes = np.maximum(timeline.free - timeline.now, 0.0)
        order = by_tokens(load.tokens)
        home = np.where(np.isfinite(ready), cost.shards, 0).astype(np.int32)
        kept = [home]
        for i in order:
            tried = []
            for share in kept:
                for part in range(cost.shards + 1):
                    trial = share.copy()
                    trial[i] = part
                    seconds = makespan(load.tokens, ready, lanes, cost.vector, trial, order)
                    tried.append((seconds, len(tried), trial))
            kept = [trial for _, _, trial in sorted(tried)[: self.width]]
        return place_shards(load, ready, kept[0], timeline, cost)


@dataclass(frozen=True)
class Watch(Scheduler):
    """Plans as `Split` and keeps every situation it met."""

    cases: list[Case]

    def plan(self, load: Load, ready: np.ndarray, timeline: Timeline, cost: CostModel) -> Plan:
        self.cases.append((load, ready.copy(), timeline.fork(), cost))
        return Split().plan(load, ready, timeline, cost)


def milp_bound(case: Case, limit_s: float = 2.0) -> float:
    """Seconds that no schedule of this load can beat: lanes as budgets, without their order.

    Shards are whole numbers. Copies are counted without latency, GPU parts without launches, CPU
    work at its speed alone: each can only make the true optimum later.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    load, ready, timeline, cost = case
    lanes = np.maximum(timeline.free - timeline.now, 0.0)
    n, shards = load.experts.size, cost.shards
    absent = np.isinf(ready)
    gpu = np.maximum(cost.gpu_read, cost.gpu_token * load.tokens) / shards
    cpu = (cost.cpu_expert + cost.cpu_token * load.tokens) / shards
    link = np.where(absent, cost.expert_bytes / cost.link_bandwidth / shards, 0.0)
    # Variables: shards on the GPU [n], whether the CPU works at all, the makespan.
    rows = [
        np.concatenate([gpu, [0.0, -1.0]]),
        np.concatenate([link, [0.0, -1.0]]),
        np.concatenate([-cpu, [cost.cpu_first, -1.0]]),
        np.concatenate([np.full(n, -1.0), [-n * shards, 0.0]]),
    ]
    most = [-lanes[1], 0.0, -cpu.sum() * shards - lanes[0], -n * shards]
    found = milp(
        np.concatenate([np.zeros(n + 1), [1.0]]),
        constraints=LinearConstraint(np.array(rows), ub=np.array(most)),
        integrality=np.concatenate([np.ones(n + 1), [0]]),
        bounds=Bounds(np.zeros(n + 2), np.concatenate([np.full(n, shards), [1, np.inf]])),
        options={"time_limit": limit_s},
    )
    return float(found.mip_dual_bound)


def situations(half: Half, profile: str, residency: float, most: int) -> list[Case]:
    """What the default's scheduler meets, with at least one expert absent; evenly picked."""
    watch = Watch([])
    simulate(half.trace, profile, "hybrimoe", vram=residency, prior=half.prior, scheduler=watch)
    missing = [case for case in watch.cases if np.isinf(case[1]).any()]
    return missing[:: max(len(missing) // most, 1)][:most]


def schedules(cases: list[Case], exact: bool) -> dict[str, tuple[float, float]]:
    """Share of the bound, mean and worst, of every scheduler."""
    rivals: dict[str, Scheduler] = {"Split (default)": Split(), "Hybrid (paper)": Hybrid()}
    rivals |= {"DALI": DALI(), "Fiddler": Fiddler(), "Static": Static(), "beam of 8": Beam()}
    if exact:
        rivals |= {"exact": Exact(), "exact, whole experts": Exact(whole=True)}
        bound = [Exact().plan(*case).makespan for case in cases]
    else:
        bound = [milp_bound(case) for case in cases]
    found = {}
    for name, scheduler in rivals.items():
        spans = [scheduler.plan(*case).makespan for case in cases]
        shares = np.array(bound) / np.array(spans)
        found[name] = (float(shares.mean()), float(shares.min()))
    return found


def whole_system(half: Half, residency: float) -> dict[str, list[float]]:
    """Milliseconds per token by profile: presets, and the default with each part made perfect."""
    sure = Half(perfect_forecasts(half.trace), half.prior)
    belady = dataclasses.replace(Belady.of(half.trace), backfill=True)
    ahead = Impact(depth=4)
    bounds = {
        "perfect forecasts, 4 layers": (sure, dataclasses.replace(DEFAULT, prefetcher=ahead)),
        "exact schedule": (half, dataclasses.replace(DEFAULT, scheduler=Exact())),
        "Belady": (half, dataclasses.replace(DEFAULT, ranking=belady)),
        "all three": (sure, Policies(Exact(), belady, ahead)),
    }
    found = {name: [1e3 * decode_s(half, p, name, residency) for p in PROFILES] for name in PRESETS}
    for name, (data, policies) in bounds.items():
        found[name] = [1e3 * decode_s(data, p, policies, residency) for p in PROFILES]
    every = dataclasses.replace(DEFAULT, prefetcher=Never())
    found["every expert resident"] = [1e3 * decode_s(half, p, every, 1.0) for p in PROFILES]
    return found


def show_system(found: dict[str, list[float]]) -> str:
    """The bound of a profile is the fastest of all that know the future."""
    bound = np.min([found[name] for name in ("Belady", "exact schedule", "all three")], axis=0)
    rows = [
        (name, *(f"{t:.2f}" for t in times), f"{float(np.mean(bound / np.array(times))):.0%}")
        for name, times in found.items()
    ]
    return table(("policies", *PROFILES, "share of the bound"), rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--traces", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    steps = 100 if options.quick else 300
    _, report = halves(read_trace(options.traces / "gptoss20b_decode.npz"), steps)
    results: dict = {"system": {}, "schedules": {}}
    for residency in (0.25, 0.5):
        found = whole_system(report, residency)
        results["system"][residency] = found
        print(f"\n### Whole system, gpt-oss-20b decode at {residency:.0%}, ms per token\n")
        print(show_system(found), flush=True)
    prompts = halves(mixtral(options.traces, 128, 8), 4)[1]
    many = synthesise(4, 64, 6, tokens=1, prompt=256, seed=3, model="deepseek-v2-lite")
    wide = Half(many.select([0]), many.frequencies())
    for title, half, most, exact in (
        ("gpt-oss-20b decode (4 experts)", report, 400, True),
        ("Mixtral prefill of 128 tokens (8 experts)", prompts, 24, True),
        ("synthetic prefill of 256 tokens, 64 experts, against milp", wide, 12, False),
    ):
        cases = [c for p in PROFILES for c in situations(half, p, 0.25, most // 4)]
        shares = schedules(cases, exact)
        results["schedules"][title] = shares
        print(f"\n### Schedules: {title}, {len(cases)} loads at 25 %\n")
        rows = [(name, f"{mean:.1%}", f"{worst:.1%}") for name, (mean, worst) in shares.items()]
        print(table(("scheduler", "share of the bound", "worst"), rows), flush=True)
    print(json.dumps({"benchmark": "bounds", "steps": steps, "results": results}))


if __name__ == "__main__":
    main()
