"""Writes the comparison for TensorBoard: curves, final figures and settings of every run, and images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from agentic_rag_env.files import file_name
from algorithms.analysis.comparison.curves import CURVES
from algorithms.analysis.comparison.methods import Method
from algorithms.analysis.comparison.tables import cost_figures
from algorithms.training.event_files import EventFile


def write_board(folder: Path, methods: Sequence[Method], images: Mapping[str, bytes]) -> None:
    """Write event files: one run per method and seed, and one with the figures.

    Args:
        folder: Folder for `tensorboard --logdir`. Files in it stay, so it should be new.
        methods: Methods; their runs are shown as `<method>/seed<seed>`.
        images: PNG files by name.
    """
    settings = _varying_settings(methods)
    for method in methods:
        for run in method.runs:
            final = {
                f"eval/{group}/{figure}" + ("" if mode == "greedy" else f"/{mode}"): float(figures[figure])
                for mode in run.modes
                for group, figures in run.figures(mode).items()
                for figure in ("exact_match", "f1", "num_searches", "malformed_fraction")
                if figures.get(figure) is not None
            }
            final |= {f"eval/cost/{name}": value for name, value in cost_figures(run).items() if np.isfinite(value)}
            chosen = {name: run.settings.get(name) for name in settings} | {"method": method.label}
            with EventFile(folder / _name(method.label) / file_name(f"seed{run.seed}")) as file:
                for row in run.metrics:
                    for name in CURVES:
                        if row.get(name) is not None:
                            file.scalar(name, row[name], row["step"])
                last = run.metrics[-1]["step"] if run.metrics else 0
                for name, value in final.items():
                    file.scalar(name, value, last)
                file.settings(chosen)
    with EventFile(folder / "figures") as file:
        file.layout()
        file.columns(["method", *settings])
        for name, png in images.items():
            file.image(name, png)


def _varying_settings(methods: Sequence[Method]) -> list[str]:
    """Settings in which any two runs differ, without paths of files."""
    every = [run.settings for method in methods for run in method.runs]
    names = dict.fromkeys(name for settings in every for name in settings)
    differ = [name for name in names if len({repr(settings.get(name)) for settings in every}) > 1]
    return list(dict.fromkeys([*(name for name in differ if name not in ("resume", "cache_dir")), "algo.name"]))


def _name(label: str) -> str:
    """Name of a method's folder; the method's label may come from a stranger's summary."""
    return file_name(label.replace(" ", ""), also=",=()")
