"""Run Mixture-of-Experts models that do not fit on your GPU, from plain transformers code.

import hybrimoe
hybrimoe.wrap(model, weights="int4")
model.generate(...)
print(model.hybrimoe.report())
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from hybrimoe.api import unwrap, verify, wrap
    from hybrimoe.config import Config
    from hybrimoe.errors import (
        CheckpointError,
        CheckpointNotFoundError,
        ConfigError,
        FormatError,
        HybriMoEError,
        InsufficientMemoryError,
        RoutingError,
        StorageError,
        UnsupportedModelError,
        WrappedModelError,
    )
    from hybrimoe.kernels.activations import Gate
    from hybrimoe.plan_text import MemoryPlan
    from hybrimoe.policy.routing import RoutingTrace
    from hybrimoe.policy.simulator import Result, simulate
    from hybrimoe.pretrained import from_pretrained, plan, save_packed
    from hybrimoe.report import Report
    from hybrimoe.runtime.adapters import ExpertWeights, register_adapter
    from hybrimoe.runtime.measuring.calibration import calibrate
    from hybrimoe.runtime.recording import record
    from hybrimoe.session import Runtime
    from hybrimoe.verification import Verification

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CheckpointNotFoundError",
    "Config",
    "ConfigError",
    "ExpertWeights",
    "FormatError",
    "Gate",
    "HybriMoEError",
    "InsufficientMemoryError",
    "MemoryPlan",
    "Report",
    "Result",
    "RoutingError",
    "RoutingTrace",
    "Runtime",
    "StorageError",
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
    "hybrimoe.config": ("Config",),
    "hybrimoe.errors": (
        "CheckpointError",
        "CheckpointNotFoundError",
        "ConfigError",
        "FormatError",
        "HybriMoEError",
        "InsufficientMemoryError",
        "RoutingError",
        "StorageError",
        "UnsupportedModelError",
        "WrappedModelError",
    ),
    "hybrimoe.kernels.activations": ("Gate",),
    "hybrimoe.plan_text": ("MemoryPlan",),
    "hybrimoe.policy.routing": ("RoutingTrace",),
    "hybrimoe.policy.simulator": ("Result", "simulate"),
    "hybrimoe.pretrained": ("from_pretrained", "plan", "save_packed"),
    "hybrimoe.report": ("Report",),
    "hybrimoe.runtime.adapters": ("ExpertWeights", "register_adapter"),
    "hybrimoe.runtime.measuring.calibration": ("calibrate",),
    "hybrimoe.runtime.recording": ("record",),
    "hybrimoe.session": ("Runtime",),
    "hybrimoe.verification": ("Verification",),
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
    importlib.import_module("hybrimoe.pretrained").make_known()


importlib.import_module("hybrimoe.registration").announce(_make_known)
