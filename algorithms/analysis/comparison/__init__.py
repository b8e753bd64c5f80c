"""Compares several runs: makes tables, tests, curves and pages from run directories."""
