"""Compute experts: numba SIMD on the CPU, Triton or torch on a GPU. Arrays in, arrays out."""
