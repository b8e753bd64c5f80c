"""Writes files that are there with all of their content or not at all, names files, and reads JSON."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeVar

from agentic_rag_env.errors import DataError

#: Most bytes of a line of JSON: a compressed file of some hundred KiB could hold one that fills the memory.
MAX_LINE = 2**26
_MAX_NAME = 120
#: Names that stand for devices on Windows, with any ending.
_OF_WINDOWS = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)
_Made = TypeVar("_Made")


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """A place to write a file that appears under its own name only once it is complete and on the disk.

    Args:
        path: The final place of the file. A file that is there stays until then, and for good if the block raises.

    Yields:
        The place to write to, in the same folder.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        sync(partial)
        partial.replace(path)
        sync(path.parent)
    finally:
        partial.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until the content of a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_all(folder: Path) -> None:
    """Wait until everything in a folder is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file; at every moment it has either all of its new content or its old one."""
    with written_whole(path) as partial:
        partial.write_bytes(content)


def remove_partial(folder: Path, name: str = "*") -> None:
    """Remove the partial files that killed processes left. No process may be writing such a file.

    Args:
        folder: Where the partial files are.
        name: The name of the only file to look for, or a pattern.
    """
    for partial in folder.glob(f".{name}.*.partial"):
        partial.unlink(missing_ok=True)


def file_name(text: str, also: str = "") -> str:
    """A text as the name of one file or folder.

    The name is no path. It is readable, safe in a shell, and different for different texts.

    Args:
        text: Any text, such as one from a file or a setting.
        also: Characters to keep besides letters, digits and `_.+-`.
    """
    name = re.sub(rf"[^\w.+{re.escape(also)}-]", "_", text, flags=re.ASCII).lstrip("-.")[:_MAX_NAME].rstrip(".")
    name = f"_{name}" if _OF_WINDOWS.match(name) else name
    if name and name == text:
        return name
    return f"{name or 'run'}-{hashlib.sha256(text.encode('utf-8', 'backslashreplace')).hexdigest()[:8]}"


def sha256(path: Path) -> str:
    """The SHA-256 checksum of a file, in hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_object(path: Path, most_bytes: int) -> dict[str, Any]:
    """The JSON object in a file, which may be a stranger's.

    Args:
        path: The file.
        most_bytes: Most bytes of it.

    Raises:
        ValueError: The file is larger, or holds something else; the message says what is wrong in one short line.
        OSError: The file cannot be read.
    """
    if path.stat().st_size > most_bytes:
        raise ValueError(f"it has more than {most_bytes} bytes")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(" ".join(str(error).split())[:200]) from error
    if not isinstance(content, dict):
        raise ValueError("it holds no settings")
    return content


def lines_of(path: Path, most_bytes: int = MAX_LINE) -> Iterator[str]:
    """The lines of a text file in UTF-8, unpacked if its name ends in `.gz` or `.zst`.

    Args:
        path: The file; a byte order mark at its beginning is left out.
        most_bytes: Most bytes of a line.

    Raises:
        DataError: The file is damaged, is no text, or has a longer line.
        OSError: The file cannot be read.
    """
    number = 0
    try:
        with _opened(path) as file:
            while line := file.readline(most_bytes + 1):
                number += 1
                if len(line) > most_bytes:
                    raise DataError(f"{path}, line {number}: has more than {most_bytes} bytes.")
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
        if not number and path.suffix == ".gz" and path.stat().st_size == 0:
            raise EOFError("it is empty")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not a whole gzip file ({error}).") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 at byte {error.start}: {error.reason}.") from error


def _opened(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix == ".zst":
        import pyarrow as pa

        return io.BufferedReader(pa.CompressedInputStream(str(path), "zstd"))
    return path.open("rb")


def read_rows(path: Path, make: Callable[[dict[str, Any]], _Made]) -> Iterator[_Made]:
    """The results of `make` for each line of a file of JSON lines, such as trajectories or predictions.

    Raises:
        DataError: The file holds no such lines; the message names it and the line.
    """
    for number, line in enumerate(lines_of(path), 1):
        try:
            made = make(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, OverflowError) as error:
            raise DataError(f"{path}, line {number}: no such row ({type(error).__name__}: {error}).") from error
        yield made
