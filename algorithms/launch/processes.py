"""A command in several processes that `torchrun` has started: the first reads the command line, all do the work."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from algorithms.launch.clear_errors import clear_errors

_Work = Callable[[Any, Path], Any]
#: Whether this process has told the others what to do.
_has_told = False


def are_several() -> bool:
    """Whether this process was started beside others. This doesn't load torch."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def wait_passively() -> None:
    """Let threads sleep while they wait for each other, as OpenMP reads it when torch is loaded.

    Threads that spin instead take each other's time slices as soon as a machine has other work, too.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def start(read: Callable[[], None], work: _Work) -> None:
    """Begin a command.

    Args:
        read: Reads the command line and calls `carry_out` with the work; only the first process does so.
        work: What is to be done. The other processes wait for its arguments.
    """
    wait_passively()
    if not are_several():
        read()
        return
    # Torch would add a stack of its own to the message of the process that says why all of them end.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from algorithms.learner import ranks  # it loads torch

    if int(os.environ["RANK"]) > 0:
        _follow(work)
        return
    try:
        read()
    finally:
        if not _has_told:  # help, a mistake in the command line, or nothing left to do
            ranks.join()
            ranks.decided(lambda: None)
            ranks.leave()


def carry_out(work: _Work, config: Any, folder: Path) -> None:
    """Do the work, together with the other processes if there are any.

    Args:
        work: The function that `start` was given.
        config: Its first argument, the settings.
        folder: Its second argument, the folder that is written.
    """
    global _has_told
    if are_several():
        from algorithms.learner import ranks

        ranks.join()
        ranks.decided(lambda: (config, folder))
        _has_told = True
    _do(work, config, folder)


def _follow(work: _Work) -> None:
    """Do what the first process says, without a word unless something fails here."""
    from algorithms.learner import ranks

    warnings.simplefilter("ignore")
    ranks.join()
    told = ranks.decided(lambda: None)
    if told is None:
        ranks.leave()
        return
    with clear_errors(told[1]), Path(os.devnull).open("w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        _do(work, *told)


def _do(work: _Work, config: Any, folder: Path) -> None:
    if not are_several():
        work(config, folder)
        return
    from algorithms.learner import ranks

    try:
        work(config, folder)
    except BaseException:
        ranks.fail()
        raise
    ranks.leave()
