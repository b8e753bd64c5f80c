"""Shows a multirun: a live table of the running jobs in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.live import Live
from rich.table import Table

from agentic_rag_env.terminal import printable
from algorithms.launch.job_pool import LOG_FILE, Attempt, Job, tail

_REFRESH_S = 1.0
_PLAIN_INTERVAL_S = 60.0
_SHOWN_LINES = 8


class JobDisplay:
    """Shows how far the jobs of a multirun are; use it as a context manager.

    Args:
        missing: The jobs with anything left to do.
        total: Number of all jobs.
        sweep_dir: Directory in which the jobs write.
    """

    def __init__(self, missing: Sequence[Job], total: int, sweep_dir: Path) -> None:
        self._console = Console(markup=False, emoji=False)
        self._live = Live(console=self._console, auto_refresh=False, transient=True) if sys.stdout.isatty() else None
        self._total, self._done, self._failed = total, total - len(missing), 0
        self._missing = {job.name for job in missing}
        self._next = 0.0
        already = f", {self._done} of them done already" if self._done else ""
        self._say(f"multirun: {total} runs{already}; written to {sweep_dir}")

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def begun(self, attempt: Attempt) -> None:
        """See `job_pool.Watcher`."""
        if not self._live:
            what = "started" if attempt.process else "still running"
            self._say(f"{self._count()} {what}  {attempt.job.label}  ({attempt.slot.label})")

    def ended(self, attempt: Attempt, complete: bool) -> None:
        """See `job_pool.Watcher`."""
        if attempt.job.name not in self._missing:
            return
        self._missing.remove(attempt.job.name)
        self._done += complete
        self._failed += not complete
        how = "done   " if complete else f"FAILED ({_reason(attempt)})"
        self._say(f"{self._count()} {how}  {attempt.job.label}  {_progress(attempt)}")

    def watch(self, running: Sequence[Attempt]) -> None:
        """See `job_pool.Watcher`."""
        now = time.monotonic()
        if now < self._next:
            return
        if self._live:
            self._live.update(self._table(running), refresh=True)
        elif self._next:
            self._say(
                f"{self._count()} running  " + "; ".join(f"{each.job.label} {_progress(each)}" for each in running)
            )
        self._next = now + (_REFRESH_S if self._live else _PLAIN_INTERVAL_S)

    def show_failures(self, failed: Sequence[Attempt]) -> None:
        """Print why jobs failed, as far as their logs tell."""
        for attempt in failed:
            log = attempt.job.directory / LOG_FILE
            self._say(f"\n{attempt.job.label}: {_reason(attempt)}; the end of {log}:")
            for line in tail(log)[-_SHOWN_LINES:]:
                self._say(f"    {line}")

    def _count(self) -> str:
        failed = f", {self._failed} failed" if self._failed else ""
        return f"[{self._done}/{self._total} done{failed}]"

    def _say(self, text: str) -> None:
        self._console.print(printable(text, self._console.encoding), markup=False, highlight=False, soft_wrap=True)

    def _table(self, running: Sequence[Attempt]) -> Table:
        table = Table(title=f"multirun {self._count()}", title_justify="left")
        for column in ("job", "slot", "progress"):
            table.add_column(column)
        for attempt in running:
            table.add_row(printable(attempt.job.label), attempt.slot.label, _progress(attempt))
        return table


def _progress(attempt: Attempt) -> str:
    """A job's step, its last measured exact match, and its time."""
    parts = []
    step, exact_match = None, None
    for line in reversed(tail(attempt.job.directory / "metrics.jsonl", 1 << 16)):
        try:
            row = json.loads(line)
        except ValueError:
            continue  # the first or the last one, cut off
        step = step or row["step"]
        exact_match = row.get("dev/exact_match", row.get("rollout/exact_match"))
        if exact_match is not None:
            break
    if step is not None:
        parts.append(f"step {step}")
    if exact_match is not None:
        parts.append(f"exact match {exact_match:.3f}")
    return "  ".join([*parts, str(timedelta(seconds=round(time.monotonic() - attempt.started)))])


def _reason(attempt: Attempt) -> str:
    if attempt.code is None:
        return str(attempt.problem)
    if attempt.code < 0:
        return f"killed by signal {-attempt.code}"
    return f"exit code {attempt.code}"
