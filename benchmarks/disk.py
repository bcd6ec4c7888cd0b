"""Decode with a part of the experts in RAM and the others on disk, against the disk's own speed.

    python benchmarks/disk.py [--layers 4] [--tokens 48] [--rounds 2] [--folder /path/on/the/disk]

A generated model of the Qwen3-30B-A3B shape, its experts packed as int4; every read goes past the page
cache. Its weights are random, so its routers are too: `replay.py` routes it instead. Before each run
the disk alone is measured, by reads of as many bytes with no model around them: disks drift.

The bound is the larger of two times, as if they overlapped without a gap: a token with all experts in
RAM, and the bytes that it needs and RAM lacks at the best speed of the disk alone.
"""

import argparse
import gc
import shutil
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import transformers

import hybrimoe
from hybrimoe.models.releases import cache_argument, cache_in
from hybrimoe.policy.rankings import LRU, MRS
from hybrimoe.runtime.disk.reader import Reader
from hybrimoe.runtime.disk.tier import DiskTier
from hybrimoe.runtime.pages import allocate
from hybrimoe.simulation.trace import RoutingTrace
from machine import describe, finish
from markdown import table
from replay import generated_model, made_up, replay

EXPERTS, TOP_K, D, F = 128, 8, 2048, 768
SHARES = (1.0, 0.25, 0.5, 0.75)
HALF = 0.5
READS = 96  # experts of one sample of the disk, 255 MB
READERS = (1, 2, 4)
VARIANTS: dict[str, Callable[[DiskTier], object]] = {
    "as it is": lambda tier: None,
    "no forecasts": lambda tier: setattr(tier, "_look_ahead", lambda *_: None),
    "2 readers": lambda tier: setattr(tier, "reader", Reader(2)),
    "4 readers": lambda tier: setattr(tier, "reader", Reader(4)),
    "LRU": lambda tier: tier.cache.rank_by(LRU(scope="model")),
    "MRS": lambda tier: tier.cache.rank_by(MRS(scope="model")),
}
HEAD = ("", "tokens/s", "of RAM", "of bound", "hits", "disk ms", "waited ms", "GB/s", "disk alone")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4, help="340 MB of packed experts each")
    parser.add_argument("--tokens", type=int, default=48, help="after as many to warm up")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; kept, and used again")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="hybrimoe-disk-"))
    try:
        packed = generated_model(folder, arguments.layers, D, F, EXPERTS)
        results = measure(packed, arguments.layers, arguments.tokens, arguments.rounds)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)
    finish("disk", results, describe())


def measure(packed: Path, layers: int, tokens: int, rounds: int) -> list[dict]:
    """All shares of RAM, then the variants at one half; medians over rounds that alternate."""
    trace = made_up(layers, EXPERTS, TOP_K, 2 * tokens)
    cases = [(share, "as it is") for share in SHARES]
    cases += [(HALF, name) for name in VARIANTS if name != "as it is"]
    runs: dict[tuple[float, str], list[dict]] = {case: [] for case in cases}
    for _ in range(rounds):
        for share, name in cases:
            runs[share, name].append(run(packed, share, name, trace, tokens))
    in_ram = median([run["token_s"] for run in runs[1.0, "as it is"]])
    results = [summarise(*case, found, in_ram, tokens) for case, found in runs.items()]
    print(table(HEAD, [row(result) for result in results]))
    return results


def run(packed: Path, share: float, name: str, trace: RoutingTrace, tokens: int) -> dict:
    """One fresh load, the disk alone, then decode."""
    model = hybrimoe.from_pretrained(packed, device="cpu", ram=share)
    tier, alone = model.hybrimoe.pool.tier, {}
    if tier is not None:
        alone = {f"{readers} readers": read_alone(tier, readers) for readers in READERS}
        VARIANTS[name](tier)
    replay(model, trace)
    decode(model, tokens)
    stats = model.hybrimoe.stats()
    model.hybrimoe.close()
    del model
    gc.collect()
    return {"token_s": stats["decode_s"] / tokens, "disk": stats["disk"] or {}, "alone_gb_s": alone}


@torch.no_grad()
def decode(model: torch.nn.Module, tokens: int) -> None:
    """So many tokens to warm up, and as many that count."""
    cache = None
    for at in range(2 * tokens):
        if at == tokens:
            model.hybrimoe.reset_stats()
        token = torch.tensor([[at % 512]])
        cache = cache_in(model(token, **cache_argument(model, cache), use_cache=True))


def read_alone(tier: DiskTier, readers: int) -> float:
    """GB/s of the same blobs in any order, read by so many threads that do nothing else."""
    order = np.random.default_rng().permutation(sum(tier.sizes.experts))[:READS].tolist()
    waiting, total, lock = iter(order), [0], threading.Lock()

    def read() -> None:
        slot = allocate(1, tier.sizes.slot_bytes)[0]
        slot[:] = 1  # its pages are there before the clock runs
        start.wait()
        while (index := take()) is not None:
            count = tier.backing.read(*divmod(index, EXPERTS), slot)
            with lock:
                total[0] += count

    def take() -> int | None:
        with lock:
            return next(waiting, None)

    start = threading.Barrier(readers + 1)
    threads = [threading.Thread(target=read) for _ in range(readers)]
    for thread in threads:
        thread.start()
    start.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    return total[0] / (time.perf_counter() - started) / 1e9


def summarise(share: float, name: str, runs: list[dict], in_ram: float, tokens: int) -> dict:
    """Medians of one case; what the disk did is per token."""
    token_s = median([run["token_s"] for run in runs])
    found = {"in_ram": share, "variant": name, "tokens_s": 1 / token_s, "of_ram": in_ram / token_s}
    if share == 1.0:
        return found
    disks = [run["disk"] for run in runs]
    per_token = lambda key: median([disk[key] for disk in disks]) / tokens  # noqa: E731
    each = disks[0]["read_bytes"] / disks[0]["reads"]
    alone = {key: median([run["alone_gb_s"][key] for run in runs]) for key in runs[0]["alone_gb_s"]}
    # An expert that came early because of a forecast would else have been a miss.
    needed_bytes = (per_token("misses") + per_token("forecast_used")) * each
    bound_s = max(in_ram, needed_bytes / max(alone.values()) / 1e9)
    return found | {
        "of_bound": bound_s / token_s,
        "bound_tokens_s": 1 / bound_s,
        "needed_bytes": needed_bytes,
        "read_bytes": per_token("read_bytes"),
        "hit_rate": median([disk["hit_rate"] for disk in disks]),
        "disk_s": per_token("disk_s"),
        "waited_s": per_token("waited_s"),
        "gb_s": median([disk["read_bytes"] / disk["disk_s"] / 1e9 for disk in disks]),
        "alone_gb_s": alone,
    }


def row(result: dict) -> tuple[str, ...]:
    what = f"{result['in_ram']:.0%} in RAM"
    if result["variant"] != "as it is":
        what += f", {result['variant']}"
    speed = (what, f"{result['tokens_s']:.1f}", f"{result['of_ram']:.2f}")
    if "disk_s" not in result:
        return (*speed, *[""] * (len(HEAD) - len(speed)))
    times = [f"{1e3 * result[key]:.1f}" for key in ("disk_s", "waited_s")]
    alone = " / ".join(f"{speed:.2f}" for speed in result["alone_gb_s"].values())
    share, hits = f"{result['of_bound']:.2f}", f"{result['hit_rate']:.1%}"
    return (*speed, share, hits, *times, f"{result['gb_s']:.2f}", alone)


def median(numbers: list[float]) -> float:
    return float(np.median(numbers))


if __name__ == "__main__":
    main()
