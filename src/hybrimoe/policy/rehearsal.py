"""A few made-up layers through the default policies, so that their cores are compiled ahead."""

import numpy as np

from hybrimoe.policy.cache import Cache
from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.engine import Engine
from hybrimoe.policy.forecasts import Markov
from hybrimoe.policy.plan import left_to_cpu
from hybrimoe.policy.prediction import SimExecutor
from hybrimoe.policy.presets import preset
from hybrimoe.policy.router_output import find_scoring, read_forecast, read_load
from hybrimoe.policy.slots import place_in_slots
from hybrimoe.policy.timeline import Array

LAYERS, EXPERTS, TOP_K = 3, 8, 2
PASSES = (6, 1, 1, 1, 6)
"""Tokens of each pass: prompts that ask for most experts, and what follows them."""
COST = CostModel(
    cpu_first=1e-6,
    cpu_expert=1e-3,
    cpu_token=1e-3,
    gpu_read=1e-4,
    gpu_token=1e-6,
    gpu_launch=1e-6,
    link_latency=1e-6,
    link_bandwidth=1e11,
    expert_bytes=1 << 20,
    cpu_expert_contended=1e-3,
    link_bandwidth_contended=1e11,
)
"""A link so fast that experts are copied, and is idle often enough to copy some more ahead."""


def rehearse(name: str = "hybrimoe") -> None:
    """Run a preset on made-up routing; every core that a real model needs is then compiled."""
    rng = np.random.default_rng(0)
    policies, executor = preset(name), SimExecutor(COST)
    cache = Cache(policies.ranking, EXPERTS, LAYERS, EXPERTS, TOP_K)
    markov = Markov(LAYERS, EXPERTS, TOP_K, depth=max(policies.prefetcher.depth, 1))
    engine = Engine(policies, cache, COST, executor, forecaster=markov)
    cache.fill(np.ones((LAYERS, EXPERTS)))
    for tokens in PASSES:
        for layer in range(LAYERS):
            ids, weights, logits = _routing(rng, tokens)
            how = find_scoring(logits, ids, weights)
            load = read_load(layer, ids, weights, EXPERTS, logits, how)
            after = [read_forecast(layer + d, ids, logits, how) for d in range(1, LAYERS - layer)]
            executor.dense(layer, tokens, engine.timeline)
            plan = engine.step(load, after)
            _launch(plan.shards, load.tokens, ids)
            cache.lacks(0, layer)


def _routing(rng: np.random.Generator, tokens: int) -> tuple[Array, Array, Array]:
    """ids [T, K] int64, weights [T, K] float32, logits [T, E] float32."""
    logits = rng.standard_normal((tokens, EXPERTS)).astype(np.float32)
    ids = np.ascontiguousarray(np.argsort(-logits, axis=1)[:, :TOP_K])
    return ids, np.take_along_axis(logits, ids, 1), logits


def _launch(shards: Array, tokens: Array, ids: Array) -> None:
    """What the executor asks the policies' cores for when it starts a layer."""
    left_to_cpu(shards, tokens, 4)
    wave = np.array([(0, 1), (1, 2)], np.int64)
    place_in_slots(wave, np.zeros(EXPERTS, np.int32), ids, EXPERTS)
