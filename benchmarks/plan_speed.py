"""The tokens per second that `plan` predicts beside those that are measured, and how long it takes.

python benchmarks/plan_speed.py [--folder /tmp/...] [--only small,wide] [--shards]
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
import transformers

import hybrimoe
import hybrimoe.memory.speed
from machine import describe, finish

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import generated

MODELS = {
    "small": (4, 256, 128, 32, 8192),
    "deep": (24, 512, 256, 64, 32000),
    "wide": (6, 1024, 512, 64, 64000),
    "qwen3": (4, 2048, 768, 64, 32000),
}
"""Layers, hidden size, expert size, experts, vocabulary."""
PROMPT, TOKENS, ROUNDS = 16, 48, 5
LARGE = (94, 4096, 1536, 128, 151936)  # Qwen3-235B-A22B


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where to write; found there, it is used again")
    parser.add_argument("--only", default=",".join(MODELS), help=f"some of {', '.join(MODELS)}")
    parser.add_argument("--weights", default="native,int4")
    parser.add_argument("--shards", action="store_true", help="time a plan of 60 files, no more")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="hybrimoe-plan-"))
    try:
        if arguments.shards:
            results = time_shards(folder)
        else:
            results = compare(folder, arguments.only.split(","), arguments.weights.split(","))
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)
    finish("plan_speed", results, describe())


def compare(folder: Path, names: list[str], formats: list[str]) -> list[dict]:
    """Every model in every format, before a calibration and after it."""
    cases = [(name, write(folder / name, MODELS[name]), fmt) for name in names for fmt in formats]
    kept, hybrimoe.memory.speed.kept = (
        hybrimoe.memory.speed.kept,
        lambda key: None,
    )  # as if none were kept
    guessed = [hybrimoe.plan(path, weights=fmt).speed.decode_tokens_s for _, path, fmt in cases]
    hybrimoe.memory.speed.kept = kept
    for fmt in formats:
        hybrimoe.calibrate(weights=fmt)
    known = [hybrimoe.plan(path, weights=fmt).speed for _, path, fmt in cases]
    head = f"{'model':10}{'weights':8}{'measured':>10}{'plan':>10}{'ratio':>8}"
    print(f"{head}{'calibrated':>12}{'ratio':>8}  bound by")
    results = []
    for (name, path, fmt), plain, found in zip(cases, guessed, known):
        took, calibrated = measure(path, fmt), found.decode_tokens_s
        results.append({"model": name, "weights": fmt, "measured": took, "plan": plain,
                        "calibrated": calibrated})  # fmt: skip
        print(f"{name:10}{fmt:8}{took:10.1f}{plain:10.1f}{plain / took:7.2f}x{calibrated:12.1f}"
              f"{calibrated / took:7.2f}x  {found.bound}", flush=True)  # fmt: skip
    return results


def write(folder: Path, sizes: tuple[int, ...]) -> Path:
    if not (folder / "model.safetensors.index.json").exists():
        generated.write(folder, generated.configuration(*sizes), 4)
    return folder


def measure(folder: Path, weights: str) -> float:
    """Tokens per second of `generate` after the first one, the median of some answers.

    Sampling from random weights gives other tokens every time, so that experts come from memory.
    """
    model = hybrimoe.from_pretrained(folder, weights=weights, device="cpu")
    prompt = torch.randint(model.config.vocab_size, (1, PROMPT))
    answer(model, prompt, 4)
    return statistics.median(answer(model, prompt, TOKENS) for _ in range(ROUNDS))


class Clock:
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: object) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def answer(model, prompt: torch.Tensor, tokens: int) -> float:
    clock = Clock()
    sizes = {"min_new_tokens": tokens + 1, "max_new_tokens": tokens + 1}
    with torch.no_grad():
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=True,
            top_k=0,
            streamer=clock,
            **sizes,
        )
    _, first, *_, last = clock.times
    return tokens / (last - first)


def time_shards(folder: Path) -> list[dict]:
    """Seconds of a plan of the size of Qwen3-235B-A22B in 60 files, whose weights are holes."""
    generated.write_hollow(folder / "hollow", generated.configuration(*LARGE), 60)
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        found = hybrimoe.plan(folder / "hollow", ram="200GiB")
        seconds.append(time.perf_counter() - start)
        print(f"plan of {found.checkpoint.files} files, {found.checkpoint.nbytes / 1e9:.0f} GB: "
              f"{seconds[-1]:.2f} s")  # fmt: skip
    return [{"files": 60, "seconds": seconds}]


if __name__ == "__main__":
    main()
