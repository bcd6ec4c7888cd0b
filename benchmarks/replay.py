"""Generated models for benchmarks, and routing in place of what their random routers say."""

import gc
import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import hybrimoe
from hybrimoe.simulation.synthesis import synthesise
from hybrimoe.simulation.trace import RoutingTrace

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import generated

LRU_HITS = 0.45
"""How often LRU hits at 25 %: what the paper says of Qwen2-57B-A14B, the nearest to this shape."""
RECALL = 0.8
"""Of a router run one layer early, as measured on tiny-moe."""
UNRANKED = 3.0  # how far below the worst expert that a trace ranks all others are


class Replayed:
    """Stands for the `forward` of a router with top-k softmax: real calls follow a trace.

    Whoever calls it past the router's hooks, as a look-ahead does, gets what the router would say of
    its layer's coming token one layer early: `RECALL` of the experts are right.
    """

    def __init__(self, trace: RoutingTrace, layer: int, noise: float) -> None:
        self.trace, self.layer, self.noise, self.token = trace, layer, noise, 0
        self.is_real = False
        self.random = np.random.default_rng(layer)

    def enter(self, *_: object) -> None:
        """Forward pre-hook of the router: this call is a real one."""
        self.is_real = True

    def __call__(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logits [1, E], weights [1, K] and ids [1, K] of one token."""
        assert hidden.numel() == hidden.shape[-1], "one token at a time"
        logits = logits_of(self.trace, self.token, self.layer)
        if not self.is_real:
            logits = logits + self.noise * self.random.standard_normal(logits.size)
        else:
            self.token += 1
        self.is_real = False
        said = torch.from_numpy(logits.astype(np.float32))[None]
        weights, ids = torch.topk(torch.softmax(said, -1), self.trace.top_k)
        return said, (weights / weights.sum()).to(hidden.dtype), ids


def generated_model(folder: Path, layers: int, hidden: int, inner: int, experts: int) -> Path:
    """A Qwen3 MoE model with random weights, its experts packed as int4; made once per folder."""
    packed = folder / "packed"
    if not (packed / "hybrimoe.json").exists():
        plain = folder / "plain"
        config = generated.configuration(layers, hidden, inner, experts, 512)
        generated.write(plain, config, 4 * layers)
        model = hybrimoe.from_pretrained(plain, weights="int4", device="cpu")
        hybrimoe.save_packed(model, packed)
        del model
        shutil.rmtree(plain)
        gc.collect()
    return packed


def replay(model: nn.Module, trace: RoutingTrace) -> None:
    """Route a Qwen3 MoE model by a trace from now on, from its first token on."""
    noise = noise_for(trace)
    for layer, block in enumerate(model.model.layers):
        block.mlp.gate.forward = Replayed(trace, layer, noise)
        block.mlp.gate.register_forward_pre_hook(block.mlp.gate.forward.enter)


def made_up(layers: int, experts: int, top_k: int, tokens: int) -> RoutingTrace:
    """Routing of decode steps on which LRU hits as often as on a trained model."""
    return synthesise(layers, experts, top_k, tokens=tokens, lru_hit_rate=LRU_HITS, seed=1)


def logits_of(trace: RoutingTrace, token: int, layer: int) -> np.ndarray:
    """[E] float64; of experts that the trace does not rank no more is known than that they are low."""
    ranked = np.log(np.maximum(trace.scores[token, layer].astype(np.float64), 1e-7))
    logits = np.full(trace.experts, ranked.min() - UNRANKED)
    logits[trace.ids[token, layer]] = ranked
    return logits


def noise_for(trace: RoutingTrace) -> float:
    """The noise under which `RECALL` of the experts are still chosen, by bisection."""
    random, low, high = np.random.default_rng(0), 0.0, 10.0
    places = list(itertools.product(range(min(trace.steps, 16)), range(trace.layers)))
    drawn = random.standard_normal((len(places), trace.experts))
    for _ in range(12):
        middle = (low + high) / 2
        kept = 0
        for (token, layer), noise in zip(places, drawn):
            said = logits_of(trace, token, layer) + middle * noise
            chosen = np.argsort(-said)[: trace.top_k]
            kept += np.isin(chosen, trace.ids[token, layer, : trace.top_k]).sum()
        low, high = (middle, high) if kept > RECALL * trace.top_k * len(places) else (low, middle)
    return (low + high) / 2
