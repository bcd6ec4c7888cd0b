"""Every error a user can meet. Each one also is the builtin error it refines."""


class HybriMoEError(Exception):
    """Root of all errors raised by hybrimoe."""


class ConfigError(HybriMoEError, ValueError):
    """An argument breaks its rule; the message names the argument, the rule and the value."""


class UnsupportedModelError(HybriMoEError, ValueError):
    """The model has no routed experts that hybrimoe can take over."""


class FormatError(HybriMoEError, ValueError):
    """Weights cannot be stored in the requested format."""


class WrappedModelError(HybriMoEError, RuntimeError):
    """An operation that would silently break a wrapped model."""


class RoutingError(HybriMoEError, ValueError):
    """Expert ids or weights that no router of this model can produce."""


class PolicyError(HybriMoEError, RuntimeError):
    """A scheduler, cache or prefetcher broke its contract."""


class PlanError(PolicyError, ValueError):
    """A plan does not run every activated expert exactly once."""


class TraceError(HybriMoEError, ValueError):
    """A routing trace is truncated, inconsistent or of a foreign version."""


class ProfileError(HybriMoEError, ValueError):
    """A hardware profile misses a number or holds one that cannot be."""


class DeviceLostError(HybriMoEError, RuntimeError):
    """The accelerator failed for good; the process must be restarted."""


class InsufficientMemoryError(HybriMoEError, MemoryError):
    """Host or device memory cannot hold what was asked for."""
