"""Experts beyond RAM: the file behind them, its reader thread, and who is in memory."""
