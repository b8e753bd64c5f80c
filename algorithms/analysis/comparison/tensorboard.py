"""The comparison in TensorBoard: curves, final figures and settings of every run, and the figures as images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from algorithms.analysis.comparison.curves import CURVES
from algorithms.analysis.comparison.methods import Method
from algorithms.analysis.comparison.tables import cost_figures


def write_board(folder: Path, methods: Sequence[Method], images: Mapping[str, bytes]) -> None:
    """Write event files: one run per method and seed, and one with the figures.

    Args:
        folder: For `tensorboard --logdir`; what it holds is left alone, so it had better be new.
        methods: Their runs are shown as `<method>/seed<seed>`.
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
            final |= {f"cost/{name}": value for name, value in cost_figures(run).items() if np.isfinite(value)}
            chosen = {name: _shown(run.settings.get(name)) for name in settings} | {"method": method.label}
            with SummaryWriter(str(folder / f"{method.label}/seed{run.seed}".replace(" ", ""))) as writer:
                for row in run.metrics:
                    for name in CURVES:
                        if row.get(name) is not None:
                            writer.add_scalar(name, row[name], row["step"])
                last = run.metrics[-1]["step"] if run.metrics else 0
                for name, value in final.items():
                    writer.add_scalar(name, value, last)
                for summary in hparams(chosen, final):
                    writer._get_file_writer().add_summary(summary)
    with SummaryWriter(str(folder / "figures")) as writer:
        for name, content in images.items():
            writer.add_image(name, _pixels(content), 0, dataformats="HWC")


def _varying_settings(methods: Sequence[Method]) -> list[str]:
    """Settings in which any two runs differ, without places of files."""
    every = [run.settings for method in methods for run in method.runs]
    names = dict.fromkeys(name for settings in every for name in settings)
    differ = [name for name in names if len({repr(settings.get(name)) for settings in every}) > 1]
    return [name for name in differ if name not in ("resume", "cache_dir")] + ["algo.name"] * (
        "algo.name" not in differ
    )


def _shown(value: object) -> str | float | bool:
    return value if isinstance(value, (bool, int, float)) else str(value)


def _pixels(png: bytes) -> np.ndarray:
    from matplotlib.image import imread

    return (imread(io.BytesIO(png), format="png") * 255).astype(np.uint8)
