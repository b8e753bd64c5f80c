"""Reading passages and JSON lines, well-formed and not."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from agentic_rag_env.corpus import read_corpus, read_jsonl, rows
from agentic_rag_env.errors import DataError
from agentic_rag_env.types import Passage


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_rows_with_contents(tmp_path: Path) -> None:
    file = write(tmp_path / "c.jsonl", {"id": "a", "contents": '"A"\nalpha'}, {"id": "b", "contents": "", "more": 1})
    assert read_corpus(file) == (Passage("a", '"A"\nalpha'), Passage("b", ""))


def test_rows_with_title_and_text_get_the_form_of_search_r1(tmp_path: Path) -> None:
    file = write(tmp_path / "c.jsonl", {"id": "a", "title": "Two\nlines", "text": "alpha\nbeta"})
    (passage,) = read_corpus(str(file))
    assert passage.contents == '"Two lines"\nalpha\nbeta'
    assert (passage.title, passage.text) == ('"Two lines"', "alpha\nbeta")


def test_contents_win_over_title_and_text(tmp_path: Path) -> None:
    file = write(tmp_path / "c.jsonl", {"id": "a", "title": "T", "text": "t", "contents": "c"})
    assert read_corpus(file)[0].contents == "c"


def test_gzip_blank_lines_byte_order_mark_and_unicode(tmp_path: Path) -> None:
    text = '\ufeff{"id": "a", "contents": "東京\u2028Köln"}\r\n\n  \n{"id": "b", "contents": "x"}'
    file = tmp_path / "c.jsonl.gz"
    file.write_bytes(gzip.compress(text.encode()))
    assert read_corpus(file) == (Passage("a", "東京\u2028Köln"), Passage("b", "x"))
    assert [number for number, _ in read_jsonl(file)] == [1, 4]


def test_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "c.jsonl", {"id": "a", "contents": "x"})
    assert len(read_corpus("~/c.jsonl")) == 1


def test_a_link_is_read_by_its_own_name(tmp_path: Path) -> None:
    """As in the cache of the Hugging Face hub, where the file itself is called by its hash."""
    (tmp_path / "3f2a").write_bytes(gzip.compress(b'{"id": "a", "contents": "x"}\n'))
    (tmp_path / "c.jsonl.gz").symlink_to("3f2a")
    assert [passage.contents for passage in read_corpus(tmp_path / "c.jsonl.gz")] == ["x"]


def test_unchanged_file_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "c.jsonl", {"id": "a", "contents": "x"})
    first = read_corpus(file)
    monkeypatch.chdir(tmp_path)
    assert read_corpus("c.jsonl") is first
    write(file, {"id": "a", "contents": "y"})
    os.utime(file, ns=(1, 1))
    assert read_corpus(file)[0].contents == "y"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (['{"id": "a"'], "line 1: invalid JSON: "),
        (['{"id": "a", "contents": "x"}', "nonsense"], "line 2: invalid JSON: "),
        (["[" * 100_000], "line 1: invalid JSON: "),
        (["[1]"], "line 1: expected a JSON object, got list."),
        (["null"], "line 1: expected a JSON object, got null."),
        ([{"contents": "x"}], "line 1: no field 'id'; the row has contents."),
        ([{}], "line 1: no field 'id'; the row has no fields."),
        ([{"id": 5.0, "contents": "x"}], "line 1, field 'id': expected an id, a string or an integer, got float."),
        ([{"id": True, "contents": "x"}], "line 1, field 'id': expected an id, a string or an integer, got bool."),
        ([{"id": 5, "contents": "x"}, {"id": "5", "contents": "y"}], "line 2: id '5' is already the id of line 1."),
        ([{"id": "a", "contents": None}], "line 1, field 'contents': expected a string, got null."),
        ([{"id": "a", "contents": ["x"]}], "line 1, field 'contents': expected a string, got list."),
        ([{"id": "a", "title": "T"}], "line 1: needs 'contents', or 'title' and 'text'; the row has id, title."),
        ([{"id": "a", "text": "t"}], "line 1: no field 'title'; the row has id, text."),
        ([{"id": "a", "title": True, "text": "t"}], "line 1, field 'title': expected a string, got bool."),
        (
            [{"id": "a", "contents": "x"}, "", {"id": "a", "contents": "y"}],
            "line 3: id 'a' is already the id of line 1.",
        ),
        (['{"id": "a", "contents": "x\\ud800"}'], "field 'contents': lone surrogate '\\ud800' at character 1."),
        ([], "is empty; a corpus needs at least one passage."),
        (["", " "], "is empty; a corpus needs at least one passage."),
    ],
)
def test_malformed_file_names_the_place(tmp_path: Path, rows: list[Any], message: str) -> None:
    file = write(tmp_path / "corpus.jsonl", *rows)
    with pytest.raises(DataError) as caught:
        read_corpus(file)
    assert str(file) in str(caught.value)
    assert message in str(caught.value)


def test_invalid_utf8(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_bytes(b'{"id": "a", "contents": "x"}\n{"id": "b", "contents": "\xff"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl, line 2: not UTF-8 at byte 25: invalid start byte"):
        read_corpus(file)


def test_missing_file_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        read_corpus("sub/c.jsonl")
    assert str(caught.value) == (
        f"sub/c.jsonl: cannot be read: No such file or directory. Looked at {tmp_path / 'sub' / 'c.jsonl'}."
    )


def test_folder_instead_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is a folder"):
        read_corpus(tmp_path)


@pytest.mark.parametrize(
    "damage", [lambda data: b"plain text", lambda data: data[:-12], lambda data: data[:40] + b"?" * 40]
)
def test_damaged_gzip(tmp_path: Path, damage: Any) -> None:
    rows = "".join(json.dumps({"id": str(i), "contents": str(i**7)}) + "\n" for i in range(100))
    file = tmp_path / "c.jsonl.gz"
    file.write_bytes(damage(gzip.compress(rows.encode())))
    with pytest.raises(DataError, match=r"c\.jsonl\.gz is not a whole gzip file"):
        read_corpus(file)


def _texts(*texts: str) -> pa.Table:
    return pa.table({"id": [str(number) for number in range(len(texts))], "contents": list(texts)})


def _in_lists(texts: pa.Array) -> pa.Table:
    return pa.table({"contents": pa.array([texts], pa.list_(texts.type))})


def _repeated(text: str, times: int) -> pa.Array:
    return pa.DictionaryArray.from_arrays(pa.array([0] * times, pa.int32()), pa.array([text]))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (_texts("a", "x" * 100), "row has more than 99 bytes"),
        (_in_lists(_repeated("x" * 20, 5)), "row has more than 99 bytes"),
        (_in_lists(pa.array([None] * 3000, pa.int8())), r"contents\.list\.element has 3000 values in lists"),
        (_texts("y" * 1000 + "x" * 100_000), "contents unpacks from [0-9]+ to 10[0-9]{4} bytes"),
    ],
)
def test_a_small_parquet_file_that_unpacks_to_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: pa.Table, message: str
) -> None:
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 99)
    monkeypatch.setattr(rows, "_MAX_COLUMN_BYTES", 10_000)
    pyarrow.parquet.write_table(table, tmp_path / "c.parquet", compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match=message):
        list(rows.read_rows(tmp_path / "c.parquet"))


def test_a_text_that_stands_for_many_rows_is_unpacked_for_a_few_at_a_time(tmp_path: Path) -> None:
    repeated = _repeated("x" * 2**20, 20_000)  # 20 GB
    pyarrow.parquet.write_table(pa.table({"id": range(20_000), "contents": repeated}), tmp_path / "c.parquet")
    assert (tmp_path / "c.parquet").stat().st_size < 1_000_000
    tracemalloc.start()
    read = [len(row["contents"]) for _, row in itertools.islice(rows.read_rows(tmp_path / "c.parquet"), 100)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert read == [2**20] * 100
    assert peak < 3 * rows.MAX_LINE_BYTES
