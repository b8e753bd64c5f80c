"""Jobs that behave as they are told and note when they have which slot, for tests of the launcher.

Light to import: a launcher in a process of its own imports it too.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from algorithms.launch.job_pool import Attempt, Job, Launcher, Slot

ROOT = Path(__file__).parents[2]
#: A job that notes when it has which slot, by the clock and by a lock of its own on the slot.
FAKE_JOB = """
import fcntl, json, os, signal, sys, time
folder, record, behaviour = sys.argv[1:]
slot = os.environ["CUDA_VISIBLE_DEVICES"]
attempts = os.path.join(folder, "attempts")
open(attempts, "a").write("x")
first = os.path.getsize(attempts) == 1

def note(event):
    line = {"job": os.path.basename(folder), "slot": slot, "event": event, "time": time.monotonic(), "pid": os.getpid()}
    file = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(file, (json.dumps(line) + "\\n").encode())

occupied = open(record + "." + slot, "w")
try:
    fcntl.flock(occupied, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    note("clash")
note("start")
if behaviour == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
while behaviour in ("wait", "stubborn") and not os.path.exists(record + ".go"):
    time.sleep(0.01)
time.sleep(0.05)
print("the last words of", os.path.basename(folder), flush=True)
note("end")
if first and behaviour.isdecimal():
    sys.exit(int(behaviour))
if first and behaviour.startswith("SIG"):
    os.kill(os.getpid(), getattr(signal, behaviour))
open(os.path.join(folder, "summary.json"), "w").write("{}")
"""
#: A launcher in a process of its own, to be killed; signals reach it even if the tests were started to ignore them.
LAUNCH = """
import signal, sys
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(number, signal.SIG_DFL)
sys.path[:0] = [{tests!r}]
from fake_jobs import FakeSweep
from pathlib import Path
from algorithms.launch import job_pool
job_pool.GRACE_S = 0.3
FakeSweep(Path({folder!r}), {behaviours!r}).launch({num_slots})
"""


class Silent:
    """A watcher that only counts."""

    def __init__(self):
        self.told = []

    def begun(self, attempt):
        self.told.append(("begun", attempt.job.name))

    def ended(self, attempt, complete):
        self.told.append(("done" if complete else "failed", attempt.job.name))

    def watch(self, running):
        pass


class FakeSweep:
    """Jobs that behave as they are told, and what they noted."""

    def __init__(self, folder: Path, behaviours: dict[str, str]):
        self.folder, self.behaviours, self.record = folder, behaviours, folder / "record"
        self.watcher = Silent()

    def jobs(self) -> list[Job]:
        return [self._job(name) for name in self.behaviours]

    def _job(self, name):
        folder = self.folder / name
        line = [sys.executable, "-SE", "-c", FAKE_JOB, str(folder), str(self.record), self.behaviours[name]]

        def command(slot):
            assert "CUDA_VISIBLE_DEVICES" in slot.environment, "a real command needs what a slot of this launcher gives"
            return line

        return Job(name, folder, command, (folder / "summary.json").exists, name)

    def launch(self, num_slots: int) -> list[Attempt]:
        slots = [Slot(index, {"CUDA_VISIBLE_DEVICES": str(index)}) for index in range(num_slots)]
        return Launcher(slots, self.folder / "locks", self.watcher).run(self.jobs())

    def launch_elsewhere(self, num_slots: int) -> subprocess.Popen:
        code = LAUNCH.format(
            tests=str(Path(__file__).parent), folder=str(self.folder), behaviours=self.behaviours, num_slots=num_slots
        )
        return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)

    def go(self) -> None:
        Path(f"{self.record}.go").touch()

    def noted(self, event: str) -> list[dict]:
        lines = self.record.read_text().splitlines() if self.record.exists() else []
        return [line for line in map(json.loads, lines) if line["event"] == event]

    def starts(self) -> Counter:
        return Counter(line["job"] for line in self.noted("start"))

    def complete(self) -> set[str]:
        return {path.parent.name for path in self.folder.glob("*/summary.json")}

    def wait_for_starts(self, count: int) -> None:
        wait_until(lambda: len(self.noted("start")) >= count)

    def assert_no_slot_twice_at_a_time(self) -> None:
        assert self.noted("clash") == []
        ends = {(line["job"], line["pid"]): line["time"] for line in self.noted("end")}
        for slot in {line["slot"] for line in self.noted("start")}:
            starts = [line for line in self.noted("start") if line["slot"] == slot]
            intervals = sorted((line["time"], ends[line["job"], line["pid"]]) for line in starts)
            for (_, end), (start, _) in itertools.pairwise(intervals):
                assert end <= start


def wait_until(reached) -> None:
    deadline = time.monotonic() + 60
    while not reached():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    """Not so for what has ended and only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
