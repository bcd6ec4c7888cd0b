"""Accelerators, real and emulated: their memory, streams and transfers."""
