"""Experts, dense layers and norms on the CPU: numba-compiled loops over arrays."""
