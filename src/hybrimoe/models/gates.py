"""Which gate a module computes: its own function against the formulas that the kernels have."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from hybrimoe.errors import UnsupportedModelError
from hybrimoe.formats.gate import NAMES, SOFTCAP, Gate
from hybrimoe.kernels.gpu.torch_experts import apply_gate

ALPHAS, LIMITS = ("alpha", "swiglu_alpha"), ("limit", "swiglu_limit")


def find_gate(module: Any) -> Gate:
    """The `Gate` whose formula equals what this module computes between its projections."""
    span = 1.5 * max([8.0, *_numbers(module, LIMITS)])
    # Said outright: while transformers builds a model, the defaults are its dtype and "meta".
    axis = torch.linspace(-span, span, 97, dtype=torch.float32, device="cpu")
    gate, up = torch.meshgrid(axis, axis, indexing="ij")
    gate, up = gate.reshape(-1), up.reshape(-1)
    if not module.has_gate:
        wanted, up = module.act_fn(gate), torch.ones_like(up)
    elif module.is_concatenated:
        wanted = module._apply_gate(torch.cat([gate, up]))
    else:
        wanted = module._apply_gate(torch.stack([gate, up], 1).reshape(-1))
    for candidate in _candidates(module):
        if torch.allclose(apply_gate(candidate, gate, up), wanted.float(), rtol=1e-4, atol=1e-4):
            kind, *numbers = candidate
            return Gate(kind, *map(float, numbers))  # an int would compile the kernels anew
    raise UnsupportedModelError(
        f"the gate of {type(module).__name__} is none of the formulas hybrimoe has "
        f"({', '.join(NAMES)}, with clamps); its act_fn is {getattr(module, 'act_fn', None)}"
    )


def _candidates(module: Any) -> Iterator[Gate]:
    alphas = _numbers(module, ALPHAS) or [1.0]
    limits = [*_numbers(module, LIMITS), float("inf")]
    for limit in limits:
        for kind in range(len(NAMES) - 1):
            yield Gate(kind, 1.0, limit)
        for alpha in (*alphas, 1.702):
            for offset in (0.0, 1.0):
                yield Gate(0, alpha, limit, offset)
    act = getattr(module, "act_fn", None)
    caps = [
        cap
        for name in ("gate_softcap", "up_softcap")
        for cap in _numbers(getattr(act, name, None), ("softcap",))
    ]
    if len(caps) == 2:
        yield Gate(SOFTCAP, *caps)


def _numbers(module: Any, names: tuple[str, ...]) -> list[float]:
    values = [getattr(module, name, None) for name in names]
    return [float(value) for value in values if isinstance(value, (int, float))]
