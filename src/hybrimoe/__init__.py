"""Run Mixture-of-Experts models that do not fit on your GPU, from plain transformers code.

import hybrimoe
hybrimoe.wrap(model, weights="int4")
model.generate(...)
print(model.hybrimoe.report())
"""

from hybrimoe.api import Runtime, unwrap, verify, wrap
from hybrimoe.config import Config
from hybrimoe.errors import (
    ConfigError,
    FormatError,
    HybriMoEError,
    RoutingError,
    UnsupportedModelError,
    WrappedModelError,
)
from hybrimoe.kernels.activations import Gate
from hybrimoe.policy.routing import RoutingTrace
from hybrimoe.policy.simulator import Result, simulate
from hybrimoe.report import Report
from hybrimoe.runtime.adapters import ExpertWeights, register_adapter
from hybrimoe.runtime.recording import record
from hybrimoe.verification import Verification

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ConfigError",
    "ExpertWeights",
    "FormatError",
    "Gate",
    "HybriMoEError",
    "Report",
    "Result",
    "RoutingError",
    "RoutingTrace",
    "Runtime",
    "UnsupportedModelError",
    "Verification",
    "WrappedModelError",
    "record",
    "register_adapter",
    "simulate",
    "unwrap",
    "verify",
    "wrap",
]
