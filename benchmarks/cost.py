"""Is the cost model honest? Predicted against measured spans of CPU experts.

    python benchmarks/cost.py [--formats int4,int8,native] [--shape qwen3-30b-a3b] [--repeats 3] [--grid]

For each format the machine is calibrated as `hybrimoe calibrate` does it. Then other experts, other
routing and other numbers of tokens are timed: 1 to 8 experts with 1 to 128 tokens each, alone and
with a copy in flight, and loads in which every expert has another number of tokens. Without a GPU
the copy is a thread's `memcpy`, which takes a core: these rows use one thread less than there are.
"""

import argparse
import time
from contextlib import nullcontext

import numpy as np

from hybrimoe.calibration.measure import measure, named_subject
from hybrimoe.calibration.probes import MemoryTraffic
from hybrimoe.kernels.cpu.run_layer import run_layer
from hybrimoe.kernels.cpu.workspace import Workspace
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.profiles import shape
from hybrimoe.simd.threads import launch, usable_cores
from machine import describe, finish, random_layer

EXPERTS = range(1, 9)
TOKENS = (1, 2, 3, 5, 8, 13, 24, 48, 96, 128)
BYTES_WANTED = 320 << 20


def loads(rng: np.random.Generator, experts: int) -> dict[tuple[str, int, int], np.ndarray]:
    """Expert ids [T, K] int64 of every load, by (kind, experts, tokens)."""
    found = {}
    for count in EXPERTS:
        for tokens in TOKENS:
            ids = rng.permutation(experts)[:count]
            found["even", count, tokens] = np.tile(ids, (tokens, 1)).astype(np.int64)
            if count > 2:  # each token takes two of them, the first ones more often
                popular = 1 / np.arange(1, count + 1)
                keys = rng.exponential(size=(tokens, count)) / popular
                found["uneven", count, tokens] = ids[np.argsort(keys, 1)[:, :2]].astype(np.int64)
    return found


def predict(cost: CostModel, ids: np.ndarray, copying: bool) -> float:
    """Seconds of the CPU lane: what planners add up."""
    tokens = np.unique(ids, return_counts=True)[1].tolist()
    each = sum(cost.cpu(n, first=False, contended=copying) for n in tokens)
    return cost.cpu_first + each


def check(cost: CostModel, fmt: str, model: str, threads: int, copying: bool, rounds: int) -> list:
    """(kind, experts, tokens, predicted and measured seconds) of every load, medians of rounds."""
    like, rng = shape(model), np.random.default_rng(1)
    size = cost.expert_bytes
    layer = random_layer(fmt, -(-BYTES_WANTED // size), like.hidden, like.intermediate)
    x = rng.standard_normal((max(TOKENS), like.hidden), np.float32)
    out, workspace, seconds = np.zeros_like(x), Workspace(), {}
    with MemoryTraffic() if copying else nullcontext():
        for turn in range(rounds + 1):
            for name, ids in loads(rng, len(layer.blobs)).items():
                weights = np.full(ids.shape, 1 / ids.shape[1], np.float32)
                begin = time.perf_counter()
                tokens = len(ids)
                run_layer(layer, x[:tokens], ids, weights, out[:tokens], workspace, threads=threads)
                taken = time.perf_counter() - begin
                if turn:  # the first warms caches and compiles
                    seconds.setdefault(name, []).append((taken, predict(cost, ids, copying)))
    medians = {name: np.median(runs, 0).tolist() for name, runs in seconds.items()}
    return [(*name, predicted, measured) for name, (measured, predicted) in medians.items()]


def summary(fmt: str, threads: int, copying: bool, kind: str, rows: list) -> dict:
    """Median and worst relative error of one kind of load, and where the worst is."""
    mine = [row for row in rows if row[0] == kind]
    errors = [abs(predicted / measured - 1) for *_, predicted, measured in mine]
    worst = mine[int(np.argmax(errors))]
    return {
        "format": fmt,
        "threads": threads,
        "copy_in_flight": copying,
        "loads": kind,
        "median_error": float(np.median(errors)),
        "p90_error": float(np.quantile(errors, 0.9)),
        "worst_error": max(errors),
        "worst_experts": worst[1],
        "worst_tokens": worst[2],
        "rows": [
            {"experts": e, "tokens": n, "predicted_s": p, "measured_s": m} for _, e, n, p, m in mine
        ],
    }


def show(result: dict) -> None:
    """One line of the table."""
    copying = "copy in flight" if result["copy_in_flight"] else "alone"
    where = f"{result['worst_experts']} experts, {result['worst_tokens']} tokens"
    print(
        f"{result['format']:9} {result['threads']:7} {copying:15} {result['loads']:7}"
        f"{result['median_error']:8.1%} {result['p90_error']:8.1%} {result['worst_error']:8.1%}"
        f"  {where}",
        flush=True,
    )


def grid(result: dict) -> None:
    """Predicted / measured milliseconds of the even loads."""
    rows = {(row["experts"], row["tokens"]): row for row in result["rows"]}
    print("experts \\ tokens" + "".join(f"{n:>15}" for n in TOKENS))
    for count in EXPERTS:
        cells = [rows[count, n] for n in TOKENS]
        texts = [f"{r['predicted_s'] * 1e3:.2f}/{r['measured_s'] * 1e3:.2f}" for r in cells]
        print(f"{count:16}" + "".join(f"{text:>15}" for text in texts))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--formats", default="int4,int8,native")
    parser.add_argument("--shape", default="qwen3-30b-a3b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3, help="calibrations, each with its check")
    parser.add_argument("--grid", action="store_true", help="print and keep every point")
    options = parser.parse_args()
    threads, results, seconds = launch.threads(), [], []
    spare = max(1, min(threads, usable_cores() - 1))
    print(f"{describe()}\n")
    heads = ("format", "threads", "", "loads", "median", "p90", "worst")
    print("{:9} {:>7} {:15} {:7}{:>8} {:>8} {:>8}".format(*heads))
    for fmt in options.formats.split(","):
        for count in sorted({threads, spare}, reverse=True):
            subject, cases = named_subject(options.shape, fmt), {}
            for _ in range(options.repeats):  # a shared machine's speed drifts
                begin = time.perf_counter()
                cost = measure(subject, None, count).cost
                seconds.append(time.perf_counter() - begin)
                for copying in (False, True) if count == spare < usable_cores() else (False,):
                    rows = check(cost, subject.fmt, options.shape, count, copying, options.rounds)
                    cases.setdefault(copying, []).extend(rows)
            for copying, rows in cases.items():
                for kind in ("even", "uneven"):
                    results.append(summary(fmt, count, copying, kind, rows))
                    show(results[-1])
                if options.grid:
                    grid(results[-2])
    print(f"\ncalibration took {min(seconds):.1f} to {max(seconds):.1f} s, compilation included")
    if not options.grid:
        results = [{k: v for k, v in row.items() if k != "rows"} for row in results]
    finish("cost", results, describe() | {"shape": options.shape, "calibration_s": max(seconds)})


if __name__ == "__main__":
    main()
