"""Run Mixture-of-Experts models that do not fit on your GPU, from plain transformers code."""

__version__ = "0.1.0"
