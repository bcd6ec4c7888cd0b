"""Decide which expert runs where and which weights move. Arrays in, plans out; knows no torch."""
