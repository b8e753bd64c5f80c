"""Files that are kept between runs. Each has a seal beside it, and a file that does not fit its seal is made again."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from agentic_rag_env.errors import DataError
from agentic_rag_env.files import remove_partial, sha256, write_whole

_Read = TypeVar("_Read")


def seal(path: Path, numbers: Mapping[str, Any] | None = None) -> None:
    """Write the seal of a complete file, and remove what killed processes left of earlier attempts.

    Args:
        path: The file; no other process writes it meanwhile.
        numbers: Plain data to keep beside the file.
    """
    content, told = sha256(path), dict(numbers or {})
    sealed = {"sha256": content, "numbers": told, "check": _check(path, content, told)}
    write_whole(_seal_of(path), json.dumps(sealed).encode())
    remove_partial(path.parent, path.name)


def read_kept(path: Path, read: Callable[[Path], _Read], warn: bool = True) -> tuple[_Read, dict[str, Any]] | None:
    """Read a kept file and its numbers; None if it is not there or does not fit its seal.

    Args:
        path: The file.
        read: Reads the file; a `DataError` counts as damage.
        warn: Whether to say that a file is made again, and why.
    """
    if not path.exists() and not _seal_of(path).exists():
        return None
    try:
        sealed = json.loads(_seal_of(path).read_text(encoding="utf-8"))
        content, numbers = sha256(path), dict(sealed["numbers"])
        if sealed["sha256"] != content or sealed["check"] != _check(path, content, numbers):
            raise DataError("it does not have the checksum that it was kept with")
        return read(path), numbers
    except FileNotFoundError as error:
        problem = f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        problem = str(error) if isinstance(error, DataError) else f"{_seal_of(path).name} is damaged"
    if warn:
        warnings.warn(f"{path} is made again: {problem}.", stacklevel=2)
    return None


def _seal_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.seal")


def _check(path: Path, content: str, numbers: Mapping[str, Any]) -> str:
    # The name is part of it, so that another file put in this place is recognized.
    return hashlib.sha256(json.dumps([path.name, content, numbers], sort_keys=True).encode()).hexdigest()
