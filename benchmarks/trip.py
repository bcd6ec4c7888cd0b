"""How far a hidden state travels through the source: calls and changes of file in one layer.

A change of file is a Python call whose file under src/hybrimoe is another than the caller's, counted by
`sys.setprofile` over one decoder layer's experts after warm-up. Compiled functions count as nothing.

    python benchmarks/trip.py
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import hybrimoe

SOURCE = str(Path(hybrimoe.__file__).parent)
TINY_MOE = Path(__file__).parents[1] / "tests" / "assets" / "tiny-moe"
WAYS: dict[str, dict[str, Any]] = {
    "CPU": {"device": "cpu"},
    "hybrid": {"device": "emulated", "vram": 0.25},
}


class Trip:
    """What a profiler sees of one layer."""

    def __init__(self) -> None:
        self.calls, self.changes = 0, 0
        self.files: Counter[str] = Counter()

    def see(self, frame: FrameType, event: str, _: object) -> None:
        """Count a call of the package's own code."""
        if event != "call" or not frame.f_code.co_filename.startswith(SOURCE):
            return
        file, back = frame.f_code.co_filename, frame.f_back
        while back is not None and not back.f_code.co_filename.startswith(SOURCE):
            back = back.f_back
        self.calls += 1
        self.files[file.removeprefix(f"{SOURCE}/")] += 1
        self.changes += back is None or back.f_code.co_filename != file


def measure(settings: dict[str, Any]) -> Trip:
    """The second layer of a decode step, when everything has been compiled and filled."""
    model = AutoModelForCausalLM.from_pretrained(TINY_MOE, dtype=torch.float32).eval()
    hybrimoe.wrap(model, weights="int4", **settings)
    trip, layer = Trip(), model.hybrimoe.layers[1]
    with torch.no_grad():
        cache = model(torch.arange(10, 30)[None], use_cache=True).past_key_values
        for _ in range(6):
            model(torch.tensor([[7]]), past_key_values=cache)
        usual = layer.forward

        def watched(*args: Any) -> Any:
            sys.setprofile(trip.see)
            try:
                return usual(*args)
            finally:
                sys.setprofile(None)

        layer.forward = watched
        model(torch.tensor([[7]]), past_key_values=cache)
    return trip


def main() -> None:
    """Print both ways, and the files that are entered most."""
    for name, settings in WAYS.items():
        trip = measure(settings)
        print(
            f"{name:7} {trip.calls:4} calls, {len(trip.files):3} files, {trip.changes:4} changes of file"
        )
        print(f"        {', '.join(f'{file} {n}' for file, n in trip.files.most_common(8))}")


if __name__ == "__main__":
    main()
