"""Routing traces: recorded, read, made up, replayed on other machines, and drawn."""
