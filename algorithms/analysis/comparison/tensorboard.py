"""Writes the comparison for TensorBoard: curves, final figures and settings of every run, and images."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from agentic_rag_env.files import file_name
from algorithms.analysis.comparison.curves import CURVES
from algorithms.analysis.comparison.methods import Method
from algorithms.analysis.comparison.tables import cost_figures


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
            final |= {f"cost/{name}": value for name, value in cost_figures(run).items() if np.isfinite(value)}
            chosen = {name: _shown(run.settings.get(name)) for name in settings} | {"method": method.label}
            with _event_file(folder / _name(method.label) / file_name(f"seed{run.seed}")) as writer:
                for row in run.metrics:
                    for name in CURVES:
                        if row.get(name) is not None:
                            _add(writer, row["step"], tag=name, simple_value=row[name])
                last = run.metrics[-1]["step"] if run.metrics else 0
                for name, value in final.items():
                    _add(writer, last, tag=name, simple_value=value)
                writer.add_event(Event(wall_time=time.time(), summary=hparams_pb(chosen)))
    with _event_file(folder / "figures") as writer:
        for name, png in images.items():
            width, height = struct.unpack(">II", png[16:24])  # every PNG file has its size there
            _add(writer, 0, tag=name, image=Summary.Image(encoded_image_string=png, width=width, height=height))


@contextmanager
def _event_file(folder: Path) -> Iterator[EventFileWriter]:
    folder.mkdir(parents=True, exist_ok=True)
    writer = EventFileWriter(str(folder))
    try:
        yield writer
    finally:
        writer.close()


def _add(writer: EventFileWriter, step: int, **value: object) -> None:
    writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=[Summary.Value(**value)])))


def _varying_settings(methods: Sequence[Method]) -> list[str]:
    """Settings in which any two runs differ, without paths of files."""
    every = [run.settings for method in methods for run in method.runs]
    names = dict.fromkeys(name for settings in every for name in settings)
    differ = [name for name in names if len({repr(settings.get(name)) for settings in every}) > 1]
    return [name for name in differ if name not in ("resume", "cache_dir")] + ["algo.name"] * (
        "algo.name" not in differ
    )


def _name(label: str) -> str:
    """Name of a method's folder; the method's label may come from a stranger's summary."""
    return file_name(label.replace(" ", ""), also=",=()")


def _shown(value: object) -> str | float | bool:
    return value if isinstance(value, (bool, int, float)) else str(value)
