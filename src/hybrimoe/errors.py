"""Every error a user can meet. Each one also is the builtin error it refines."""

import os


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
    """A scheduler, cache or prefetcher broke its contract.

    kind: which of a run's policies did, if it was the user's: scheduler, ranking or prefetcher.
    """

    kind: str = ""


class PlanError(PolicyError, ValueError):
    """A plan does not run every activated expert exactly once."""


class TraceError(HybriMoEError, ValueError):
    """A routing trace is truncated, inconsistent or of a foreign version."""


class ProfileError(HybriMoEError, ValueError):
    """A hardware profile misses a number or holds one that cannot be."""


class DeviceLostError(HybriMoEError, RuntimeError):
    """The accelerator failed for good; the process must be restarted."""


class InsufficientMemoryError(HybriMoEError, MemoryError):
    """Host or device memory cannot hold what was asked for.

    need, have: bytes, 0 where they are not known. nearest: the nearest setting that works.
    """

    def __init__(self, message: str, need: int = 0, have: int = 0, nearest: str = "") -> None:
        super().__init__(message)
        self.need, self.have, self.nearest = need, have, nearest


class CheckpointNotFoundError(HybriMoEError, FileNotFoundError):
    """No checkpoint of that name is on this machine or on the hub."""


class CheckpointError(HybriMoEError, ValueError):
    """A checkpoint's files are damaged, incomplete, hostile or of a kind that is not read.

    reason: what is wrong, and what helps. path: the file. tensor: the tensor it is about, or None.
    """

    def __init__(
        self, reason: str, path: str | os.PathLike[str] = "", tensor: str | None = None
    ) -> None:
        self.reason, self.path, self.tensor = reason, os.fspath(path), tensor
        where = f"{self.path}: " if self.path else ""
        what = f"tensor {tensor!r} " if tensor is not None else ""
        super().__init__(f"{where}{what}{reason}")


class StorageError(HybriMoEError, OSError):
    """A file cannot be written: the disk is full, or the system refuses."""


class DiskReadError(HybriMoEError, OSError):
    """Experts cannot be read back from the disk: their file is damaged or shorter, or the disk fails.

    path: the file. offset: where in it, in bytes.
    """

    def __init__(self, reason: str, path: str | os.PathLike[str] = "", offset: int = 0) -> None:
        self.reason, self.path, self.offset = reason, os.fspath(path), offset
        super().__init__(f"{self.path} at byte {offset}: {reason}")
