"""Errors of a user become messages of a line or two; bugs keep their traceback."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from agentic_rag_env.errors import AgenticRAGError, ConfigurationError, DataError, UnknownNameError
from agentic_rag_env.registry import PLUGINS_VARIABLE
from agentic_rag_env.terminal import print_line, printable
from algorithms.training.run_files import allow, places, read_settings


class _Terminated(BaseException):
    """SIGTERM was received. Like KeyboardInterrupt it is no `Exception`, so nobody takes it for a failure."""


@contextmanager
def clear_errors(run_dir: Path | None = None) -> Iterator[None]:
    """Report an error that the user can mend in a line or two and exit with code 1; bugs keep their traceback.

    HYDRA_FULL_ERROR=1 shows the traceback of every error. In a multirun the jobs after a failed one still run. SIGTERM
    ends the block as an error would, so that half-written files are removed.

    Args:
        run_dir: The run directory. If it holds checkpoints, the message says how to resume it.
    """
    shown_before = warnings.formatwarning
    warnings.formatwarning = _format_warning  # type: ignore[assignment]
    try:
        with _ended_by_sigterm():
            yield
    except _Terminated as error:
        _print_message("Terminated.", error, run_dir)
        raise SystemExit(128 + signal.SIGTERM) from error
    except KeyboardInterrupt as error:
        _print_message("Interrupted.", error, run_dir)
        raise SystemExit(130) from error
    except _mendable() as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        message = " ".join([f"{type(error).__name__}: {_told(error)}", *getattr(error, "__notes__", ())])
        if _is_job_of_a_multirun():
            from hydra.errors import CompactHydraException

            raise CompactHydraException(message) from error
        _print_message(message, error, run_dir)
        raise SystemExit(1) from error
    finally:
        warnings.formatwarning = shown_before


def _mendable() -> tuple[type[Exception], ...]:
    """The errors that a user can mend."""
    return (AgenticRAGError, OSError, FloatingPointError, *_out_of_memory())


def _out_of_memory() -> tuple[type[Exception], ...]:
    """What torch raises when a GPU's memory is full; nothing for a command that has not loaded torch."""
    torch = sys.modules.get("torch")
    return () if torch is None else (torch.OutOfMemoryError,)


def _told(error: Exception) -> str:
    if not isinstance(error, _out_of_memory()):
        return str(error)
    what, how_much, *_ = f"{error}. . ".split(". ")  # torch goes on with a page about its allocator
    return (
        f"{what}. {how_much}. Lower learner.micro_batch_tokens or learner.chunk_tokens, or set "
        "learner.gradient_checkpointing=true; a run that is resumed takes them, too. In a new run, num_envs makes "
        "rollouts smaller, and preflight=true plans the memory."
    )


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Raise `_Terminated` at SIGTERM, unless somebody else (a launcher, a scheduler's library) handles that signal."""
    is_free = (
        threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    )
    if not is_free:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _terminate(*_: object) -> NoReturn:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
    raise _Terminated


def _format_warning(message: Warning | str, category: type[Warning], *_: Any) -> str:
    return printable(f"{category.__name__.removeprefix('User')}: {message}\n", sys.stderr.encoding)


def _print_message(message: str, error: BaseException, run_dir: Path | None) -> None:
    print_line(message, sys.stderr)
    if run_dir is None or not any(run_dir.glob("checkpoints/*/manifest.json")):
        return
    if isinstance(error, UnknownNameError):
        print(
            f"If a plug-in registers it, install its package, or name its file: {PLUGINS_VARIABLE}=<file> python -m "
            f"algorithms.run {_resume(run_dir)}",
            file=sys.stderr,
        )
    # The same step would fail again; the others' messages already say what would help.
    elif not isinstance(error, (FloatingPointError, ConfigurationError, DataError)):
        print(f"Checkpoints are kept. To go on: python -m algorithms.run {_resume(run_dir)}", file=sys.stderr)


def _resume(run_dir: Path) -> str:
    resume = f"resume={shlex.quote(str(run_dir))}"
    with suppress(DataError):
        if places(settings := read_settings(run_dir)):
            return f"{resume} {allow(settings)}"
    return resume


def _is_job_of_a_multirun() -> bool:
    if "hydra" not in sys.modules:  # this command does not use Hydra
        return False
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
