"""Every system the paper names, as one row of policies each."""

from hybrimoe.errors import ConfigError
from hybrimoe.policy.engine import Policies
from hybrimoe.policy.prefetchers import Impact, Never, NextLayer
from hybrimoe.policy.rankings import LRU, MRS, NextToken, Static
from hybrimoe.policy.schedulers import CpuOnly, Fiddler, Hybrid, LayerWise, OnDemand, Split
from hybrimoe.policy.schedulers import Static as Resident

PRESETS: dict[str, Policies] = {
    "hybrimoe": Policies(Split(), NextToken(admission=True, backfill=True), Impact(depth=2)),
    "hybrimoe-paper": Policies(
        Hybrid(), MRS(alpha=0.5), Impact(depth=3, gated=False, window="layer", timely=False)
    ),
    "ktransformers": Policies(Resident(), Static(), Never()),
    "llamacpp": Policies(LayerWise(), Static(by="layer"), Never()),
    "adapmoe": Policies(OnDemand(), LRU(shares="frequency"), NextLayer(timely=False)),
    "fiddler": Policies(Fiddler(), Static(scope="model"), Never()),
    "powerinfer": Policies(Resident(), Static(scope="model"), Never()),
    "ondemand": Policies(OnDemand(), LRU(), Never()),
    "cpu": Policies(CpuOnly(), Static(), Never()),
}


def preset(name: str) -> Policies:
    """The policies of a preset by its name."""
    if name not in PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(PRESETS)}, got {name!r}")
    return PRESETS[name]
