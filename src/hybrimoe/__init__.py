"""Run Mixture-of-Experts models that do not fit on your GPU, from plain transformers code.

import hybrimoe
hybrimoe.wrap(model, weights="int4")
model.generate(...)
print(model.hybrimoe.report())
"""

from hybrimoe.api import Runtime, unwrap, verify, wrap
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
from hybrimoe.memory_plan import MemoryPlan, plan
from hybrimoe.policy.routing import RoutingTrace
from hybrimoe.policy.simulator import Result, simulate
from hybrimoe.pretrained import from_pretrained, save_packed
from hybrimoe.report import Report
from hybrimoe.runtime.adapters import ExpertWeights, register_adapter
from hybrimoe.runtime.calibration import calibrate
from hybrimoe.runtime.recording import record
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
