"""Costs, loads and settings that the policy tests share."""

import numpy as np
from hypothesis import HealthCheck, settings

from hybrimoe.policy.cost import CostModel
from hybrimoe.policy.routing import Load


def examples(count: int) -> settings:
    """Settings for a contract's properties, which run once per subclass."""
    shared = [HealthCheck.differing_executors]
    return settings(max_examples=count, deadline=None, suppress_health_check=shared)


def make_cost(**changes: float) -> CostModel:
    """Round numbers in which every lane matters: CPU 2, GPU 1, link 4 seconds for one token."""
    numbers = {
        "cpu_first": 0.5,
        "cpu_expert": 1.0,
        "cpu_token": 1.0,
        "gpu_read": 1.0,
        "gpu_token": 0.125,
        "gpu_launch": 0.0,
        "link_latency": 0.0,
        "link_bandwidth": 25.0,
        "expert_bytes": 100,
        "cpu_expert_contended": 1.0,
        "link_bandwidth_contended": 25.0,
    }
    return CostModel(**(numbers | changes))  # type: ignore[arg-type]


def make_load(tokens: list[int], layer: int = 0, experts: int = 64) -> Load:
    """Experts 0, 1, ... with these tokens."""
    scores = np.zeros(experts, np.float32)
    scores[: len(tokens)] = tokens
    count = np.arange(len(tokens), dtype=np.int32)
    return Load(layer, count, np.array(tokens, np.int32), scores)
