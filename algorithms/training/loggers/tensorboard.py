"""TensorBoard: curves, transcripts, the command and the settings, in `tb/` of the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from algorithms.training.event_files import EventFile
from algorithms.training.loggers.base import LOGGERS, Logger, without_surrogates
from algorithms.training.run_files import flat, plain_data, read_overrides

FOLDER = "tb"


@dataclass
class TensorBoardConfig:
    """Settings of `TensorBoard`: none."""


@LOGGERS.register("tensorboard", TensorBoardConfig)
class TensorBoard(Logger):
    """Writes event files; `tensorboard --logdir` of a run, of a multirun or of many of them shows them."""

    def open(self, run_dir: Path, start_step: int) -> None:
        """Begin another event file."""
        self._run_dir, self._start_step = run_dir, start_step
        self._file = EventFile(run_dir / FOLDER, purge_from=start_step + 1)

    def begin(self, settings: Mapping[str, Any], command: str) -> None:
        """Lay out the curves, and show the command and the settings."""
        plain = yaml.safe_dump(plain_data(settings), sort_keys=False, allow_unicode=True)
        self._file.text("run/command", without_surrogates(command), self._start_step)
        self._file.text("run/settings", without_surrogates(plain), self._start_step)
        self._file.layout()
        chosen = chosen_settings(settings, read_overrides(self._run_dir))
        self._file.settings(chosen)
        if not (self._run_dir.parent / FOLDER).is_dir():  # a multirun has one table for all of its runs
            self._file.columns(chosen)
        self._file.flush()

    def write(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        """Add a point to every curve."""
        for name, value in metrics.items():
            self._file.scalar(name, value, step)
        self._file.flush()

    def text(self, name: str, text: str, step: int) -> None:
        """Show a transcript, word for word."""
        self._file.text(name, without_surrogates(text), step)
        self._file.flush()

    def results(self, metrics: Mapping[str, float], step: int) -> None:
        """Show the final figures; those of the probes stand under `arc/`."""
        for name, value in metrics.items():
            self._file.scalar(name, value, step)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def chosen_settings(settings: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Settings that tell a run's results from others': its algorithm, its seed, and what its overrides name.

    Args:
        settings: All settings of the run, nested.
        overrides: Overrides of its command line, such as `algo.steps=5`.
    """
    from algorithms.training.settings import settings_without_effect  # which knows the loggers

    known = flat(settings)
    chosen: dict[str, Any] = {name: known[name] for name in ("algo.name", "seed") if name in known}
    for override in overrides:
        name, _, value = override.lstrip("+~").partition("=")
        name = name.rpartition("@")[2]
        if name in settings_without_effect():
            continue
        if f"{name}.name" in known:
            name = f"{name}.name"
        chosen[name] = known.get(name, value)
    return {name: without_surrogates(each) if isinstance(each, str) else each for name, each in chosen.items()}
