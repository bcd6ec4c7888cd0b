"""Root mean square norms of a few tokens: one call instead of half a dozen of torch's."""

from __future__ import annotations

import numpy as np

from hybrimoe.simd.dtypes import DTYPES, narrow, widen
from hybrimoe.simd.jit import kernel


def run_norm(
    x: np.ndarray,
    weight: np.ndarray,
    out: np.ndarray,
    eps: float,
    offset: float,
    early: bool,
    dtype: str,
) -> None:
    """out [T, D] = x / sqrt(mean(x * x) + eps) * (weight + offset) per row, in float32 inside.

    x, out [T, D] and weight [D] in `dtype` (bfloat16 and float16 as uint16 bits), C-contiguous.
    early: the normalised row is rounded to `dtype` before it is scaled, and once more after.
    """
    norm_rows(DTYPES[dtype], x, weight, out, np.float32(eps), np.float32(offset), early)


@kernel
def norm_rows(dtype, x, weight, out, eps, offset, early):
    """The loop of `run_norm`."""
    for t in range(x.shape[0]):
        squares = np.float32(0)
        for d in range(x.shape[1]):
            value = widen(dtype, x[t, d])
            squares += value * value
        inverse = np.float32(1) / np.sqrt(squares / np.float32(x.shape[1]) + eps)
        if early:
            for d in range(x.shape[1]):
                value = widen(dtype, narrow(dtype, widen(dtype, x[t, d]) * inverse))
                out[t, d] = narrow(dtype, value * (widen(dtype, weight[d]) + offset))
        else:
            for d in range(x.shape[1]):
                value = widen(dtype, x[t, d]) * inverse
                out[t, d] = narrow(dtype, value * (widen(dtype, weight[d]) + offset))
