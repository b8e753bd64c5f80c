"""Reads the rows of files of passages and questions, mostly JSON lines; its errors name the place."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from agentic_rag_env.errors import DataError
from agentic_rag_env.files import lines_of
from agentic_rag_env.types import Passage

#: Most bytes of a line. A longer line is no passage, and even a small compressed file can hold one that fills memory.
MAX_LINE_BYTES = 2**25
#: Most rows of a Parquet or Arrow file that are Python objects at the same time; `MAX_LINE_BYTES` bounds them as well.
_BATCH_ROWS = 4096
#: A Parquet column that unpacks to more than this, and to more than so many times its size in the file, is no text.
_MAX_COLUMN_BYTES, _MAX_RATIO = 2**28, 200


def passages_in(path: str | Path) -> Iterator[tuple[str, Passage]]:
    """Yield the place (file and line or row, for errors) and the passage of each row of a corpus file.

    A row has `id` and `contents` (title on the first line, text after it), or `id`, `title` and `text`. In the second
    case the contents are the title in literal double quotes, a line break and the text. An `id` that is an integer
    becomes text. Other fields are ignored.

    Args:
        path: A file that `read_rows` reads.

    Raises:
        DataError: The file is missing or unreadable, or a row is malformed.
    """
    for where, row in read_rows(path):
        identifier = text_field(row, "id", where, checked_id)
        if "contents" in row:
            yield where, Passage(identifier, text_field(row, "contents", where))
            continue
        if "text" not in row:
            raise DataError(f"{where}: needs 'contents', or 'title' and 'text'; the row has {', '.join(row)}.")
        contents = quoted_contents(text_field(row, "title", where), text_field(row, "text", where))
        yield where, Passage(identifier, contents)


def read_rows(path: str | Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place and the content of each row of a file of JSON lines, Parquet or Arrow.

    Args:
        path: A file that ends in `.parquet`, or in `.arrow` (the file or the stream format). Any other file is read as
            JSON lines, see `read_jsonl`.

    Raises:
        DataError: The file is missing or unreadable, or a line is malformed.
    """
    if not str(path).endswith((".parquet", ".arrow")):
        yield from ((f"{path}, line {number}", row) for number, row in read_jsonl(path))
        return
    import pyarrow as pa

    file_version(path)
    try:
        number = 0
        for batch in _batches(Path(path).expanduser()):
            for row in _rows(batch, path):
                number += 1
                yield f"{path}, row {number}", row
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error


def file_version(path: str | Path) -> tuple[str, int, int]:
    """What identifies a file's contents within a process: its absolute path, modification time [ns] and size [bytes].

    Raises:
        DataError: There is no such file.
    """
    file = Path(path).expanduser()
    try:
        status = file.stat()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}. Looked at {file.absolute()}.") from error
    if file.is_dir():
        raise DataError(f"{path}: is a folder; give a .jsonl, .jsonl.gz, .jsonl.zst, .parquet or .arrow file.")
    # Links are not followed: in the hub's cache only the link has the ending that tells the format.
    return str(file.absolute()), status.st_mtime_ns, status.st_size


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the line number, from 1, and the object of each line of a file of JSON objects; blank lines are skipped.

    Args:
        path: A file that `agentic_rag_env.files.lines_of` reads.

    Raises:
        DataError: The file cannot be read, or a line is too long, not UTF-8, not JSON or not an object.
    """
    file_version(path)
    try:
        for number, line in enumerate(lines_of(Path(path).expanduser(), MAX_LINE_BYTES), 1):
            if line.strip():
                yield number, _parse_line(line, path, number)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error}.") from error


def _parse_line(line: str, path: str | Path, number: int) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}, line {number}: invalid JSON: {error}.") from error
    if not isinstance(row, dict):
        raise DataError(f"{path}, line {number}: expected a JSON object, got {json_type(row)}.")
    return row


def json_type(value: Any) -> str:
    """The word for the type of a JSON value in an error message."""
    return "null" if value is None else type(value).__name__


def text_field(row: Mapping[str, Any], field: str, where: str, checked: Callable[[Any, str], str] | None = None) -> str:
    """The text in a field of a row.

    Args:
        row: The row.
        field: Name of the field.
        where: File and line, for the error.
        checked: Makes the text of the value and its place; None: `checked_text`.

    Raises:
        DataError: The field is missing, is no string, or holds a lone surrogate, which no tokenizer can encode.
    """
    if field not in row:
        raise DataError(f"{where}: no field {field!r}; the row has {', '.join(row) or 'no fields'}.")
    return (checked or checked_text)(row[field], f"{where}, field {field!r}")


def checked_id(value: Any, where: str) -> str:
    """The text of an id, which may be given as an integer: tables often number their rows.

    Raises:
        DataError: It is neither a string that can be encoded in UTF-8 nor an integer.
    """
    if isinstance(value, str):
        return checked_text(value, where)
    if not isinstance(value, int) or isinstance(value, bool):
        raise DataError(f"{where}: expected an id, a string or an integer, got {json_type(value)}.")
    return str(value)


def checked_text(value: Any, where: str) -> str:
    """The value, if it is a string that can be encoded in UTF-8.

    Raises:
        DataError: It is no such string.
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


def _batches(file: Path) -> Iterator[Any]:
    """The record batches of a Parquet or Arrow file, of bounded size."""
    import pyarrow as pa
    import pyarrow.parquet

    if file.suffix == ".parquet":
        texts = _require_no_bomb(file)
        # Texts stay dictionaries as they are in the file: one text may stand for a million rows.
        with pyarrow.parquet.ParquetFile(file, read_dictionary=texts) as parquet:
            yield from parquet.iter_batches(_BATCH_ROWS)
        return
    with pa.memory_map(str(file)) as source:
        batches: Any = None
        with contextlib.suppress(pa.ArrowInvalid):
            reader = pa.ipc.open_file(source)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        for batch in batches or pa.ipc.open_stream(source):
            for first in range(0, len(batch), _BATCH_ROWS):
                yield batch.slice(first, _BATCH_ROWS)


def _require_no_bomb(file: Path) -> list[str]:
    """Look at the sizes that a Parquet file declares before anything is unpacked; return its columns of texts."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as parquet:
        described = parquet.metadata
    for group in map(described.row_group, range(described.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            unpacked, packed = column.total_uncompressed_size, column.total_compressed_size
            if unpacked > _MAX_COLUMN_BYTES and unpacked > _MAX_RATIO * packed:
                raise DataError(
                    f"{file}: the column {column.path_in_schema} unpacks from {packed} to {unpacked} bytes; no column "
                    f"of texts is packed more than {_MAX_RATIO} times."
                )
            if column.num_values > 1000 * group.num_rows + _MAX_COLUMN_BYTES // 8:
                raise DataError(f"{file}: the column {column.path_in_schema} has {column.num_values} values in lists.")
    columns = map(described.schema.column, range(len(described.schema)))
    return [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]


def _rows(batch: Any, path: str | Path) -> Iterator[dict[str, Any]]:
    """The rows of a batch as Python objects; a batch that would become too large is divided first.

    Raises:
        DataError: One row alone has more bytes than a line of JSON may have.
    """
    size = sum(map(_size, batch.columns))
    if size <= MAX_LINE_BYTES:
        yield from batch.to_pylist()
        return
    if len(batch) == 1:
        raise DataError(f"{path}: a row has more than {MAX_LINE_BYTES} bytes.")
    half = len(batch) // 2
    yield from _rows(batch.slice(0, half), path)
    yield from _rows(batch.slice(half), path)


def _size(column: Any) -> int:
    """Bytes that an Arrow array takes once each of its values stands by itself."""
    import pyarrow as pa
    import pyarrow.compute

    kind = column.type
    if pa.types.is_dictionary(kind) and _has_lengths(kind.value_type):
        lengths = pa.compute.binary_length(column.dictionary)
        return 8 * len(column) + (pa.compute.sum(lengths.cast("int64").take(column.indices)).as_py() or 0)
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return 8 * len(column) + _size(column.flatten())
    if pa.types.is_struct(kind):
        return 8 * len(column) + sum(map(_size, column.flatten()))
    if _has_lengths(kind):
        return 8 * len(column) + (pa.compute.sum(pa.compute.binary_length(column).cast("int64")).as_py() or 0)
    # Of any other kind the worst is assumed: a dictionary or a run may stand for all of it in every row.
    shared = pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind)
    return len(column) * column.nbytes if shared else 8 * len(column) + column.nbytes


def _has_lengths(kind: Any) -> bool:
    import pyarrow as pa

    return any(test(kind) for test in (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary,
                                       pa.types.is_large_binary))  # fmt: skip
