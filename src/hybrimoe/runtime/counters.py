"""Counters of one wrapped model: what ran, how long, how many bytes it read."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from hybrimoe.models.passes import Pass, read_pass
from hybrimoe.simd.stopwatch import stopwatch


@dataclass
class LayerStats:
    """One layer's totals. pairs: tokens times experts; activated: experts read, per launch."""

    launches: int = 0
    tokens: int = 0
    pairs: int = 0
    activated: int = 0
    seconds: float = 0.0


@dataclass
class Stats:
    """Totals since the last reset.

    compile_s: seconds of compiling within passes, which are in no other number. passing: the forward
    pass that runs, None between two.
    """

    layers: list[LayerStats] = field(default_factory=list)
    prefill_s: float = 0.0
    prefill_tokens: int = 0
    decode_s: float = 0.0
    decode_tokens: int = 0
    compile_s: float = 0.0
    passing: Pass | None = None
    _entered: float = 0.0
    _compiled: float = 0.0

    def record(self, layer: int, ids: np.ndarray, seconds: float) -> None:
        """Count one launch of a layer; ids [T, K]."""
        tokens = ids.shape[0]
        self.add(layer, tokens, ids.size, np.unique(ids).size if tokens > 1 else ids.size, seconds)

    def add(self, layer: int, tokens: int, pairs: int, activated: int, seconds: float) -> None:
        """Count one launch of a layer of which all numbers are known."""
        while len(self.layers) <= layer:
            self.layers.append(LayerStats())
        counts = self.layers[layer]
        counts.launches += 1
        counts.tokens += tokens
        counts.pairs += pairs
        counts.activated += activated
        counts.seconds += seconds

    def reset(self) -> None:
        """Forget everything counted so far."""
        self.__init__()  # type: ignore[misc]

    def enter(self, module: Any, args: Any, kwargs: Any) -> None:
        """Forward pre-hook of the model: the clock of a pass starts."""
        if not torch.compiler.is_compiling():  # a compiled graph has no clock
            self.passing = read_pass(module, args, kwargs)
            self._entered, self._compiled = stopwatch.clock(), stopwatch.seconds

    def leave(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Forward hook of the model: the clock stops."""
        if torch.compiler.is_compiling() or self.passing is None:
            return
        seconds = stopwatch.clock() - self._entered
        self.compile_s += stopwatch.seconds - self._compiled
        passed, self.passing = self.passing, None
        if passed.is_decode:
            self.decode_s += seconds
            self.decode_tokens += passed.tokens
        else:
            self.prefill_s += seconds
            self.prefill_tokens += passed.tokens
