"""Runs many jobs at a time. Each job is a process and has a slot for itself until it ends.

A slot is a share of the machine: a GPU, or some of the CPU cores. The job in it inherits the lock of the slot, and
nobody else holds it. So a slot is free exactly when its job has ended, even if the launcher was killed meanwhile
and started again. The new launcher waits for jobs that still run and does not start them a second time.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from algorithms.training import file_locks

LOG_FILE = "log.txt"
GRACE_S = 10.0
_POLL_S = 0.1
_HOLDER_BYTES = 1024


@dataclass(frozen=True)
class Slot:
    """A share of the machine.

    Attributes:
        index: Number of the slot, from 0.
        environment: Environment variables for the jobs in it.
        label: What a person reads.
    """

    index: int
    environment: Mapping[str, str] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Attributes:
        name: Name of the job, unique in the sweep.
        directory: The run directory.
        command: Given a slot, returns the command that completes the job.
        is_complete: Says whether there is nothing left to do. Called before the job starts and again after it ends.
        label: What a person reads.
    """

    name: str
    directory: Path
    command: Callable[[Slot], Sequence[str]]
    is_complete: Callable[[], bool]
    label: str


@dataclass
class Attempt:
    """A job that was started, or should have been, in a slot.

    Attributes:
        job: The job.
        slot: Its slot.
        process: None for a job that an earlier launcher started.
        pid: Process id of the job, which leads a process group; None if it runs on another machine.
        started: Start by the monotonic clock, seconds.
        code: Exit code, negative for a signal; None while the job runs, and for a job of an earlier launcher.
        problem: Reason why the job could not be started.
    """

    job: Job
    slot: Slot
    process: subprocess.Popen[bytes] | None = None
    pid: int | None = None
    started: float = field(default_factory=time.monotonic)
    code: int | None = None
    problem: str | None = None


class Watcher(Protocol):
    """Receives what happens to the jobs."""

    def begun(self, attempt: Attempt) -> None:
        """A job has begun."""

    def ended(self, attempt: Attempt, complete: bool) -> None:
        """A job has ended, whether it is complete or not."""

    def watch(self, running: Sequence[Attempt]) -> None:
        """Called now and then while jobs run."""


class Launcher:
    """Runs as many jobs at a time as there are slots.

    Args:
        slots: At least one.
        directory: Holds the locks of the slots; no other launcher may use the same one.
        watcher: Receives what happens to the jobs.
    """

    def __init__(self, slots: Sequence[Slot], directory: Path, watcher: Watcher) -> None:
        self._slots, self._directory, self._watcher = slots, directory, watcher
        self._running: list[Attempt] = []

    def run(self, jobs: Sequence[Job]) -> list[Attempt]:
        """Start every job that is not complete, once. However this call ends, no job runs afterwards.

        Returns:
            The attempts that ended before their job was complete.

        Raises:
            KeyboardInterrupt: A signal asked to end.
        """
        failed: list[Attempt] = []
        with _signals() as signals:
            try:
                self._adopt(jobs)
                adopted = {attempt.job.name for attempt in self._running}
                waiting = deque(job for job in jobs if job.name not in adopted)
                while waiting or self._running:
                    if signals:
                        raise KeyboardInterrupt
                    for attempt in self._ended():
                        self._after(attempt, waiting, failed)
                    used = {attempt.slot.index for attempt in self._running}
                    for slot in self._slots:
                        if waiting and slot.index not in used:
                            self._fill(slot, waiting, failed)
                    self._watcher.watch(self._running)
                    time.sleep(_POLL_S)
            finally:
                self._end_all(signals)
        return failed

    def _lock_file(self, slot: Slot) -> Path:
        return self._directory / f"slot-{slot.index}.lock"

    def _adopt(self, jobs: Sequence[Job]) -> None:
        """Find jobs that a killed launcher has left running, even in slots that no longer exist."""
        by_name = {job.name: job for job in jobs}
        for file in sorted(self._directory.glob("slot-*.lock")):
            descriptor = file_locks.try_lock(file)
            if descriptor is not None:
                os.close(descriptor)
                continue
            holder = _read_holder(file)
            name = holder.get("job", "?")
            job = by_name.get(name) or Job(name, self._directory, lambda slot: [], lambda: True, name)
            pid = holder.get("pid") if holder.get("host") == socket.gethostname() else None
            attempt = Attempt(job, Slot(int(file.stem.removeprefix("slot-")), label="from before"), pid=pid)
            self._running.append(attempt)
            self._watcher.begun(attempt)

    def _fill(self, slot: Slot, waiting: deque[Job], failed: list[Attempt]) -> None:
        """Start the next job that has anything left to do."""
        descriptor = file_locks.try_lock(self._lock_file(slot))
        if descriptor is None:
            return
        try:
            while waiting:
                attempt = Attempt(waiting.popleft(), slot)
                if attempt.job.is_complete():
                    self._watcher.ended(attempt, True)
                elif self._start(attempt, attempt.job.command(slot), descriptor):
                    self._watcher.begun(attempt)
                    return
                else:
                    failed.append(attempt)
                    self._watcher.ended(attempt, False)
        finally:
            os.close(descriptor)

    def _start(self, attempt: Attempt, command: Sequence[str], lock: int) -> bool:
        """Try to start a job."""
        job = attempt.job
        try:
            job.directory.mkdir(parents=True, exist_ok=True)
            _write_holder(lock, job.name)
            with (job.directory / LOG_FILE).open("ab") as log:
                attempt.process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env={**os.environ, **attempt.slot.environment},
                    pass_fds=[lock],
                    start_new_session=True,  # we pass Ctrl-C on ourselves, and all that the job starts ends with it
                )
        except OSError as error:
            attempt.problem = f"could not be started ({error})"
            return False
        attempt.pid = attempt.process.pid
        self._running.append(attempt)
        with suppress(OSError):  # the disk is full: only a later launcher would need the note
            _write_holder(lock, job.name, attempt.pid)
        return True

    def _ended(self) -> list[Attempt]:
        """Remove the attempts that have ended from the running ones."""
        ended = [attempt for attempt in self._running if self._has_ended(attempt)]
        self._running = [attempt for attempt in self._running if attempt not in ended]
        return ended

    def _has_ended(self, attempt: Attempt) -> bool:
        if attempt.process is None:
            descriptor = file_locks.try_lock(self._lock_file(attempt.slot))
            if descriptor is not None:
                os.close(descriptor)
            return descriptor is not None
        attempt.code = attempt.process.poll()
        if attempt.code is not None:
            _signal_group(attempt, signal.SIGKILL)  # processes that the job has left behind
        return attempt.code is not None

    def _after(self, attempt: Attempt, waiting: deque[Job], failed: list[Attempt]) -> None:
        complete = attempt.job.is_complete()
        if not complete and attempt.process is None:
            waiting.appendleft(attempt.job)
            return
        if not complete:
            failed.append(attempt)
        self._watcher.ended(attempt, complete)

    def _end_all(self, signals: list[int]) -> None:
        """Ask the running jobs to end. Kill them after a while, or at once on a second signal."""
        asked, deadline = len(signals), time.monotonic() + GRACE_S
        for attempt in self._running:
            _signal_group(attempt, signal.SIGTERM)
        while self._running and time.monotonic() < deadline and len(signals) <= asked:
            self._ended()
            time.sleep(_POLL_S)
        for attempt in self._running:
            _signal_group(attempt, signal.SIGKILL)
            if attempt.process is not None:
                attempt.process.wait()


def tail(path: Path, num_bytes: int = 8192) -> list[str]:
    """The last lines of a file without the empty ones; no lines if there is no such file."""
    if not path.is_file():
        return []
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - num_bytes))
        return [line for line in stream.read().decode("utf-8", "replace").splitlines() if line.strip()]


def _write_holder(lock: int, job: str, pid: int | None = None) -> None:
    """Write who has a slot. The text has a fixed length, so that it overwrites all of an earlier holder's text."""
    content = json.dumps({"job": job, "host": socket.gethostname(), "pid": pid})
    os.pwrite(lock, content.ljust(_HOLDER_BYTES).encode(), 0)


def _read_holder(file: Path) -> dict[str, Any]:
    """Read who has a slot; nothing if no holder is written."""
    with suppress(ValueError):
        return json.loads(file.read_text(encoding="utf-8"))
    return {}


def _signal_group(attempt: Attempt, number: int) -> None:
    if attempt.pid is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(attempt.pid, number)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that ask to end, so that none interrupts between a process's start and the note of it."""
    seen: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # under nohup it stays ignored
                before[number] = signal.signal(number, lambda received, _: seen.append(received))
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
