"""What routers asked for: one layer's `Load`, a `Forecast` of one, and whole recorded traces."""

from typing import NamedTuple

from hybrimoe.policy.timeline import Array

NO_EXPERT = 65535  # pads a forecast that names fewer experts than the trace has room for


class Load(NamedTuple):
    """What one layer's router asked for."""

    layer: int
    experts: Array  # [A] int32, the activated experts
    tokens: Array  # [A] int32, tokens routed to each
    scores: Array  # [E] float32, router scores summed over tokens


class Forecast(NamedTuple):
    """What a later layer's router will probably ask for, the most probable expert first."""

    layer: int
    experts: Array  # [A] int32
    tokens: Array  # [A] int32, expected tokens, at least 1
    probability: Array  # [A] float64, that the expert is activated at all
    start: float = 0.0  # when the layer will probably start, on the timeline's clock
