"""Carry a plan out: memory, devices, streams and the transformers seam."""
