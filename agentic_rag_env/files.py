"""Files that are there with all of their content, or not at all; and JSON lines read one by one."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from agentic_rag_env.errors import DataError

_Made = TypeVar("_Made")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place to write a file that appears under its own name only once it is complete.

    Args:
        path: Where the file shall be; what is there stays until then, and for good if the block raises.

    Yields:
        The place to write to, in the same folder.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file that is there with all of its content or as it was before."""
    with written_whole(path) as partial:
        partial.write_bytes(content)


def remove_partial(folder: Path) -> None:
    """Remove what killed processes left in a folder that no other process writes to."""
    for partial in folder.glob(".*.partial"):
        partial.unlink()


def read_rows(path: Path, make: Callable[[dict[str, Any]], _Made]) -> Iterator[_Made]:
    """What `make` makes of each line of a file of trajectories.

    Raises:
        DataError: The file is no such file; the message names it and the line.
    """
    try:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                try:
                    made = make(json.loads(line))
                except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
                    raise DataError(f"{path}, line {number}: no trajectory ({error}).") from error
                yield made
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}); delete it, and it will be made again.") from error
