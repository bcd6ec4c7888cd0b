"""One layer whose experts lie on disk, as a call that may be computed in parts."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from hybrimoe.kernels.cpu.run_layer import PackedLayer
from hybrimoe.kernels.cpu.workspace import Workspace
from hybrimoe.policy.routing import Load


class Job(NamedTuple):
    """One layer to compute: the arguments of `run_layer`."""

    number: int
    layer: PackedLayer
    x: np.ndarray
    ids: np.ndarray
    weights: np.ndarray
    out: np.ndarray
    workspace: Workspace
    dtype: str = "float32"
    threads: int | None = None
    shards: np.ndarray | None = None


def load_of(job: Job) -> Load:
    """What a call asks for: the experts with shards to compute here."""
    ids = job.ids.reshape(-1)
    tokens = np.bincount(ids, minlength=job.layer.experts)
    scores = np.bincount(ids, job.weights.reshape(-1), job.layer.experts)
    if job.shards is not None:
        tokens[job.shards[:, 0] >= job.shards[:, 1]] = 0
    experts = np.flatnonzero(tokens)
    return Load(
        job.number,
        experts.astype(np.int32),
        tokens[experts].astype(np.int32),
        scores.astype(np.float32),
    )


def shards_of(job: Job, part: list[int]) -> np.ndarray:
    """[E, 2] the shards to compute if only some experts have their turn."""
    shards = np.zeros((job.layer.experts, 2), np.int32)
    shards[part] = (0, job.layer.layout.shards) if job.shards is None else job.shards[part]
    return shards


def in_float32(job: Job) -> Job:
    """The same job with sums that can be gone on with."""
    if job.dtype == "float32":
        return job
    x = torch.from_numpy(job.x).view(getattr(torch, job.dtype)).float().numpy()
    return job._replace(x=x, out=np.empty(x.shape, np.float32), dtype="float32")


def narrow(total: np.ndarray, job: Job) -> None:
    """What `in_float32` has led to, rounded into the job's own output."""
    if total is not job.out:
        out = torch.from_numpy(job.out).view(getattr(torch, job.dtype))
        out.copy_(torch.from_numpy(total))
