"""Processes that join each other as those of `torchrun` do, without the seconds that importing torch would take."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pkgutil
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from algorithms.run import main

_OF_TORCH = ("[W", "[rank", "  ", "frame #", "Exception raised from", "<omitting")
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["algorithms.run", "algorithms.training.summary", "small_runs", "rank_processes"])


def start(count: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Start processes that call a function; what each writes to stderr goes to a file `stderr-<rank>` of the folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        CONTEXT.Process(target=_begin, args=(rank, count, port, folder, work, *arguments)) for rank in range(count)
    ]
    for process in processes:
        process.start()
    return processes


def _begin(rank: int, count: int, port: int, folder: Path, work: Callable[..., Any], *arguments: Any) -> None:
    given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in given.items()}
    with (folder / f"stderr-{rank}").open("wb", buffering=0) as errors:
        os.dup2(errors.fileno(), 2)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    faulthandler.enable(sys.stderr)  # where a process was that dies of a fault in a library
    sys.exit(work(*arguments))


def run(
    arguments: list[str],
    noted: Path | None = None,
    rank: int = -1,
    place: str = "os.getpid",
    count: int = 0,
    end: int | str = 0,
) -> int:
    """`python -m algorithms.run` in one of the processes.

    Args:
        arguments: The command line.
        noted: Where the time of death is written.
        rank: The process that ends at the `count`-th call of the function `place`.
        place: Dotted name of the function.
        count: See `rank`.
        end: A signal, or the message of an exception.
    """
    calls: list[int] = []
    module, _, name = place.rpartition(".")
    target = pkgutil.resolve_name(module)
    original = getattr(target, name)

    def dying(*args: Any, **settings: Any) -> Any:
        calls.append(1)
        if os.environ["RANK"] == str(rank) and len(calls) == count:
            assert noted is not None
            noted.write_text(str(time.time()))
            if isinstance(end, str):
                raise OSError(end)
            os.kill(os.getpid(), end)
        return original(*args, **settings)

    with (
        patch.object(target, name, dying),
        patch.object(sys, "argv", ["run", *arguments]),
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
    ):
        main()
    return 0


def join(processes: list[Any], within_s: float) -> float:
    """Wait until all have ended; return how long it took. Those that are left are killed, and the test fails."""
    started = time.monotonic()
    for process in processes:
        process.join(max(0.0, started + within_s - time.monotonic()))
    left = [process for process in processes if process.is_alive()]
    for process in left:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    assert not left, f"{len(left)} of {len(processes)} processes did not end within {within_s} s"
    return time.monotonic() - started


def told(folder: Path) -> list[str]:
    """Lines that the processes have written to stderr, but for warnings and the stacks that torch adds to its own."""
    lines = [line for file in sorted(folder.glob("stderr-*")) for line in file.read_text().splitlines()]
    return [line for line in lines if line and "Warning" not in line and not line.startswith(_OF_TORCH)]
