"""What a run tells while it trains: numbers to its loggers, and one line in the terminal or in a notebook.

All of it is written at every step, so that a run that is killed has kept what it measured.
"""

from __future__ import annotations

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from agentic_rag_env.terminal import printable
from algorithms.training.loggers import LOGGERS, JsonLines, Logger

#: Metrics of the progress line, and their names there.
_SHOWN = {"rollout/exact_match": "exact match", "dev/exact_match": "dev exact match", "train/loss": "loss",
          "train/value_loss": "value loss"}  # fmt: skip
_RATE_WINDOW = 20
_PLAIN_INTERVAL_S = 10.0


class RunLogger:
    """Hands the metrics of one run to its loggers; use it as a context manager.

    Args:
        run_dir: The run directory; made if absent.
        total_steps: Training steps of the whole run.
        start_step: Steps already done. What an earlier, killed run wrote about later steps is removed.
        console: Where the progress goes; the standard output by default. A terminal or a notebook shows one live line.
            A file or CI gets a plain line every ten seconds, without control characters.
        loggers: Who receives the numbers beside `metrics.jsonl`, which every run writes; names, mappings or loggers.
        settings: All settings of the run, nested, for the loggers.
        command: The command line, for the loggers.
        checks_at_end: How many checks on the dev split the final evaluation is worth, for the time left; None if that
            is not known.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        total_steps: int,
        *,
        start_step: int = 0,
        console: Console | None = None,
        loggers: Sequence[Any] = (),
        settings: Mapping[str, Any] | None = None,
        command: str = "",
        checks_at_end: float | None = None,
    ) -> None:
        self._loggers = open_loggers(Path(run_dir), loggers, start_step)
        for logger in self._loggers:
            logger.begin(settings or {}, command)
        self._progress = _ProgressLine(total_steps, start_step, console or Console(emoji=False), checks_at_end)

    def write(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        """Record the metrics of one step.

        Args:
            step: Training steps done; equal or higher than in the last call.
            metrics: Full names (`train/loss`) to numbers.
            stage: What the run is doing, such as the name of the algorithm being trained.
        """
        numbers = {name: float(value) for name, value in metrics.items()}
        for logger in self._loggers:
            logger.write(step, numbers, stage)
        self._progress.update(step, numbers, stage)

    def text(self, name: str, transcript: str, step: int) -> None:
        """Hand on a transcript."""
        for logger in self._loggers:
            logger.text(name, transcript, step)

    def message(self, text: str) -> None:
        """Print a message without breaking the progress line."""
        self._progress.message(text)

    def close(self) -> None:
        """Write out everything and leave the terminal as it was."""
        self._progress.close()
        for logger in self._loggers:
            logger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SilentLogger(RunLogger):
    """The logger of a process that writes nothing, beside the one that does."""

    def __init__(self) -> None:
        """Open nothing."""

    def write(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        """See `RunLogger`."""

    def text(self, name: str, transcript: str, step: int) -> None:
        """See `RunLogger`."""

    def message(self, text: str) -> None:
        """See `RunLogger`."""

    def close(self) -> None:
        """See `RunLogger`."""


def open_loggers(run_dir: Path, specs: Sequence[Any], start_step: int) -> list[Logger]:
    """Make the loggers of a run and open them; the first one writes `metrics.jsonl`.

    Args:
        run_dir: The run directory; made if absent.
        specs: Names, mappings with `name` and settings, or loggers.
        start_step: Steps already done.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    made: list[Logger] = [LOGGERS.build(spec) for spec in specs]
    made = [JsonLines(), *(logger for logger in made if not isinstance(logger, JsonLines))]
    for logger in made:
        logger.open(run_dir, start_step)
    return made


def write_results(run_dir: Path, specs: Sequence[Any], metrics: Mapping[str, float], step: int) -> None:
    """Hand the final metrics of a run to its loggers.

    Args:
        run_dir: The run directory.
        specs: The loggers, see `open_loggers`.
        metrics: Full names (`eval/tiny/exact_match`) to numbers.
        step: Training steps done.
    """
    numbers = {name: float(value) for name, value in metrics.items()}
    for logger in open_loggers(run_dir, specs, step):
        logger.results(numbers, step)
        logger.close()


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of a long task: a bar in a terminal or notebook, elsewhere a line that says it began.

    Args:
        description: What is done.
        total: Number of units of work.

    Yields:
        A function to call with the number of units done, and with a second argument, which is ignored.
    """
    console = Console()
    if not sys.stdout.isatty() and not _is_notebook(console):
        print(f"{description} ({total})", flush=True)
        yield lambda done, _: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done, _: bar.update(task, completed=done)


def _is_notebook(console: Console) -> bool:
    """Whether a live line can be shown in a notebook; without the library ipywidgets, plain lines are."""
    return console.is_jupyter and find_spec("ipywidgets") is not None


class _ProgressLine:
    """The progress line: steps, rate, time left, exact match and loss."""

    def __init__(self, total_steps: int, start_step: int, console: Console, checks_at_end: float | None) -> None:
        self._total = total_steps
        self._step = start_step
        self._marks = deque([(time.monotonic(), start_step)], maxlen=_RATE_WINDOW)
        self._latest: dict[str, float] = {}
        self._stage = ""
        self._console = console
        self._next_plain = 0.0
        self._checks_at_end, self._check_s = checks_at_end, 0.0
        self._live: Progress | None = None
        # `console.is_terminal` would not do: CI systems set FORCE_COLOR, which makes it true of a log file.
        if _is_notebook(console) or (console.file.isatty() and not console.is_dumb_terminal):
            columns = [
                TextColumn("{task.fields[stage]}"),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[figures]}"),
            ]
            self._live = Progress(*columns, console=console)
            self._task = self._live.add_task("", total=total_steps, completed=start_step, stage="", figures="")
            self._live.start()

    def update(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        if stage != self._stage:  # another stage has its own figures and its own pace
            self._stage = stage
            self._latest.clear()
            self._marks = deque([self._marks[-1]], maxlen=_RATE_WINDOW)
        self._latest.update((_SHOWN[name], value) for name, value in metrics.items() if name in _SHOWN)
        self._check_s = metrics.get("time/dev_s", self._check_s)
        now = time.monotonic()
        if step > self._step:
            self._step = step
            self._marks.append((now, step))
        if self._live is not None:
            self._live.update(self._task, completed=step, stage=stage, figures=self._figures())
        elif now >= self._next_plain or step >= self._total:
            self._next_plain = now + _PLAIN_INTERVAL_S
            self.message(f"{stage} {self._figures()}")

    def message(self, text: str) -> None:
        text = printable(text, getattr(self._console.file, "encoding", None))
        if self._live is not None:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)
        else:
            print(text, file=self._console.file, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _figures(self) -> str:
        (first_time, first_step), (last_time, last_step) = self._marks[0], self._marks[-1]
        parts = [f"{self._step}/{self._total}"]
        if last_step > first_step:
            seconds = (last_time - first_time) / (last_step - first_step)
            rate = f"{1 / seconds:.1f} steps/s" if seconds < 1 else f"{seconds:.1f} s/step"
            parts += [rate, self._left(seconds * max(0, self._total - self._step))]
        parts += [f"{name} {self._latest[name]:.3f}" for name in _SHOWN.values() if name in self._latest]
        return "  ".join(parts)

    def _left(self, training_s: float) -> str:
        """The time left. The final evaluation is in it as soon as a check on the dev split has shown its pace."""
        if self._checks_at_end is None or not self._check_s:
            return f"{_clock(training_s)} of training left"
        evaluation_s = self._checks_at_end * self._check_s
        return f"{_clock(training_s + evaluation_s)} left, about {_clock(evaluation_s)} of it evaluation"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
