"""Run Mixture-of-Experts models that do not fit on your GPU, from plain transformers code.

import hybrimoe
hybrimoe.wrap(model, weights="int4")
model.generate(...)
print(model.hybrimoe.report())
"""

import importlib
from typing import TYPE_CHECKING, Any

from hybrimoe.version import VERSION

if TYPE_CHECKING:
    from hybrimoe.api import unwrap, verify, wrap
    from hybrimoe.calibration.measure import calibrate
    from hybrimoe.config import Config
    from hybrimoe.errors import (
        CheckpointError,
        CheckpointNotFoundError,
        ConfigError,
        DeviceLostError,
        DiskReadError,
        FormatError,
        HybriMoEError,
        InsufficientMemoryError,
        PlanError,
        PolicyError,
        ProfileError,
        RoutingError,
        StorageError,
        TraceError,
        UnsupportedModelError,
        WrappedModelError,
    )
    from hybrimoe.formats.gate import Gate
    from hybrimoe.memory.text import MemoryPlan
    from hybrimoe.models.adapters import register_adapter
    from hybrimoe.models.weights import ExpertWeights
    from hybrimoe.modules.verification import Verification
    from hybrimoe.pretrained import from_pretrained, plan, save_packed
    from hybrimoe.report import Report
    from hybrimoe.session import Runtime
    from hybrimoe.simulation.record import record
    from hybrimoe.simulation.simulator import Result, simulate
    from hybrimoe.simulation.trace import RoutingTrace


__version__ = VERSION

__all__ = [
    "CheckpointError",
    "CheckpointNotFoundError",
    "Config",
    "ConfigError",
    "DeviceLostError",
    "DiskReadError",
    "ExpertWeights",
    "FormatError",
    "Gate",
    "HybriMoEError",
    "InsufficientMemoryError",
    "MemoryPlan",
    "PlanError",
    "PolicyError",
    "ProfileError",
    "Report",
    "Result",
    "RoutingError",
    "RoutingTrace",
    "Runtime",
    "StorageError",
    "TraceError",
    "UnsupportedModelError",
    "Verification",
    "WrappedModelError",
    "calibrate",
    "from_pretrained",
    "plan",
    "record",
    "register_adapter",
    "save_packed",
    "simulate",
    "unwrap",
    "verify",
    "wrap",
]

_HOMES = {
    "hybrimoe.api": ("unwrap", "verify", "wrap"),
    "hybrimoe.calibration.measure": ("calibrate",),
    "hybrimoe.config": ("Config",),
    "hybrimoe.errors": (
        "CheckpointError",
        "CheckpointNotFoundError",
        "ConfigError",
        "DeviceLostError",
        "DiskReadError",
        "FormatError",
        "HybriMoEError",
        "InsufficientMemoryError",
        "PlanError",
        "PolicyError",
        "ProfileError",
        "RoutingError",
        "StorageError",
        "TraceError",
        "UnsupportedModelError",
        "WrappedModelError",
    ),
    "hybrimoe.formats.gate": ("Gate",),
    "hybrimoe.memory.text": ("MemoryPlan",),
    "hybrimoe.models.adapters": ("register_adapter",),
    "hybrimoe.models.weights": ("ExpertWeights",),
    "hybrimoe.modules.verification": ("Verification",),
    "hybrimoe.pretrained": ("from_pretrained", "plan", "save_packed"),
    "hybrimoe.report": ("Report",),
    "hybrimoe.session": ("Runtime",),
    "hybrimoe.simulation.record": ("record",),
    "hybrimoe.simulation.simulator": ("Result", "simulate"),
    "hybrimoe.simulation.trace": ("RoutingTrace",),
}
"""Where the public names live. Each module is imported when a name of it is asked for: numba and half
of this package would otherwise make every `import hybrimoe` half a second longer."""


def __getattr__(name: str) -> Any:
    home = next((module for module, names in _HOMES.items() if name in names), None)
    if home is None:
        raise AttributeError(f"module 'hybrimoe' has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _make_known() -> None:
    importlib.import_module("hybrimoe.pretrained").register_quantizer()


importlib.import_module("hybrimoe.sources.registration").announce(_make_known)
