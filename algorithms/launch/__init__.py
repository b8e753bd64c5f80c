"""Starts many runs, one job in each slot of the machine, and keeps one run from overwriting another."""
