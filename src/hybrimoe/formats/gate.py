"""What an expert computes between its projections, as a kind and three numbers."""

from typing import NamedTuple

SILU, GELU, GELU_TANH, RELU, RELU2, SOFTCAP = range(6)
NAMES = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "softcap")


class Gate(NamedTuple):
    """act(min(gate, limit)) * (clamp(up, -limit, limit) + offset), or act(up) without a gate.

    kind: index into NAMES. alpha: SiLU is g * sigmoid(alpha * g). For `softcap`, alpha and limit
    are the caps: alpha tanh(g / alpha) * sigmoid(g) * limit tanh(up / limit).
    """

    kind: int
    alpha: float = 1.0
    limit: float = float("inf")
    offset: float = 0.0
