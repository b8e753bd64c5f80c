"""What a run directory holds: a run that is begun or complete, with these settings or others; and who writes there."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from agentic_rag_env.errors import ConfigurationError, DataError
from agentic_rag_env.files import remove_partial
from algorithms.training import file_locks
from algorithms.training.run_files import CONFIG_FILE, METRICS_FILE, differences, read_settings, read_summary
from algorithms.training.settings import settings_with_effect

LOCK_FILE = CONFIG_FILE.parent / "lock"
PLAN_FILE = Path("preflight.json")


def begun(run_dir: Path) -> bool:
    """Whether a directory holds a run that has trained or is about to train."""
    return (run_dir / METRICS_FILE).exists() or (run_dir / "checkpoints").exists()


def complete(run_dir: Path) -> bool:
    """Whether a directory holds a complete run; a damaged summary does not count, because it is made again."""
    try:
        read_summary(run_dir)
        return True
    except FileNotFoundError:
        return False
    except DataError as error:
        warnings.warn(f"{error}; it is made again.", stacklevel=2)
        return False


def has_plan(run_dir: Path) -> bool:
    """Whether a directory holds the plan of a run that fits."""
    file = run_dir / PLAN_FILE
    return file.is_file() and json.loads(file.read_bytes())["fits"]


def hold(run_dir: Path) -> None:
    """Let nobody else write into a run directory until `release`.

    Raises:
        ConfigurationError: Somebody writes there.
    """
    holder = file_locks.hold(run_dir / LOCK_FILE)
    if holder is not None:
        raise ConfigurationError(f"{run_dir} is being written by {holder}; wait for it, or choose another directory.")


def release(run_dir: Path) -> None:
    """Undo `hold`."""
    file_locks.release(run_dir / LOCK_FILE)


def remove_leftovers(run_dir: Path) -> None:
    """Remove what a killed process has half written; the caller must hold the directory."""
    for folder in (run_dir, *(run_dir / name for name in (CONFIG_FILE.parent, "trajectories", "predictions"))):
        remove_partial(folder)


def require_same(run_dir: Path, wanted: Mapping[str, Any]) -> None:
    """Require the settings of a begun run; settings that only one side knows are not compared.

    Args:
        run_dir: Directory of a run that has begun.
        wanted: The settings to run there, plain data.

    Raises:
        ConfigurationError: A setting differs; the message names it.
    """
    found = [
        f"{key} is {_shown(there)} there, {_shown(here)} here"
        for key, there, here in differences(read_settings(run_dir), settings_with_effect(wanted))
    ]
    if found:
        more = f"; and {len(found) - 5} more" if len(found) > 5 else ""
        raise ConfigurationError(
            f"{run_dir} holds a run with other settings: {'; '.join(found[:5])}{more}. Choose another directory, or "
            "remove that run."
        )


def _shown(value: Any) -> Any:
    """A setting for people; a part is shown by its name."""
    return value.get("name", value) if isinstance(value, Mapping) else value
