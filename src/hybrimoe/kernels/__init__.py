"""Compute experts: numba SIMD on the CPU. Arrays in, arrays out."""
