"""Decode with a part of the experts in RAM and the others on disk, against the disk's own speed.

python benchmarks/disk.py [--layers 4] [--tokens 24] [--folder /path/on/the/disk]

A generated model of the Qwen3-30B-A3B shape, its experts packed as int4; every read goes past the page
cache. How often it hits is a property of the generated routers, and says nothing of a trained model.
"""

import argparse
import gc
import os
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers

import hybrimoe
from hybrimoe.runtime.pool import allocate
from hybrimoe.runtime.storage.backing import Backing
from machine import describe, finish

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import generated

EXPERTS, D, F = 128, 2048, 768
SHARES = (0.25, 0.5, 0.75, 1.0)
LARGE = 8 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=4, help="340 MB of packed experts each")
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; kept, and used again")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="hybrimoe-disk-"))
    try:
        results = measure(folder, arguments.layers, arguments.tokens)
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)
    finish("disk", results, describe())


def measure(folder: Path, layers: int, tokens: int) -> list[dict]:
    packed = folder / "packed"
    if not (packed / "hybrimoe.json").exists():
        plain = folder / "plain"
        generated.write(plain, generated.configuration(layers, D, F, EXPERTS, 512), 4 * layers)
        model = hybrimoe.from_pretrained(plain, weights="int4", device="cpu")
        hybrimoe.save_packed(model, packed)
        del model
        shutil.rmtree(plain)
        gc.collect()
    results = []
    for share in SHARES:
        model = hybrimoe.from_pretrained(packed, device="cpu", ram=share)
        if not results:
            results.append(raw_speed(model))
        results.append(decode(model, share, tokens))
        hybrimoe.unwrap(model)
        del model
        gc.collect()
    return results


def raw_speed(model: torch.nn.Module) -> dict:
    """Read all experts in order in large pieces, and in any order one by one."""
    backing: Backing = model.hybrimoe.pool.tier.backing
    files = [(place.file, os.fstat(place.file).st_size) for place in backing.places.values()]
    memory = memoryview(allocate(1, LARGE)[0])
    total, start = 0, time.perf_counter()
    for file, size in files:
        for at in range(0, size // LARGE * LARGE, LARGE):
            total += os.preadv(file, [memory], at)
    sequential = total / (time.perf_counter() - start) / 1e9
    slot = allocate(1, model.hybrimoe.pool.tier.sizes.slot_bytes)[0]
    order = np.random.default_rng(0).permutation(len(files) * EXPERTS)[:256]
    total, start = 0, time.perf_counter()
    for layer, expert in (divmod(int(i), EXPERTS) for i in order):
        total += backing.read(layer, expert, slot)
    single = total / (time.perf_counter() - start) / 1e9
    print(f"disk: {sequential:.2f} GB/s in order by 8 MiB, {single:.2f} GB/s by single experts")
    return {"what": "disk", "sequential_gb_s": sequential, "experts_gb_s": single}


@torch.no_grad()
def decode(model: torch.nn.Module, share: float, tokens: int) -> dict:
    """One random token after the other, after as many to warm up; greedy ones soon repeat themselves."""
    ids = torch.randint(512, (2 * tokens,), generator=torch.Generator().manual_seed(0))
    past = None
    for at, token in enumerate(ids):
        if at == tokens:
            model.hybrimoe.reset_stats()
        past = model(token.view(1, 1), past_key_values=past, use_cache=True).past_key_values
    stats = model.hybrimoe.stats()
    disk = stats["disk"] or {}
    rate = stats["decode_tokens"] / stats["decode_s"]
    speed = disk["read_bytes"] / disk["disk_s"] / 1e9 if disk else 0.0
    waited = disk.get("waited_s", 0.0) / (stats["decode_s"] + stats["prefill_s"])
    hits = disk.get("hit_rate", 1.0)
    print(f"{share:4.0%} in RAM: {rate:6.2f} tokens/s, {hits:6.1%} hits, {speed:5.2f} GB/s while it "
          f"reads, {waited:4.0%} of the time waiting")  # fmt: skip
    return {"what": "decode", "in_ram": share, "tokens_s": rate, "waited_share": waited,
            "disk_gb_s": speed, "disk": disk}  # fmt: skip


if __name__ == "__main__":
    main()
