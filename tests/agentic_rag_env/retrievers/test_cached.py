"""The cache gives exactly what the retriever gives, once searched for, whatever happens to the processes that write."""

from __future__ import annotations

import copy
import importlib
import json
import linecache
import os
import pickle
import random
import signal
import sqlite3
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.env import AgenticRAGEnv
from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import Retriever, stats_of
from agentic_rag_env.retrievers.bm25 import BM25Config, BM25Retriever
from agentic_rag_env.retrievers.cached import CachedConfig, CachedRetriever
from agentic_rag_env.types import Found, Passage

QUERIES = ["capital of France", "Seine", "", "xyzzy", "Paris", "日本 \U0001f600", "Seine"]
#: Floats whose decimal digits are easily cut off.
SCORES = (0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0)


class Counting:
    """Finds passages made of the query, and notes every query."""

    fingerprint = "counting"

    def __init__(self, fails: Sequence[str] = ()) -> None:
        self.asked: list[tuple[str, int]] = []
        self.fails = fails

    def search(self, queries: Sequence[str], top_k: int) -> list[Found]:
        self.asked += [(query, top_k) for query in queries]
        return [
            RetrieverError(f"no {query}") if query in self.fails else list(result_of(query)[:top_k])
            for query in queries
        ]


def result_of(query: str) -> tuple[Passage, ...]:
    return tuple(Passage(f"{query}-{score}", f'"Title"\n{query}\ud800\x00 é', score) for score in SCORES)


def cached(retriever: Any, path: Path | None = None, **settings: Any) -> CachedRetriever:
    return CachedRetriever(CachedConfig(retriever, None if path is None else str(path), **settings))


def bits(found: Sequence[Any]) -> list[Any]:
    """Results with scores to the last bit, and with their order."""
    return [[(passage.id, passage.contents, float(passage.score).hex()) for passage in each] for each in found]


# --- the same results, searched once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("on_disk", [False, True])
def test_cached_equals_uncached(world: QuestionSet, tmp_path: Path, on_disk: bool) -> None:
    path = tmp_path / "new folder" / "cache.sqlite" if on_disk else None
    spec = {"name": "cached", "retriever": {"name": "bm25", "k1": 1.1}, "path": path and str(path)}
    retriever = RETRIEVERS.build(spec, corpus=world.corpus)
    plain = BM25Retriever(BM25Config(k1=1.1), world.corpus)
    assert isinstance(retriever, Retriever)
    for top_k in (1, 3):
        expected = bits(plain.search(QUERIES, top_k))
        assert bits(retriever.search(QUERIES, top_k)) == expected
        assert bits(retriever.search(QUERIES, top_k)) == expected
        assert [bits(retriever.search([query], top_k))[0] for query in QUERIES] == expected
    if on_disk:
        again = RETRIEVERS.build(spec, corpus=world.corpus)
        assert bits(again.search(QUERIES, 3)) == bits(plain.search(QUERIES, 3))
        assert again.stats() == {"cache_hits": len(QUERIES), "cache_misses": 0}


@pytest.mark.parametrize("max_in_memory", [0, 2, 100])
def test_every_bit_survives_the_disk(tmp_path: Path, max_in_memory: int) -> None:
    queries = ["a", "b", "lone \ud800", "c"]
    expected = bits([result_of(query) for query in queries])
    assert bits(cached(Counting(), tmp_path / "c").search(queries, 5)) == expected
    second = Counting()
    assert bits(cached(second, tmp_path / "c", max_in_memory=max_in_memory).search(queries, 5)) == expected
    assert second.asked == []


def test_each_query_is_searched_once_for_each_top_k() -> None:
    inner = Counting()
    retriever = cached(inner)
    retriever.search(["a", "b", "a"], 2)
    retriever.search(["b", "c"], 2)
    retriever.search(["a"], 1)
    assert inner.asked == [("a", 2), ("b", 2), ("c", 2), ("a", 1)]
    assert retriever.stats() == {"cache_hits": 2, "cache_misses": 4}


def test_no_two_queries_share_a_result() -> None:
    inner = Counting()
    queries = ["Seine", "seine", " Seine", "Seine ", "Se ine", "Se\u0301ine", "Séine"]
    assert bits(cached(inner).search(queries, 5)) == bits([result_of(query) for query in queries])
    assert len(inner.asked) == len(queries)


def test_a_result_that_the_caller_changes_stays_right() -> None:
    retriever = cached(Counting())
    retriever.search(["a"], 5)[0].clear()  # type: ignore[union-attr]
    assert bits(retriever.search(["a"], 5)) == bits([result_of("a")])


def test_memory_keeps_what_was_used_last() -> None:
    inner = Counting()
    retriever = cached(inner, max_in_memory=2)
    for query in ("a", "b", "a", "c", "a", "b"):  # c displaces b, then b displaces c
        retriever.search([query], 1)
    assert [query for query, _ in inner.asked] == ["a", "b", "c", "b"]


def test_failures_are_not_kept() -> None:
    inner = Counting(fails=["b"])
    retriever = cached(inner)
    good, bad = retriever.search(["a", "b"], 5)
    assert bits([good]) == bits([result_of("a")])
    assert isinstance(bad, RetrieverError)
    inner.fails = []
    assert bits(retriever.search(["a", "b"], 5)) == bits([result_of("a"), result_of("b")])
    assert [query for query, _ in inner.asked] == ["a", "b", "b"]


def test_one_query_is_no_list_and_top_k_is_positive() -> None:
    with pytest.raises(ConfigurationError, match="got one string"):
        cached(Counting()).search("abc", 3)
    with pytest.raises(ConfigurationError, match="top_k must be an integer of at least 1"):
        cached(Counting()).search(["a"], 0)
    assert cached(Counting()).search([], 3) == []


# --- identity --------------------------------------------------------------------------------------------------------


def build(path: Path, corpus: Any, retriever: Any = "bm25", **settings: Any) -> CachedRetriever:
    return RETRIEVERS.build(
        {"name": "cached", "retriever": retriever, "path": str(path), **settings}, corpus=tuple(corpus)
    )


def test_equal_settings_are_the_same_retriever_however_written(world: QuestionSet, tmp_path: Path) -> None:
    fingerprints = {
        build(tmp_path / "c", world.corpus, spec).fingerprint
        for spec in ("bm25", {"name": "bm25"}, {"name": "bm25", "b": 0.4, "k1": 0.9})
    }
    assert len(fingerprints) == 1


def test_another_corpus_or_setting_has_its_own_results(world: QuestionSet, tmp_path: Path) -> None:
    corpus = list(world.corpus)
    changed = [*corpus[:-1], Passage("5", '"Berlin"\nBerlin lies on the Seine.')]
    variants: list[tuple[Any, Any]] = [
        (corpus, "bm25"),
        (changed, "bm25"),
        (corpus[::-1], "bm25"),
        (corpus[:-1], "bm25"),
        (corpus, {"name": "bm25", "k1": 2.0}),
        (corpus, "static"),
    ]
    for searched, spec in variants:
        plain = RETRIEVERS.build(spec, corpus=searched)
        retriever = build(tmp_path / "c", searched, spec)
        assert bits(retriever.search(["Seine Berlin"], 5)) == bits(plain.search(["Seine Berlin"], 5))
        assert retriever.stats()["cache_misses"] == 1


def test_a_corpus_may_bring_its_fingerprint(world: QuestionSet, tmp_path: Path) -> None:
    class Stored(tuple):
        fingerprint = "sha256:abc"

    stored = RETRIEVERS.build({"name": "cached", "retriever": "static"}, corpus=Stored(world.corpus))
    assert "corpus=sha256:abc" in stored.fingerprint


@pytest.mark.parametrize("retriever", [{"name": "static", "passages": [Passage("1", "x")]}, "bm25"])
def test_settings_of_plain_data_have_an_identity(world: QuestionSet, tmp_path: Path, retriever: Any) -> None:
    assert build(tmp_path / "c", world.corpus, retriever).fingerprint


def test_a_plug_in_whose_code_changed_is_searched_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the recipe of the README, without a fingerprint of its own; its code is a part of what it is."""
    code = """
from dataclasses import make_dataclass
from agentic_rag_env import RETRIEVERS
@RETRIEVERS.register("of_a_plug_in", make_dataclass("Config", []))
def make(config, corpus):
    return type("Found", (), {"search": lambda self, queries, top_k: [[corpus[%d]] for query in queries]})()
"""
    corpus, found = (Passage("1", "first"), Passage("2", "second")), []
    monkeypatch.syspath_prepend(tmp_path)
    for place in (0, 1, 1):
        (tmp_path / "of_a_plug_in.py").write_text(code % place)
        linecache.clearcache()
        sys.modules.pop("of_a_plug_in", None)
        importlib.invalidate_caches()
        monkeypatch.setattr(RETRIEVERS, "_entries", {**RETRIEVERS._entries})
        RETRIEVERS._entries.pop("of_a_plug_in", None)
        monkeypatch.setattr(sys, "dont_write_bytecode", True)
        importlib.import_module("of_a_plug_in")
        retriever = build(tmp_path / "c", corpus, "of_a_plug_in")
        (result,) = retriever.search(["x"], 1)
        found.append((result[0].id, retriever.stats()["cache_hits"]))
    assert found == [("1", 0), ("2", 0), ("2", 1)]


def test_without_identity_nothing_is_cached(world: QuestionSet) -> None:
    plain = BM25Retriever(BM25Config(), world.corpus)
    plain_without = type("Nameless", (), {"search": staticmethod(plain.search)})()
    with pytest.raises(ConfigurationError, match=r"Nameless has no identity .* fingerprint=<name>"):
        cached(plain_without)
    unnameable = {"name": "static", "passages": (Passage(id, "x") for id in "ab")}
    with pytest.raises(ConfigurationError, match="no plain data"):
        RETRIEVERS.build({"name": "cached", "retriever": unnameable}, corpus=world.corpus)
    unsure = Counting()
    unsure.fingerprint = None  # type: ignore[assignment]
    with pytest.raises(ConfigurationError, match="a part of it cannot tell what it is"):
        cached(unsure)
    named = cached(plain_without, fingerprint="mine")
    assert bits(named.search(QUERIES, 3)) == bits(plain.search(QUERIES, 3))


def test_what_is_wrapped_must_be_a_retriever() -> None:
    with pytest.raises(ConfigurationError, match="cached needs a retriever"):
        cached(5)


# --- offline ---------------------------------------------------------------------------------------------------------


def test_a_run_is_replayed_without_the_retriever(tmp_path: Path) -> None:
    online = cached(Counting(), tmp_path / "c").search(["a", "b"], 3)
    inner = Counting()
    offline = cached(inner, tmp_path / "c", offline=True)
    assert bits(offline.search(["b", "a"], 3)) == bits(online[::-1])
    known, unknown = offline.search(["a", "never asked"], 3)
    assert bits([known]) == bits(online[:1]), "one query that is lacking does not cost the others their results"
    assert isinstance(unknown, RetrieverError)
    assert "holds no result for the query 'never asked' with top_k=3" in str(unknown)
    assert "top_k=2" in str(offline.search(["a"], 2)[0])
    assert inner.asked == []


def test_an_episode_is_replayed(world: QuestionSet, tmp_path: Path) -> None:
    def transcript(**settings: Any) -> list[Any]:
        env = AgenticRAGEnv(world, {"name": "cached", "path": str(tmp_path / "c"), **settings})
        env.reset(options={"question_index": 1})
        return [env.step("<search> Seine </search>"), env.step("<answer> Seine </answer>")]

    assert transcript() == transcript(offline=True)


def test_offline_with_a_fingerprint_builds_nothing(tmp_path: Path) -> None:
    service = {"name": "http", "url": "http://127.0.0.1:9"}
    cached(Counting(), tmp_path / "c", fingerprint="wiki").search(["a"], 3)
    offline = cached(service, tmp_path / "c", fingerprint="wiki", offline=True)
    assert bits(offline.search(["a"], 3)) == bits([result_of("a")[:3]])


def test_offline_names_what_the_file_holds(tmp_path: Path) -> None:
    cached(Counting(), tmp_path / "c", fingerprint="wiki").search(["a"], 3)
    with pytest.raises(ConfigurationError, match="no results of the retriever 'counting'; it has those of 'wiki'"):
        cached(Counting(), tmp_path / "c", offline=True)


def test_offline_needs_the_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="set path"):
        cached(Counting(), offline=True)
    with pytest.raises(ConfigurationError, match="does not exist"):
        cached(Counting(), tmp_path / "none", offline=True)
    assert list(tmp_path.iterdir()) == []


def files_in(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("folder_too", [False, True])
def test_a_run_is_replayed_from_files_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder_too: bool
) -> None:
    """The user of the tests may be root, who can write every file. So the statements are read, too."""
    online = cached(Counting(), tmp_path / "a c?")
    expected = online.search(["a"], 3)
    online.close()
    before = files_in(tmp_path)
    assert list(before) == ["a c?"]
    (tmp_path / "a c?").chmod(0o444)
    access = os.access
    if folder_too:
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK and access(path, mode))
        tmp_path.chmod(0o555)
    said: list[str] = []
    connect = sqlite3.connect

    def watched(*arguments: Any, **settings: Any) -> sqlite3.Connection:
        connection = connect(*arguments, **settings)
        connection.set_trace_callback(said.append)
        return connection

    monkeypatch.setattr(sqlite3, "connect", watched)
    offline = cached(Counting(), tmp_path / "a c?", offline=True)
    assert bits(offline.search(["a"], 3)) == bits(expected)
    assert isinstance(offline.search(["b"], 3)[0], RetrieverError)
    assert {statement.split()[0] for statement in said} == {"PRAGMA", "SELECT"}
    assert bits(pickle.loads(pickle.dumps(offline)).search(["a"], 3)) == bits(expected)
    if folder_too:
        assert files_in(tmp_path) == before, "nothing lies beside the file"
    tmp_path.chmod(0o755)


def test_newest_entries_are_replayed_while_they_are_in_the_log(tmp_path: Path) -> None:
    online = cached(Counting(), tmp_path / "c")
    online.search(["a"], 3)
    assert (tmp_path / "c-wal").exists()
    assert bits(cached(Counting(), tmp_path / "c", offline=True).search(["a"], 3)) == bits([result_of("a")[:3]])
    online.close()


def of_something_else(folder: Path) -> tuple[Path, Path]:
    """A file that is no database, and a database that is no cache."""
    text, other = folder / "text", folder / "other"
    text.write_text("no database " * 100)
    with sqlite3.connect(other) as file:
        file.execute("CREATE TABLE precious (x)")
    file.close()
    return text, other


def test_offline_reads_no_file_of_something_else(tmp_path: Path) -> None:
    for path in of_something_else(tmp_path):
        with pytest.raises(ConfigurationError, match="is no cache of this version"):
            cached(Counting(), path, offline=True)


# --- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", [b"", b"x", b"[]", None, "text"])
def test_a_damaged_entry_is_searched_again(tmp_path: Path, damage: Any) -> None:
    cached(Counting(), tmp_path / "c").search(["a", "b"], 3)
    with sqlite3.connect(tmp_path / "c") as file:
        for key, value in file.execute("SELECT key, value FROM results").fetchall():
            changed = damage if damage is not None else value[:-3] + b"9]]"
            file.execute("UPDATE results SET value = ? WHERE key = ?", (changed, key))
    file.close()
    inner = Counting()
    assert bits(cached(inner, tmp_path / "c").search(["a"], 3)) == bits([result_of("a")[:3]])
    assert inner.asked == [("a", 3)]
    assert bits(cached(Counting(), tmp_path / "c", offline=True).search(["a"], 3)) == bits([result_of("a")[:3]])


def test_a_result_under_another_key_is_not_believed(tmp_path: Path) -> None:
    cached(Counting(), tmp_path / "c").search(["a", "b"], 3)
    with sqlite3.connect(tmp_path / "c") as file:
        (_, value), (second, _) = file.execute("SELECT key, value FROM results").fetchall()
        file.execute("UPDATE results SET value = ? WHERE key = ?", (value, second))
    file.close()
    assert bits(cached(Counting(), tmp_path / "c").search(["a", "b"], 3)) == bits(
        [result_of("a")[:3], result_of("b")[:3]]
    )


def test_files_of_something_else(tmp_path: Path) -> None:
    for path in of_something_else(tmp_path):
        before = path.read_bytes()
        with pytest.raises(ConfigurationError, match="is no cache of this version"):
            cached(Counting(), path)
        assert path.read_bytes() == before
    with pytest.raises(RetrieverError, match="cannot be used"):
        cached(Counting(), tmp_path)


def test_settings_out_of_range() -> None:
    with pytest.raises(ConfigurationError, match="max_in_memory must be at least 0, got -1"):
        cached(Counting(), max_in_memory=-1)
    with pytest.raises(ConfigurationError, match=r"fingerprint must be a text .*, or None, got 2018"):
        cached(Counting(), fingerprint=2018)
    with pytest.raises(ConfigurationError, match="path must be the path of a file or folder, or None, got 2018"):
        RETRIEVERS.build({"name": "cached", "path": 2018}, corpus=())


# --- processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
def test_a_copy_shares_the_file(tmp_path: Path, copier: Any) -> None:
    original = cached(Counting(), tmp_path / "c")
    original.search(["a"], 3)
    assert bits(copier(original).search(["a"], 3)) == bits([result_of("a")[:3]])
    assert copier(original).stats()["cache_misses"] == 1


def test_closing_is_not_the_end(tmp_path: Path) -> None:
    retriever = cached(Counting(), tmp_path / "c", max_in_memory=0)
    retriever.search(["a"], 3)
    retriever.close()
    assert bits(retriever.search(["a"], 3)) == bits([result_of("a")[:3]])


class Long:
    """Results that fill many pages of the file, known in advance for every query."""

    fingerprint = "long"

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        return [long_result(query) for query in queries]


def long_result(query: str) -> list[Passage]:
    return [Passage(f"{query}-{rank}", f"{query} " * 700 * (rank + 1), 1 / (rank + 3)) for rank in range(3)]


def fork(work: Callable[[], None]) -> int:
    """A child that works and ends with 0, or with 1 after an exception."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        work()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def write_forever(path: Path, seed: int) -> None:
    rng = random.Random(seed)
    retriever = cached(Long(), path, max_in_memory=0)
    while True:
        queries = [f"query {rng.randrange(300)}" for _ in range(rng.randrange(1, 9))]
        assert retriever.search(queries, 3) == [long_result(query) for query in queries]


def kill_writers(path: Path, kills: int, num_writers: int) -> None:
    rng = random.Random(0)
    writers: list[int] = []
    cached(Long(), path).close()
    try:
        for number in range(kills):
            while len(writers) < num_writers:
                seed = number * num_writers + len(writers)
                writers.append(fork(lambda seed=seed: write_forever(path, seed)))  # type: ignore[misc]
            time.sleep(rng.random() * 0.05)
            victim = writers.pop(rng.randrange(len(writers)))
            os.kill(victim, signal.SIGKILL)
            _, status = os.waitpid(victim, 0)
            assert os.WIFSIGNALED(status), f"a writer failed by itself with status {status}"
            check_entries(path, [f"query {rng.randrange(300)}" for _ in range(20)])
    finally:
        for writer in writers:
            os.kill(writer, signal.SIGKILL)
            os.waitpid(writer, 0)
    assert check_entries(path, [f"query {number}" for number in range(300)]) > 30


def check_entries(path: Path, queries: Sequence[str]) -> int:
    """How many of the queries the file holds; each of them must be right."""
    reader = cached(Long(), path, offline=True, max_in_memory=0)
    held = 0
    for query in queries:
        (found,) = reader.search([query], 3)
        if isinstance(found, RetrieverError):
            assert "holds no result" in str(found)
        else:
            held += 1
            assert found == long_result(query)
    reader.close()
    return held


def check_file(path: Path) -> None:
    """Without our code: the file is sound, and every row in it is the whole result of one query."""
    file = sqlite3.connect(path)
    assert file.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    rows = [json.loads(value[16:]) for (value,) in file.execute("SELECT value FROM results")]
    file.close()
    for row in rows:
        query = row[0][0].rpartition("-")[0]
        assert [Passage(*item) for item in row] == long_result(query)


def test_killed_writers_leave_no_wrong_entry(tmp_path: Path) -> None:
    kill_writers(tmp_path / "c", kills=25, num_writers=3)
    check_file(tmp_path / "c")


@pytest.mark.nightly
def test_many_killed_writers_leave_no_wrong_entry(tmp_path: Path) -> None:
    kill_writers(tmp_path / "c", kills=1000, num_writers=4)
    check_file(tmp_path / "c")


def test_processes_that_start_together_share_a_new_file(tmp_path: Path) -> None:
    for attempt in range(5):
        path = tmp_path / f"c{attempt}"

        def work(path: Path = path) -> None:
            cached(Long(), path).search(["a", "b"], 3)

        statuses = [os.waitpid(child, 0)[1] for child in [fork(work) for _ in range(6)]]
        assert statuses == [0] * 6
        assert check_entries(path, ["a", "b"]) == 2


def test_a_child_does_not_use_the_connection_of_its_parent(tmp_path: Path) -> None:
    retriever = cached(Long(), tmp_path / "c", max_in_memory=0)
    retriever.search(["a"], 3)

    def work() -> None:
        assert retriever.search(["a", "b"], 3) == [long_result("a"), long_result("b")]

    assert os.waitpid(fork(work), 0)[1] == 0
    assert retriever.search(["b", "c"], 3) == [long_result("b"), long_result("c")]
    assert stats_of(retriever) == {"cache_hits": 1, "cache_misses": 2}
