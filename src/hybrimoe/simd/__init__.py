"""Compiled loops: how they are compiled and cached, vectors, instruction sets, threads."""
