"""Small random experts packed as in production, and what they compute in float64."""

import functools
from typing import NamedTuple

import numpy as np
import reference
import torch

from hybrimoe.calibration.random_experts import fill_random
from hybrimoe.formats.gate import NAMES, SOFTCAP, Gate
from hybrimoe.formats.layout import expert_layout, only_files_bring
from hybrimoe.kernels.gpu.pairs import Pairs, Slots
from hybrimoe.models.weights import ExpertWeights, pack, unpack

FORMATS = ("int4", "int8", "bfloat16", "float16", "float32")
SILU = Gate(NAMES.index("silu"))
GATES = {
    **{name: Gate(kind) for kind, name in enumerate(NAMES) if kind != SOFTCAP},
    "clamped": Gate(NAMES.index("silu"), 1.702, 0.7, 1.0),
    "gelu clamped": Gate(NAMES.index("gelu"), 1.0, 0.5),
    "softcap": Gate(SOFTCAP, 1.5, 2.5),
}
BOUNDS = {"float32": 1e-10, "float16": 1e-5, "bfloat16": 1e-4}
"""NMSE that arithmetic in a dtype may cost."""


class Case(NamedTuple):
    """One layer and one batch; `k` slots per token out of `slots`."""

    fmt: str = "int4"
    dtype: str = "float32"
    tokens: int = 2
    k: int = 2
    hidden: int = 40
    inner: int = 50
    slots: int = 5
    gate: str = "silu"
    gated: bool = True
    bias: bool = False
    parts: bool = False  # only some shards of each expert

    def __str__(self):
        default = Case()
        changed = [f"{n}={v}" for n, v in self._asdict().items() if v != getattr(default, n)]
        return " ".join(changed) or "default"


def grid() -> list[Case]:
    """Every format with every dtype; then one thing at a time."""
    cases = [Case(fmt, dtype) for fmt in FORMATS for dtype in BOUNDS]
    cases += [Case(tokens=t, k=1 + t % 2, hidden=33, inner=32) for t in (1, 3, 4, 9)]
    cases += [Case(tokens=33, k=1, hidden=32, inner=32), Case("bfloat16", tokens=33)]
    cases += [Case(k=k) for k in (1, 5)]
    cases += [Case("int8", hidden=hidden) for hidden in (1, 32, 33, 64, 200)]
    cases += [Case("int4", inner=inner, tokens=1, k=1) for inner in (1, 32, 90, 128, 300)]
    cases += [
        Case(gate=gate, gated=gated, tokens=1, inner=32)
        for gate in GATES
        for gated in (True, False)
    ]
    cases += [
        Case(fmt, bias=True, gated=gated, parts=gated, inner=90, tokens=1) for fmt in FORMATS
        for gated in (True, False)
    ]  # fmt: skip
    cases += [Case("int4+int8", tokens=t, inner=90, bias=True) for t in (2, 33)]
    k_types = "q4_k", "q5_k", "q6_k", "q4_k+q6_k", "int8+q4_k"
    cases += [Case(fmt, hidden=256, inner=512, parts=True) for fmt in k_types]
    cases += [Case("q4_k+q6_k", "bfloat16", hidden=512, inner=256, tokens=9)]
    return [*cases, Case(tokens=33, k=4, bias=True, parts=True, dtype="bfloat16")]


class Layer(NamedTuple):
    """Packed experts and the very numbers that the blobs hold."""

    layout: object
    blobs: torch.Tensor
    stored: ExpertWeights


@functools.cache
def make_layer(fmt, hidden, inner, slots, gated, bias):
    """A packed layer, outputs of order one."""
    make = torch.Generator().manual_seed(0)
    m = 2 if gated else 1
    shapes = (slots, m, inner, hidden), (slots, hidden, inner), (slots, m, inner), (slots, hidden)
    up, down, up_bias, down_bias = (torch.randn(shape, generator=make) for shape in shapes)
    biases = (up_bias, down_bias) if bias else (None, None)
    weights = ExpertWeights(up / hidden**0.5, down / inner**0.5, SILU, *biases)
    layout = expert_layout(fmt, hidden, inner, gated, bias)
    blobs = np.zeros((slots, layout.expert_bytes), np.uint8)
    if only_files_bring(fmt):  # made from no floats
        fill_random(fmt, layout, blobs)
    else:
        pack(fmt, layout, weights, blobs)
    empty = [None if t is None else torch.full_like(t, torch.nan) for t in (up, down, *biases)]
    stored = ExpertWeights(empty[0], empty[1], SILU, empty[2], empty[3])
    unpack(fmt, layout, blobs, stored)
    return Layer(layout, torch.from_numpy(blobs), stored)


class Batch(NamedTuple):
    """Inputs of `run` on the host."""

    x: torch.Tensor
    pairs: Pairs


def make_batch(case: Case, shards: int) -> Batch:
    """Random routing; with more than one token, one of them has lost a pair to the CPU."""
    rng = np.random.default_rng(1)
    ids = rng.random((case.tokens, case.slots)).argsort(1)[:, : case.k]
    token, slot = np.repeat(np.arange(case.tokens), case.k), ids.reshape(-1)
    if case.tokens > 1:
        token, slot = token[1:], slot[1:]
    limits = np.sort(rng.integers(0, shards + 1, (case.slots, 2)), 1)
    if not case.parts:
        limits[:] = 0, shards
    x = rng.standard_normal((case.tokens, case.hidden)).astype(np.float32)
    weight = rng.random(len(slot)).astype(np.float32)
    pairs = Pairs(token.astype(np.int32), slot.astype(np.int32), weight, *_ranges(limits, slot))
    return Batch(torch.from_numpy(x).to(getattr(torch, case.dtype)), pairs)


def without_pairs(case: Case) -> Batch:
    """A batch of which nothing runs here."""
    batch = make_batch(case, 1)
    return batch._replace(pairs=Pairs(*(column[:0] for column in batch.pairs)))


def _ranges(limits, slot):
    """Columns `low` and `high` of pairs from ranges of shards [S, 2]."""
    return limits[slot].astype(np.int32).T.copy()


def expected(case: Case, layer: Layer, batch: Batch) -> torch.Tensor:
    """float64 [T, D], every pair by itself."""
    out = torch.zeros(batch.x.shape, dtype=torch.float64)
    stored, width = layer.stored, layer.layout.width
    for t, s, w, low, high in zip(*batch.pairs):
        part = slice(low * width, high * width)
        up = stored.up[s].double() @ batch.x[t].double()  # [M, F]
        if case.bias:
            up += stored.up_bias[s]
        second = up[1] if case.gated else torch.ones_like(up[0])
        gate = GATES[case.gate]
        h = torch.from_numpy(reference.apply_gate(gate, up[0].numpy(), second.numpy()))
        y = stored.down[s].double()[:, part] @ h[part]
        if case.bias and low == 0 < high:
            y += stored.down_bias[s]
        out[t] += float(w) * y
    return out


def compute(run, case: Case, layer: Layer, batch: Batch, device="cpu", **options) -> torch.Tensor:
    """float64 [T, D] by a module's `run`; the output starts at one, which shows what is lost."""
    out = torch.ones(batch.x.shape, device=device)
    slots = Slots(case.fmt, layer.layout, GATES[case.gate], layer.blobs.to(device))
    transfers = []

    def put(array):
        transfers.append(array)
        return torch.from_numpy(array).to(device)

    run(slots, batch.pairs, batch.x.to(device), out, put, **options)
    assert len(transfers) == (len(batch.pairs.token) > 0)
    return out.double().cpu() - 1


def layer_of(case: Case) -> Layer:
    return make_layer(case.fmt, case.hidden, case.inner, case.slots, case.gated, case.bias)


def error(run, case: Case, device="cpu", **options) -> float:
    """NMSE of a case; NaN if anything is NaN."""
    layer = layer_of(case)
    batch = make_batch(case, layer.layout.shards)
    wanted = expected(case, layer, batch)
    got = compute(run, case, layer, batch, device, **options)
    return float((got - wanted).square().sum() / wanted.square().sum().clamp(min=1e-300))


def partial_sum(run, case: Case, device="cpu", **options) -> float:
    """NMSE of the sum of two runs, each with some of the shards of every expert."""
    layer = layer_of(case)
    batch = make_batch(case, layer.layout.shards)
    cut = np.arange(case.slots) % (layer.layout.shards + 1)
    whole = np.full(case.slots, layer.layout.shards)
    got = 0
    for part in (np.stack([0 * cut, cut], 1), np.stack([cut, whole], 1)):
        low, high = _ranges(part, batch.pairs.slot)
        pairs = batch.pairs._replace(low=low, high=high)
        got += compute(run, case, layer, batch._replace(pairs=pairs), device, **options)
    wanted = expected(case, layer, batch)
    return float((got - wanted).square().sum() / wanted.square().sum())
