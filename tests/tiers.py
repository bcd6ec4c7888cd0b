"""A disk tier over experts that are made up, and a disk that does as it is told."""

import threading
import time

import numpy as np

from hybrimoe.formats.gate import NAMES, Gate
from hybrimoe.formats.layout import expert_layout
from hybrimoe.kernels.cpu.run_layer import PackedLayer, run_layer
from hybrimoe.kernels.cpu.workspace import Workspace
from hybrimoe.runtime.disk.job import Job
from hybrimoe.runtime.disk.sizes import TierSizes
from hybrimoe.runtime.disk.tier import DiskTier

LAYERS, EXPERTS, TOP_K, D, F = 3, 8, 2, 32, 32


class Disk:
    """Stands for a `ExpertFile`. delay: seconds of each read. fault: called with each read's number."""

    is_direct = False

    def __init__(self, delay=0.0, fault=lambda k: None):
        self.delay, self.fault = delay, fault
        layout = expert_layout("float32", D, F, True, False)
        rng = np.random.default_rng(0)
        self.blobs, self.layers = [], []
        for _ in range(LAYERS):
            numbers = rng.standard_normal((EXPERTS, layout.expert_bytes // 4)).astype(np.float32)
            blobs = numbers.view(np.uint8)
            self.blobs.append(blobs)
            self.layers.append(PackedLayer("float32", layout, Gate(NAMES.index("silu")), D, blobs))
        self.reads, self.read_by = [], set()
        self.is_open = True

    def read(self, layer, expert, out):
        k = len(self.reads)
        self.reads.append((layer, expert))
        self.read_by.add(threading.current_thread().name)
        out[:] = 0xFF  # half a read is no expert
        time.sleep(self.delay)
        self.fault(k)
        blob = self.blobs[layer][expert]
        out[: blob.size] = blob

    def layer(self, layer, out):
        out[:] = self.blobs[layer]
        return out

    def close(self):
        self.is_open = False


def make_tier(slots, disk=None, **settings):
    """A tier over a `Disk`."""
    disk = disk or Disk()
    sizes = TierSizes((EXPERTS,) * LAYERS, (disk.blobs[0].shape[1],) * LAYERS, slots)
    return DiskTier(sizes, TOP_K, disk, **settings), disk


def make_job(disk, layer, ids, seed=0, dtype="float32"):
    """A call of a layer with routing [T, K], and an output that is NaN at first."""
    rng, ids = np.random.default_rng(seed), np.asarray(ids, np.int64)
    x = rng.standard_normal((len(ids), D)).astype(np.float32)
    weights = rng.random(ids.shape).astype(np.float32)
    if dtype == "bfloat16":
        x = (x.view(np.uint32) >> 16).astype(np.uint16)
    out = np.full(x.shape, 0xFFFF if dtype == "bfloat16" else np.nan, x.dtype)
    return Job(layer, disk.layers[layer], x, ids, weights, out, Workspace(), dtype, 1)


def in_ram(disk, job):
    """What the layer gives with all experts in RAM."""
    out = np.empty_like(job.out)
    run_layer(
        disk.layers[job.number],
        *(job.x, job.ids, job.weights, out, Workspace(), job.dtype, 1),
        shards=job.shards,
    )
    return out
