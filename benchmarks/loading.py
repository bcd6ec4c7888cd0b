"""How fast a bfloat16 checkpoint becomes int4 experts, and how fast packed files load again.

python benchmarks/loading.py [--layers 3] [--folder /tmp/...] [--keep]
"""

import argparse
import gc
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

import transformers

import hybrimoe
from machine import describe, finish

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import generated

EXPERTS, D, F = 128, 2048, 768  # Qwen3-30B-A3B
MARKS = {"load": 0.5, "load packed": 1.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layers", type=int, default=3, help="1.2 GB of bfloat16 each")
    parser.add_argument("--folder", type=Path, help="where to write; found there, it is used again")
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="hybrimoe-loading-"))
    try:
        results = measure(folder, arguments.layers, arguments.weights)
    finally:
        if not arguments.keep:
            shutil.rmtree(folder)
    finish("loading", results, describe())


def measure(folder: Path, layers: int, weights: str) -> list[dict]:
    plain, packed = folder / "plain", folder / "packed"
    if not (plain / "model.safetensors.index.json").exists():
        generated.write(plain, generated.configuration(layers, D, F, EXPERTS, 512), 4 * layers)
    warm(plain)
    hybrimoe.from_pretrained(
        Path(__file__).parent.parent / "tests/assets/tiny-moe", weights=weights
    )
    loaded = timed("load", plain, weights=weights)
    hybrimoe.save_packed(loaded.pop("model"), packed)
    gc.collect()
    warm(packed)
    again = timed("load packed", packed)
    del again["model"]
    return [loaded, again]


def timed(what: str, folder: Path, **how: str) -> dict:
    size = sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
    seconds = []
    for _ in range(3):
        model = None
        gc.collect()
        start = time.perf_counter()
        model = hybrimoe.from_pretrained(folder, **how)
        seconds.append(time.perf_counter() - start)
    rate = size / min(seconds) / 1e9
    verdict = "reached" if rate >= MARKS[what] else "missed"
    print(f"{what:12} {size / 1e9:6.2f} GB  {min(seconds):6.2f} s  {rate:5.2f} GB/s  "
          f"(mark {MARKS[what]}: {verdict})")  # fmt: skip
    return {"what": what, "bytes": size, "seconds": seconds, "gb_s": rate, "model": model}


def warm(folder: Path) -> None:
    """Read everything once, so that it comes from the page cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


if __name__ == "__main__":
    main()
