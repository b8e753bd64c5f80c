"""Hydra's configuration folder, importable so that an installed package finds it."""
