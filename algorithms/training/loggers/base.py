"""What a logger is: a receiver of a run's numbers, registered by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentic_rag_env.registry import Registry

LOGGERS = Registry("logger")


class Logger(ABC):
    """Receives the numbers of a run; every method but `write` may be left out.

    Register a subclass with a dataclass of its settings: `@LOGGERS.register("mine", MineConfig)`. Making one must do
    nothing but take the settings, because the settings of a run are checked by making its loggers. An exception that
    it raises later ends the run.
    """

    def __init__(self, config: Any = None) -> None:  # noqa: B027
        """Take the settings."""

    def open(self, run_dir: Path, start_step: int) -> None:  # noqa: B027  # does nothing by default
        """Get ready; called at the start of the training, at every resume, and once more for the final figures.

        Args:
            run_dir: The run directory, which exists.
            start_step: Steps already done. What an earlier, killed run has logged about later steps is void.
        """

    def begin(self, settings: Mapping[str, Any], command: str) -> None:  # noqa: B027
        """Receive what the run is, before its first step.

        Args:
            settings: All settings of the run, nested.
            command: The command line that it was started with.
        """

    @abstractmethod
    def write(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        """Receive the metrics of one step.

        Args:
            step: Training steps done.
            metrics: Full names (`train/loss`) to numbers, which need not be finite.
            stage: What the run is doing, such as the name of the algorithm being trained.
        """

    def text(self, name: str, text: str, step: int) -> None:  # noqa: B027
        """Receive a transcript that a model and its environment have written."""

    def results(self, metrics: Mapping[str, float], step: int) -> None:  # noqa: B027
        """Receive the final figures of the trained policy (`eval/all/exact_match`)."""

    def close(self) -> None:  # noqa: B027
        """Write out everything."""


def without_surrogates(text: str) -> str:
    r"""Write halves of surrogate pairs, which no file can hold, as `\udc80`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")
