"""Many runs at a time: each job a process of its own, in a slot that it has for itself until it ends.

A slot is a share of the machine: a GPU, or some of the CPU cores. The job in it inherits the lock of the slot, and
nobody else has it. So a slot is free exactly when its job has ended, even if the launcher was killed in the meantime
and started anew: what still runs then is waited for, not started a second time.
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
        index: From 0.
        environment: Variables for the jobs in it.
        label: What a person reads.
    """

    index: int
    environment: Mapping[str, str] = field(default_factory=dict)
    label: str = ""


@dataclass(frozen=True)
class Job:
    """A run of a sweep.

    Attributes:
        name: No other job of the sweep has it.
        directory: The run directory.
        command: The command line that does what is left to do in a slot; None if nothing is. Asked when the job's turn
            comes, and when it has ended.
        label: What a person reads.
    """

    name: str
    directory: Path
    command: Callable[[Slot], Sequence[str] | None]
    label: str


@dataclass
class Attempt:
    """A job in a slot.

    Attributes:
        job: Which.
        slot: Where.
        process: None for a job that an earlier launcher started.
        pid: Of the job, which leads a process group; None where it is on another machine.
        started: By the monotonic clock.
        code: What it exited with, negative for a signal; None before that, and for a job of an earlier launcher.
        problem: Why it could not be started.
    """

    job: Job
    slot: Slot
    process: subprocess.Popen[bytes] | None = None
    pid: int | None = None
    started: float = field(default_factory=time.monotonic)
    code: int | None = None
    problem: str | None = None


class Watcher(Protocol):
    """Is told what happens to the jobs."""

    def begun(self, attempt: Attempt) -> None:
        """A job runs."""

    def ended(self, attempt: Attempt, complete: bool) -> None:
        """A job has ended, with nothing left to do or before that."""

    def watch(self, running: Sequence[Attempt]) -> None:
        """Some time has gone by."""


class Launcher:
    """Runs jobs, as many at a time as there are slots.

    Args:
        slots: At least one.
        directory: For the locks of the slots; nobody else may launch jobs with the same one.
        watcher: Is told what happens.
    """

    def __init__(self, slots: Sequence[Slot], directory: Path, watcher: Watcher) -> None:
        self._slots, self._directory, self._watcher = slots, directory, watcher
        self._running: list[Attempt] = []

    def run(self, jobs: Sequence[Job]) -> list[Attempt]:
        """Let every job do what is left to do, once. Whatever ends this, no job runs any more afterwards.

        Returns:
            The attempts that ended before their job was done.

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
        """Find what a launcher that was killed has left running, be it in slots that there are no more."""
        by_name = {job.name: job for job in jobs}
        for file in sorted(self._directory.glob("slot-*.lock")):
            descriptor = file_locks.try_lock(file)
            if descriptor is not None:
                os.close(descriptor)
                continue
            holder = _read_holder(file)
            name = holder.get("job", "?")
            job = by_name.get(name) or Job(name, self._directory, lambda slot: None, name)
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
                command = attempt.job.command(slot)
                if command is None:
                    self._watcher.ended(attempt, True)
                elif self._start(attempt, command, descriptor):
                    self._watcher.begun(attempt)
                    return
                else:
                    failed.append(attempt)
                    self._watcher.ended(attempt, False)
        finally:
            os.close(descriptor)

    def _start(self, attempt: Attempt, command: Sequence[str], lock: int) -> bool:
        """Start a job, if that can be done."""
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
                    start_new_session=True,  # a Ctrl-C is ours to pass on, and what the job starts ends with it
                )
        except OSError as error:
            attempt.problem = f"could not be started ({error})"
            return False
        attempt.pid = attempt.process.pid
        self._running.append(attempt)
        with suppress(OSError):  # a full disk: only a later launcher will miss it
            _write_holder(lock, job.name, attempt.pid)
        return True

    def _ended(self) -> list[Attempt]:
        """Take those that have ended out of the running ones."""
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
            _signal_group(attempt, signal.SIGKILL)  # what it has left behind
        return attempt.code is not None

    def _after(self, attempt: Attempt, waiting: deque[Job], failed: list[Attempt]) -> None:
        complete = attempt.job.command(attempt.slot) is None
        if not complete and attempt.process is None:
            waiting.appendleft(attempt.job)
            return
        if not complete:
            failed.append(attempt)
        self._watcher.ended(attempt, complete)

    def _end_all(self, signals: list[int]) -> None:
        """Ask all that still run to end, and make them after a while, or at once if asked a second time."""
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
    """The last lines of a file that are not empty; none if there is no such file."""
    if not path.is_file():
        return []
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - num_bytes))
        return [line for line in stream.read().decode("utf-8", "replace").splitlines() if line.strip()]


def _write_holder(lock: int, job: str, pid: int | None = None) -> None:
    """Say who has a slot, always in as many bytes, so that nothing of an earlier holder remains."""
    content = json.dumps({"job": job, "host": socket.gethostname(), "pid": pid})
    os.pwrite(lock, content.ljust(_HOLDER_BYTES).encode(), 0)


def _read_holder(file: Path) -> dict[str, Any]:
    """Who has a slot; nothing if nobody has said so."""
    with suppress(ValueError):
        return json.loads(file.read_text(encoding="utf-8"))
    return {}


def _signal_group(attempt: Attempt, number: int) -> None:
    if attempt.pid is not None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(attempt.pid, number)


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Collect the signals that ask to end, so that none breaks in after the start of a process, before it is noted."""
    seen: list[int] = []
    before = {}
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has it
                before[number] = signal.signal(number, lambda received, _: seen.append(received))
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
