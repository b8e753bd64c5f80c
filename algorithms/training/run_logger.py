"""Where the numbers of a run go: TensorBoard, `metrics.jsonl` and one line in the terminal.

All three are written at every step, so that a run that is killed has kept what it measured.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from agentic_rag_env.files import write_whole
from agentic_rag_env.terminal import printable

#: Metrics of the progress line, and their names there.
_SHOWN = {"rollout/exact_match": "exact match", "dev/exact_match": "dev exact match", "train/loss": "loss"}
_RATE_WINDOW = 20
_PLAIN_INTERVAL_S = 10.0


class RunLogger:
    """Writes the metrics of one run; use it as a context manager.

    Args:
        run_dir: The run directory; made if absent.
        total_steps: Training steps of the whole run.
        start_step: Steps already done. What an earlier, killed run wrote about later steps is removed.
        console: Where the progress goes; the standard output by default. A terminal shows one live line. A file or CI
            gets a plain line every ten seconds, without control characters.
    """

    def __init__(
        self,
        run_dir: str | os.PathLike[str],
        total_steps: int,
        *,
        start_step: int = 0,
        console: Console | None = None,
    ) -> None:
        directory = Path(run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / "metrics.jsonl"
        truncate_metrics(path, start_step)
        self._lines = path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(directory / "tb"), purge_step=start_step + 1)
        self._progress = _ProgressLine(total_steps, start_step, console or Console())

    def write(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        """Record the metrics of one step.

        Args:
            step: Training steps done; equal or higher than in the last call.
            metrics: Full names (`train/loss`) to numbers. A number that is not finite becomes null in `metrics.jsonl`.
            stage: What the run is doing, such as the name of the algorithm being trained.
        """
        numbers = {name: float(value) for name, value in metrics.items()}
        line = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        line["time/clock"] = round(time.time(), 3)  # seconds since 1970
        self._lines.write(json.dumps({"step": step, "stage": stage, **line}, allow_nan=False) + "\n")
        self._lines.flush()
        for name, value in numbers.items():
            self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()
        self._progress.update(step, numbers, stage)

    def text(self, name: str, transcript: str, step: int) -> None:
        """Show a transcript in TensorBoard's text tab, word for word."""
        # An indented block: TensorBoard reads Markdown, which would swallow <search> as an HTML tag.
        block = "\n".join("    " + line for line in without_surrogates(transcript).split("\n"))
        self._tensorboard.add_text(name, block, step)
        self._tensorboard.flush()

    def message(self, text: str) -> None:
        """Print a message without breaking the progress line."""
        self._progress.message(text)

    def close(self) -> None:
        """Write out everything and leave the terminal as it was."""
        self._progress.close()
        self._lines.close()
        self._tensorboard.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SilentLogger:
    """The logger of a process that writes nothing, beside the one that does."""

    def write(self, step: int, metrics: Mapping[str, float], stage: str) -> None:
        """See `RunLogger`."""

    def text(self, name: str, transcript: str, step: int) -> None:
        """See `RunLogger`."""

    def message(self, text: str) -> None:
        """See `RunLogger`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def write_results(
    run_dir: str | os.PathLike[str], config: Mapping[str, Any], metrics: Mapping[str, float], step: int
) -> None:
    """Put the final metrics of a run into TensorBoard, and together with its settings into the hyperparameter table.

    Args:
        run_dir: The run directory.
        config: Settings, nested.
        metrics: Full names (`eval/tiny/exact_match`) to numbers.
        step: Training steps done.
    """
    with SummaryWriter(str(Path(run_dir) / "tb")) as writer:
        for summary in hparams(_flatten(config), {name: float(value) for name, value in metrics.items()}):
            writer._get_file_writer().add_summary(summary)
        for name, value in metrics.items():
            writer.add_scalar(name, float(value), step)


@contextmanager
def progress(description: str, total: int) -> Iterator[Callable[[int, int], None]]:
    """Show the progress of a long task: a bar in a terminal, elsewhere a line that says it began.

    Args:
        description: What is done.
        total: Number of units of work.

    Yields:
        A function to call with the number of units done, and with a second argument, which is ignored.
    """
    if not sys.stdout.isatty():
        print(f"{description} ({total})", flush=True)
        yield lambda done, _: None
        return
    with Progress(transient=True) as bar:
        task = bar.add_task(description, total=total)
        yield lambda done, _: bar.update(task, completed=done)


def without_surrogates(text: str) -> str:
    r"""Write halves of surrogate pairs, which no file can hold, as `\udc80`."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def truncate_metrics(path: Path, last_step: int) -> None:
    """Remove the lines after a step and broken lines. A message says which earlier steps are lost.

    Args:
        path: A `metrics.jsonl`, which need not exist.
        last_step: The last step to keep.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept, steps = [], set()
    for line in lines:
        try:
            step = int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
            continue
        if step <= last_step and line.endswith(b"\n"):
            kept.append(line)
            steps.add(step)
    if lost := len(set(range(1, last_step + 1)) - steps):
        warnings.warn(
            f"{path} lacks {lost} of the {last_step} steps so far: it was damaged or shortened. Curves will lack them "
            "too; the weights and the final figures do not depend on it.",
            stacklevel=2,
        )
    if kept != lines:
        write_whole(path, b"".join(kept))


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | float | bool]:
    """Flatten nested settings to `{"optimizer.learning_rate": 0.001}`, with values that TensorBoard can show."""
    flat: dict[str, str | float | bool] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat.update(_flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float)) else without_surrogates(str(value))
    return flat


class _ProgressLine:
    """The progress line: steps, rate, time left, exact match and loss."""

    def __init__(self, total_steps: int, start_step: int, console: Console) -> None:
        self._total = total_steps
        self._step = start_step
        self._marks = deque([(time.monotonic(), start_step)], maxlen=_RATE_WINDOW)
        self._latest: dict[str, float] = {}
        self._stage = ""
        self._console = console
        self._next_plain = 0.0
        self._live: Progress | None = None
        # `console.is_terminal` would not do: CI systems set FORCE_COLOR, which makes it true of a log file.
        if console.file.isatty() and not console.is_dumb_terminal:
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
            left = round(seconds * max(0, self._total - self._step))
            rate = f"{1 / seconds:.1f} steps/s" if seconds < 1 else f"{seconds:.1f} s/step"
            parts += [rate, f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} of training left"]
        parts += [f"{name} {self._latest[name]:.3f}" for name in _SHOWN.values() if name in self._latest]
        return "  ".join(parts)
