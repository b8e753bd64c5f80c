"""Ends all processes of a run within seconds if one of them fails, is killed or hangs, and lets one of them say why.

A thread in each process looks after the others. It also ends a process that waits inside a collective operation, where
Python code doesn't run.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

_POLL_S = 0.5
#: A process that stands still this long was stopped. A debugger may stop one for a moment.
_STOPPED_S = 3.0
#: A process that gives no sign of life this long hangs. Library code may keep the interpreter busy for a while.
_SILENT_S = 120.0
#: How long a process may take to say why it fails, and how long others wait for it.
_GRACE_S = 6.0
#: States of a process that has ended, as `_state` gives them.
_GONE = ("", "Z", "X")
#: How long a process waits for another one: longer than any run. Whoever has nothing left to wait for is ended here.
PATIENCE = timedelta(days=365)
_ADVICE = "Checkpoints are kept: go on with resume=<run directory>, on any number of processes."


class Lifeline:
    """Watches the other processes from a thread.

    Args:
        rank: Number of this process.
        count: Number of all.
    """

    def __init__(self, rank: int, count: int) -> None:
        self._rank, self._count = rank, count
        self._store = self._connect()
        self._cut, self._telling = threading.Event(), threading.Event()
        self._polls = 0
        self._store.set(f"beat/{rank}", "0")
        self._store.set(f"place/{rank}", json.dumps([_world(), socket.gethostname(), os.getpid()]))
        others = [other for other in range(count) if other != rank]
        self._places = {other: json.loads(self._store.get(f"place/{other}")) for other in others}
        self._beats = dict.fromkeys(others, (b"0", 0))
        self._stopped = dict.fromkeys(others, 0)
        self._asked_to_end = _on_sigterm()
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._watch, self._listen)]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _connect() -> dist.Store:
        # A connection of its own: that of the process group may be busy in another thread.
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return dist.PrefixStore(f"lifeline/{attempt}", dist.TCPStore(host, port, is_master=False))

    def cut(self) -> None:
        """Stop watching: all work is done."""
        self._cut.set()
        self._store.set("news", "all work is done")
        for thread in self._threads:
            thread.join()
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def fail(self) -> None:
        """Return in the process that fails first, so that it can say why; end every other one."""
        self._telling.set()
        if not self._claims():
            self._leave(1)
        self._wait_for_later_ones()

    def lost(self) -> None:
        """Wait for the thread to end this process after a collective operation has failed; return if it doesn't."""
        if not self._cut.is_set():
            time.sleep(_GRACE_S)

    def _watch(self) -> None:
        while not self._cut.is_set():
            is_asked = self._is_asked_to_end(_POLL_S)
            if self._telling.is_set():
                time.sleep(_GRACE_S)
                self._leave(1)
            try:
                self._look()
            except (RuntimeError, OSError):  # the store's process has ended: the first one, or the launcher
                if 0 in self._places and self._state_of(0) in _GONE:
                    self._end_for(0, "has ended without a word")
                if not self._cut.is_set():
                    self._end(f"The launcher of these processes has ended, so all of them end. {_ADVICE}")
            if is_asked:
                self._end_as_asked()

    def _listen(self) -> None:
        """End this process when another one has told. The store answers here alone: it may be in a stopped process."""
        store = self._connect()
        try:
            store.wait(["news"], PATIENCE)
            has_told = store.add("told", 0) > 0
        except (RuntimeError, OSError):  # the store has ended; the other thread says so
            return
        if has_told and not self._telling.is_set():
            self._leave(1)

    def _look(self) -> None:
        """Look after every other process once."""
        self._polls += 1
        self._store.set(f"beat/{self._rank}", str(self._polls))
        for other, (_, _, pid) in self._places.items():
            state = self._state_of(other)
            self._stopped[other] = self._stopped[other] + 1 if state == "T" else 0
            if state in _GONE:
                self._end_for(other, "has ended without a word")
            if self._stopped[other] * _POLL_S > _STOPPED_S:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
                self._end_for(other, "was stopped, and is ended")
            beat, since = self._beats[other]
            asks = self._polls % 10 == 0 and not any(self._stopped.values())
            if asks and (now := self._store.get(f"beat/{other}")) != beat:
                self._beats[other] = now, self._polls
            elif (self._polls - since) * _POLL_S > _SILENT_S:
                self._end_for(other, f"has given no sign of life for {_SILENT_S:.0f} s")

    def _end_for(self, other: int, what: str) -> None:
        if not self._cut.is_set():
            _, host, pid = self._places[other]
            self._end(f"Process {other} of {self._count} (pid {pid} on {host}) {what}, so all of them end. {_ADVICE}")

    def _end_as_asked(self) -> NoReturn:
        """End because the launcher asks to. It may know before this process does that another one has gone."""
        for _ in range(4):
            with suppress(RuntimeError, OSError):
                self._look()
            time.sleep(_POLL_S / 4)
        self._leave(128 + signal.SIGTERM)

    def _end(self, message: str) -> NoReturn:
        self._telling.set()
        if self._claims():
            print(message, file=sys.stderr, flush=True)
        self._leave(1)

    def _leave(self, code: int) -> NoReturn:
        self._wait_for_later_ones()
        os._exit(code)

    def _wait_for_later_ones(self) -> None:
        """Let processes end from the last to the first.

        So each of them can still see that another one has told: in the store, which may end with the first process, or
        because that one still runs.
        """
        for _ in range(round(_GRACE_S / _POLL_S)):
            if not any(other > self._rank for other in self._left()):
                break
            time.sleep(_POLL_S)

    def _claims(self) -> bool:
        """Whether it is for this process to say what went wrong: nobody else has yet."""
        try:
            is_first = self._store.add("told", 1) == 1
            self._store.set("news", "one has told")
            return is_first
        except (RuntimeError, OSError):  # the store has ended: the first of those that are left says it
            return self._rank < min(self._left(), default=self._count)

    def _left(self) -> list[int]:
        """The other processes that still run; those of other machines count as running."""
        return [other for other in self._places if self._state_of(other) not in (*_GONE, "T")]

    def _state_of(self, other: int) -> str:
        """The letter of a process's state (see `_state`), or "?" for one of another machine."""
        world, _, pid = self._places[other]
        return _state(pid) if world is not None and world == _world() else "?"

    def _is_asked_to_end(self, wait_s: float) -> bool:
        """Wait a moment, and say whether SIGTERM has come meanwhile."""
        ready, _, _ = select.select([self._asked_to_end], [], [], wait_s)
        return bool(ready) and signal.SIGTERM in self._asked_to_end.recv(64)


def _on_sigterm() -> socket.socket:
    """Make SIGTERM readable from a socket: a handler would have to wait for a collective operation to return."""
    receiving, sending = socket.socketpair()
    if threading.current_thread() is threading.main_thread():
        sending.setblocking(False)
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(sending.detach(), warn_on_full_buffer=False)
    return receiving


def _world() -> list[str] | None:
    """What two processes have in common that see each other's process ids; None where that can't be known."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
        return [boot.strip(), str(Path("/proc/self/ns/pid").stat().st_ino)]
    except OSError:
        return None


def _state(pid: int) -> str:
    """The letter of a process's state in `/proc`, such as "T" for a stopped one; empty if there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
