"""The memory-mapped store of passages: what goes in comes out, from every file format, and damage is noticed."""

from __future__ import annotations

import copy
import gzip
import hashlib
import json
import os
import pickle
import tracemalloc
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

import agentic_rag_env  # noqa: F401
from agentic_rag_env.cache_folder import cache_folder, key_of_file
from agentic_rag_env.corpus import (
    CorpusStore,
    Texts,
    check_corpus,
    fingerprint,
    open_corpus,
    read_corpus,
    store,
    write_store,
)
from agentic_rag_env.errors import DataError
from agentic_rag_env.types import Passage

PASSAGES = (
    Passage("a", '"A"\nalpha'),
    Passage("b", ""),
    Passage("ü", "東京\u2028Köln"),
    Passage("d", '"D"\ndelta'),
    Passage("e", "x" * 1000),
)
LINES = "".join(json.dumps({"id": p.id, "contents": p.contents}) + "\n" for p in PASSAGES).encode()


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two passages to a record batch, so that a handful of passages has several."""
    monkeypatch.setattr(store, "_BATCH_PASSAGES", 2)


@pytest.fixture
def opened(tmp_path: Path, small_batches: None) -> CorpusStore:
    return write_store(PASSAGES, tmp_path / "c.arrow")


def test_reads_like_a_sequence(opened: CorpusStore) -> None:
    assert len(opened) == 5
    assert tuple(opened) == PASSAGES
    assert [opened[row] for row in range(5)] == list(PASSAGES)
    assert (opened[-1], opened[-5]) == (PASSAGES[4], PASSAGES[0])
    assert list(opened[1:4]) == list(PASSAGES[1:4])
    assert list(opened[::-2]) == list(PASSAGES[::-2])
    assert opened[[3, 0, 3]] == [PASSAGES[3], PASSAGES[0], PASSAGES[3]]
    assert opened[np.array([4, -1])] == [PASSAGES[4]] * 2
    assert opened[[]] == []
    for index in (5, -6):
        with pytest.raises(IndexError, match=f"passage {index} of a corpus of 5"):
            opened[index]


def test_texts(opened: CorpusStore) -> None:
    texts = Texts(opened)
    assert (len(texts), texts[2], list(texts[:2])) == (5, "東京\u2028Köln", ['"A"\nalpha', ""])
    assert list(texts) == [passage.contents for passage in PASSAGES]


def test_copies_map_the_same_file(opened: CorpusStore) -> None:
    for copied in (pickle.loads(pickle.dumps(opened)), copy.deepcopy(opened)):
        assert (copied.path, tuple(copied)) == (opened.path, PASSAGES)


def test_fingerprint_is_that_of_the_passages(tmp_path: Path, small_batches: None) -> None:
    digest = hashlib.blake2b(digest_size=16)
    for passage in PASSAGES:
        for text in (passage.id.encode(), passage.contents.encode()):
            digest.update(len(text).to_bytes(8, "little"))
            digest.update(text)
    assert write_store(PASSAGES, tmp_path / "c.arrow").fingerprint == fingerprint(PASSAGES) == digest.hexdigest()
    assert fingerprint(PASSAGES[::-1]) != fingerprint(PASSAGES)
    assert fingerprint([Passage("ab", "c")]) != fingerprint([Passage("a", "bc")])


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet", ".arrow", "-stream.arrow"])
def test_every_format_gives_the_same_store(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"c{ending}"
    table = pa.Table.from_pylist([{"id": p.id, "contents": p.contents} for p in PASSAGES])
    if ending == ".jsonl.zst":
        with pa.CompressedOutputStream(str(file), "zstd") as sink:
            sink.write(LINES)
    elif ending.startswith(".jsonl"):
        file.write_bytes(gzip.compress(LINES) if ending.endswith(".gz") else LINES)
    elif ending == ".parquet":
        pyarrow.parquet.write_table(table, file, row_group_size=2)
    else:
        open_writer = pa.ipc.new_stream if "stream" in ending else pa.ipc.new_file
        with open_writer(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    opened = open_corpus(file)
    assert opened.path.is_relative_to(cache_folder())
    assert [item.name for item in tmp_path.iterdir()] == [file.name], "nothing is written beside the file"
    assert tuple(opened) == tuple(read_corpus(file)) == PASSAGES
    assert opened.fingerprint == fingerprint(PASSAGES)


@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_title_and_text_and_integer_ids(tmp_path: Path, ending: str) -> None:
    table = pa.table({"id": [7, 8], "title": ["Two\nlines", "T"], "text": ["alpha", "beta"]})
    if ending == "parquet":
        pyarrow.parquet.write_table(table, tmp_path / "c.parquet")
    else:
        (tmp_path / "c.jsonl").write_text("\n".join(map(json.dumps, table.to_pylist())))
    assert read_corpus(tmp_path / f"c.{ending}") == (Passage("7", '"Two lines"\nalpha'), Passage("8", '"T"\nbeta'))


def test_a_store_is_written_once_and_again_when_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_bytes(LINES)
    first = open_corpus(file)
    written = first.path.stat().st_mtime_ns
    assert open_corpus(file).path.stat().st_mtime_ns == written
    assert open_corpus(first.path).fingerprint == first.fingerprint
    file.write_text('{"id": "z", "contents": "new"}\n')
    os.utime(file, ns=(1, 1))
    assert tuple(open_corpus(file)) == (Passage("z", "new"),)
    assert tuple(first) == PASSAGES, "who has the old file open keeps it"


def test_files_of_equal_contents_share_a_store(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes(LINES)
    assert open_corpus(tmp_path / "a.jsonl").path == open_corpus(tmp_path / "b.jsonl").path


@pytest.mark.parametrize("harm", ["short", "empty", "foreign", "changed", "gone"])
def test_a_kept_store_that_is_not_whole_is_written_again(
    tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "c.jsonl"
    file.write_bytes(LINES)
    kept = open_corpus(file).path
    content = kept.read_bytes()
    place = content.index(b"alpha")
    kept.write_bytes(
        {
            "short": content[:-20],
            "empty": b"",
            "foreign": b"x" * len(content),
            "changed": content[:place] + b"omega" + content[place + 5 :],
            "gone": b"",
        }[harm]
    )
    if harm == "gone":
        kept.unlink()
    assert tuple(open_corpus(file)) == PASSAGES
    assert "is damaged; it is made again" in caplog.text


def test_what_a_killed_writer_left_in_the_cache_is_removed(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_bytes(LINES + b"\n")  # unlike other tests' files, so that it is not kept yet
    parent = cache_folder() / "corpora"
    left, of_another = parent / f".{key_of_file(file)}.left", parent / ".other.left"
    for folder in (left, of_another):
        folder.mkdir(parents=True)
        (folder / "corpus.arrow").write_bytes(b"half")
    assert tuple(open_corpus(file)) == PASSAGES
    assert not left.exists()
    assert of_another.exists(), "its writer may be at work"


def test_without_a_cache_folder_the_error_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "c.jsonl").write_bytes(LINES)
    (tmp_path / "file").touch()
    monkeypatch.setenv("AGENTIC_RAG_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DataError, match="Name another cache folder in AGENTIC_RAG_CACHE, or write the store"):
        open_corpus(tmp_path / "c.jsonl")


def test_a_large_file_is_known_by_blocks_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentic_rag_env.cache_folder._MOST_HASHED", 1000)
    file = tmp_path / "c.jsonl"
    file.write_bytes(LINES * 1000)
    os.utime(file, ns=(1, 1))
    first = key_of_file(file)
    assert key_of_file(file) == first
    file.write_bytes(LINES * 1000 + b"\n")
    os.utime(file, ns=(1, 1))
    assert key_of_file(file) != first


# Checked


def test_a_store_that_was_changed_is_found_when_asked(tmp_path: Path) -> None:
    store = write_store(PASSAGES, tmp_path / "c.arrow").path
    assert check_corpus(store) == (len(PASSAGES), fingerprint(PASSAGES))
    content = store.read_bytes()
    place = content.index(b"alpha")
    for changed, message in (
        (b"omega", "holds other passages than were written"),
        (b"\xff\xfe\xff\xfe\xff", "damaged"),
    ):
        store.write_bytes(content[:place] + changed + content[place + 5 :])
        CorpusStore(store)  # opened at once, and therefore not read
        with pytest.raises(DataError, match=message):
            check_corpus(store)


def test_a_store_that_was_changed_is_written_again(tmp_path: Path) -> None:
    file, store = tmp_path / "c.jsonl", tmp_path / "c.arrow"
    file.write_bytes(LINES)
    content = open_corpus(file, store).path.read_bytes()
    place = content.index(b"alpha")
    store.write_bytes(content[:place] + b"omega" + content[place + 5 :])
    assert tuple(open_corpus(file, store)) == PASSAGES
    assert store.read_bytes() == content
    store.write_bytes(content[:-20])
    with pytest.raises(DataError, match=r"is a damaged store: .* Delete it, and write it again"):
        open_corpus(file, store)
    store.unlink()
    assert tuple(open_corpus(file, store)) == PASSAGES


def test_other_files_are_checked_too(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_bytes(LINES)
    assert check_corpus(file) == (len(PASSAGES), fingerprint(PASSAGES))
    file.write_bytes(LINES + LINES)
    with pytest.raises(DataError, match="is already the id of line 1"):
        check_corpus(file)


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz", ".jsonl.zst"])
def test_a_line_that_would_fill_the_memory_is_refused(tmp_path: Path, ending: str) -> None:
    """One line of 300 MB, in a few hundred kilobytes where it is compressed."""
    file, megabyte = tmp_path / f"c{ending}", b" " * 10**6
    opened = {".jsonl": open, ".jsonl.gz": gzip.open, ".jsonl.zst": lambda name, _: zstd_writer(name)}[ending]
    with opened(str(file), "wb") as out:  # type: ignore[operator]
        out.write(LINES)
        for _ in range(300):
            out.write(megabyte)
    tracemalloc.start()
    with pytest.raises(DataError, match=rf"line {LINES.count(bytes([10])) + 1}: has more than 33554432 bytes"):
        read_corpus(file)
    assert tracemalloc.get_traced_memory()[1] < 150e6
    tracemalloc.stop()


def zstd_writer(name: str) -> Any:
    return pa.CompressedOutputStream(name, "zstd")


def test_read_corpus_leaves_a_store_on_disk(opened: CorpusStore) -> None:
    found = read_corpus(opened.path)
    assert isinstance(found, CorpusStore)
    assert read_corpus(opened.path) is found


OVER_TORCH = pytest.param(
    {"name": "dense", "backend": "torch"}, marks=pytest.mark.skipif(find_spec("torch") is None, reason="needs torch")
)


@pytest.mark.parametrize("retriever", ["bm25", "dense", OVER_TORCH, "static", "hybrid"])
def test_retrievers_take_a_store_for_a_list(opened: CorpusStore, retriever: Any) -> None:
    from agentic_rag_env.registry import RETRIEVERS

    by_store, by_list = (RETRIEVERS.build(retriever, corpus=corpus) for corpus in (opened, PASSAGES))
    assert by_store.search(["delta", "köln alpha"], 2) == by_list.search(["delta", "köln alpha"], 2)


def test_in_the_environment(tmp_path: Path, opened: CorpusStore) -> None:
    (tmp_path / "q.jsonl").write_text('{"question": "q", "golden_answers": "x"}\n')
    dataset = {"name": "jsonl", "questions": str(tmp_path / "q.jsonl"), "corpus": str(opened.path)}
    env = gymnasium.make("AgenticRAG-v0", dataset=dataset)
    env.reset(seed=0)
    assert env.step("<search> delta </search>")[4]["passages"][0].id == "d"


@pytest.mark.parametrize(
    ("passages", "message"),
    [
        ([], "would be empty; a corpus needs at least one passage"),
        ([*PASSAGES, Passage("b", "again")], r"id 'b' would be that of passage 1 and of passage 5 \(from 0\)"),
    ],
)
def test_refused_passages_leave_no_file(tmp_path: Path, passages: list[Passage], message: str) -> None:
    with pytest.raises(DataError, match=message):
        write_store(passages, tmp_path / "c.arrow")
    assert list(tmp_path.iterdir()) == []


def test_ids_with_the_same_hash_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "hash", lambda text: 0, raising=False)
    assert len(write_store(PASSAGES, tmp_path / "c.arrow")) == 5


def test_a_malformed_row_is_named(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_bytes(LINES + b'{"id": "f"}\n')
    with pytest.raises(DataError, match=r"c\.jsonl, line 6: needs 'contents', or 'title' and 'text'"):
        open_corpus(file)
    pyarrow.parquet.write_table(
        pa.table({"id": ["a"], "contents": pa.array([None], pa.string())}), tmp_path / "c.parquet"
    )
    with pytest.raises(DataError, match=r"c\.parquet, row 1, field 'contents': expected a string, got null"):
        open_corpus(tmp_path / "c.parquet")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.jsonl", "c.parquet"]


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda data: b"", lambda data: b"text" * 99])
def test_a_damaged_store(opened: CorpusStore, tmp_path: Path, damage: object) -> None:
    file = tmp_path / "damaged.arrow"
    file.write_bytes(damage(opened.path.read_bytes()))  # type: ignore[operator]
    with pytest.raises(DataError, match=r"damaged\.arrow: is a damaged store"):
        CorpusStore(file)


def test_another_arrow_file_is_no_store(tmp_path: Path) -> None:
    table = pa.table({"id": ["a"], "contents": ["x"]})
    with pa.ipc.new_file(str(tmp_path / "c.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(DataError, match="is no corpus store of format 1"):
        CorpusStore(tmp_path / "c.arrow")


def test_a_damaged_parquet_file(tmp_path: Path) -> None:
    (tmp_path / "c.parquet").write_bytes(b"PAR1nonsense")
    with pytest.raises(DataError, match=r"c\.parquet: cannot be read"):
        read_corpus(tmp_path / "c.parquet")
