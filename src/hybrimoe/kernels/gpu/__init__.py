"""Experts on a GPU from the packed blobs: by Triton, or by torch operations alone."""
