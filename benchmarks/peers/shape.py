"""The model being timed (Qwen3-30B-A3B with fewer layers) and what its work amounts to."""

from __future__ import annotations

D, F = 2048, 768
E, K = 128, 8
HEADS, KEY_HEADS, HEAD_SIZE = 32, 4, 128
VOCABULARY = 4096  # small, so that the output head does not drown a few layers
TOKENS = (1, 32, 512)

BYTES_PER_WEIGHT = {"q4_0": 18 / 32, "q4_k": 144 / 256, "q8_0": 34 / 32, "bf16": 2.0}
# Expert width of the model that is nearly all but experts: one block of the packed format.
TWIN_F = {"q4_0": 32, "q4_k": 256, "q8_0": 32, "bf16": 32}

ATTENTION_WEIGHTS = 2 * D * (HEADS + KEY_HEADS) * HEAD_SIZE  # of one layer
ROUTER_BYTES = 4 * E * D  # float32 in every GGUF


def expert_weights(expert_hidden: int = F) -> int:
    """Gate, up and down of the K experts that one token uses in one layer."""
    return 3 * D * expert_hidden * K


def experts_gflops(tokens: int, seconds_per_layer: float) -> float:
    return 2 * expert_weights() * tokens / seconds_per_layer / 1e9


def experts_gbps(weights: str, seconds_per_layer: float) -> float:
    """Packed weight read in decode: one token, whose K experts are distinct."""
    return expert_weights() * BYTES_PER_WEIGHT[weights] / seconds_per_layer / 1e9


def model_gflops(tokens: int, seconds_per_layer: float, expert_hidden: int) -> float:
    """Products with weights only: attention scores and the output head are left out."""
    per_token = ATTENTION_WEIGHTS + E * D + expert_weights(expert_hidden)
    return 2 * per_token * tokens / seconds_per_layer / 1e9


def model_gbps(weights: str, seconds_per_layer: float, expert_hidden: int, layers: int) -> float:
    """All weight read in decode, the output head shared out over the layers."""
    packed = ATTENTION_WEIGHTS + expert_weights(expert_hidden) + VOCABULARY * D / layers
    read = packed * BYTES_PER_WEIGHT[weights] + ROUTER_BYTES
    return read / seconds_per_layer / 1e9
