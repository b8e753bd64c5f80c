"""Reads passages, and JSON lines in general, with errors that name the place."""

from __future__ import annotations

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from agentic_rag_env.errors import DataError
from agentic_rag_env.types import Passage


def read_corpus(path: str | Path) -> tuple[Passage, ...]:
    """Read the passages of a JSON-lines file, plain or gzipped (`.gz`), in the format of the Search-R1 corpora.

    A row has `id` and `contents` (title on the first line, text after it), or `id`, `title` and `text`, from which the
    contents are made as `"title"`, in literal double quotes, a line break and the text. Other fields are ignored.

    Args:
        path: The file. While it does not change, reading it again in one process returns the same object, so that
            the splits of a dataset can share one index.

    Raises:
        DataError: The file is missing, unreadable or empty, or a row is malformed or repeats an id.
    """
    return _read_corpus(*file_version(path))


def file_version(path: str | Path) -> tuple[str, int, int]:
    """What identifies the contents of a file within a process: absolute path, modification time [ns] and size [bytes].

    Raises:
        DataError: There is no such file.
    """
    file = Path(path).expanduser()
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Looked at {file.absolute()}.") from error
    if file.is_dir():
        raise DataError(f"{path}: is a folder; give a .jsonl or .jsonl.gz file.")
    return str(file.resolve()), status.st_mtime_ns, status.st_size


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number, from 1, and the object of each line of a file of JSON objects; blank lines are skipped.

    Args:
        path: The file, UTF-8, decompressed if it ends in `.gz`.

    Raises:
        DataError: The file cannot be read, or a line is not UTF-8, not JSON or not an object.
    """
    file_version(path)
    opener = gzip.open if str(path).endswith(".gz") else open
    try:
        with opener(Path(path).expanduser(), "rb") as lines:
            for number, line in enumerate(lines, 1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    yield number, _parse_line(line, path, number)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error


def _parse_line(line: bytes, path: str | Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}, line {number}: not UTF-8 at byte {error.start}: {error.reason}.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: invalid JSON: {error}.") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: expected a JSON object, got {json_type(row)}.")
    return row


def json_type(value: Any) -> str:
    """What an error message calls a value that came out of JSON."""
    return "null" if value is None else type(value).__name__


def text_field(row: Mapping[str, Any], field: str, where: str) -> str:
    """A text of a row.

    Args:
        row: The row.
        field: Name of the field.
        where: File and line, for the error.

    Raises:
        DataError: The field is missing, no string, or holds a lone surrogate, which no tokenizer can encode.
    """
    if field not in row:
        raise DataError(f"{where}: no field {field!r}; the row has {', '.join(row) or 'no fields'}.")
    return checked_text(row[field], f"{where}, field {field!r}")


def checked_text(value: Any, where: str) -> str:
    """The value, if it is a string that can be encoded in UTF-8.

    Raises:
        DataError: It is not.
    """
    if not isinstance(value, str):
        raise DataError(f"{where}: expected a string, got {json_type(value)}.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{where}: lone surrogate {value[error.start]!r} at character {error.start}.") from error
    return value


def quoted_contents(title: str, text: str) -> str:
    """A title and a text in the form of the Search-R1 corpora; a line break in the title becomes a blank."""
    return f'"{" ".join(title.split())}"\n{text}'


@lru_cache(maxsize=4)
def _read_corpus(path: str, mtime_ns: int, size: int) -> tuple[Passage, ...]:
    passages = []
    line_of: dict[str, int] = {}
    for number, row in read_jsonl(path):
        where = f"{path}, line {number}"
        passage = _passage(row, where)
        if passage.id in line_of:
            raise DataError(f"{where}: id {passage.id!r} is already the id of line {line_of[passage.id]}.")
        line_of[passage.id] = number
        passages.append(passage)
    if not passages:
        raise DataError(f"{path}: is empty; a corpus needs at least one passage.")
    return tuple(passages)


def _passage(row: dict[str, Any], where: str) -> Passage:
    identifier = text_field(row, "id", where)
    if "contents" in row:
        return Passage(identifier, text_field(row, "contents", where))
    if "text" not in row:
        raise DataError(f"{where}: needs 'contents', or 'title' and 'text'; the row has {', '.join(row)}.")
    return Passage(identifier, quoted_contents(text_field(row, "title", where), text_field(row, "text", where)))
