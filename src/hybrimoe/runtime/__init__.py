"""Carry a plan out: the pool, devices and their streams, the disk, and who keeps them in step."""
