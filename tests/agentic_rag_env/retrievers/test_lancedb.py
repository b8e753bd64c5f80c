"""Search in LanceDB tables. What every retriever promises is tested in `test_retrievers.py`."""

from __future__ import annotations

import multiprocessing
import os
import uuid
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("lancedb")

import agentic_rag_env  # noqa: F401
from agentic_rag_env.errors import ConfigurationError, DataError, RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.vectors.lance_tables import connect
from agentic_rag_env.types import Passage

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven"]
RNG = np.random.default_rng(0)
CORPUS = [Passage(f"p{row}", " ".join(RNG.choice(WORDS, RNG.integers(1, 12)))) for row in range(300)]
QUERIES = ["amber cedar", "fjord", "haven grove delta birch ember", "amber amber fjord", "zebra", "", "amber cedar"]


def lance(place: Path | str | None, corpus: Any = CORPUS, **settings: Any) -> Any:
    uri = None if place is None else str(place)
    return RETRIEVERS.build({"name": "lancedb", "uri": uri, **settings}, corpus=corpus)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lance")
    lance(folder)
    return folder


@pytest.mark.parametrize("top_k", [1, 5, 300, 1000])
def test_exact_search_ranks_like_dense(place: Path, top_k: int) -> None:
    expected = RETRIEVERS.build("dense", corpus=CORPUS).search(QUERIES, top_k)
    assert lance(place).search(QUERIES, top_k) == expected


def bm25(text: str, query: str, texts: Sequence[str], k1: float = 1.2, b: float = 0.75) -> float:
    """Okapi's sum over words of ln(1 + (N - df + 1/2) / (df + 1/2)) tf (k1 + 1) / (tf + k1 (1 - b + b l / avg l))."""
    documents = [other.split() for other in texts]
    average, words = sum(map(len, documents)) / len(documents), text.split()
    score = 0.0
    for word in set(query.split()):
        frequency, count = sum(word in other for other in documents), words.count(word)
        idf = np.log(1 + (len(texts) - frequency + 0.5) / (frequency + 0.5))
        score += idf * count * (k1 + 1) / (count + k1 * (1 - b + b * len(words) / average))
    return score


@pytest.mark.parametrize("query", ["amber cedar", "fjord", "haven grove delta"])
def test_words_are_scored_by_bm25(tmp_path: Path, query: str) -> None:
    texts = [passage.contents for passage in CORPUS]
    (found,) = lance(tmp_path, language=None, search="text").search([query], 10)
    scores = [bm25(text, query, texts) for text in texts]
    best = sorted(range(len(texts)), key=lambda row: (-round(scores[row], 4), row))[:10]
    assert [passage.id for passage in found] == [f"p{row}" for row in best]
    for passage in found:
        assert passage.score == pytest.approx(scores[int(passage.id[1:])], rel=1e-4)


def test_stems_and_stop_words(tmp_path: Path) -> None:
    corpus = [Passage("a", "The runner is running"), Passage("b", "a library of ponies")]
    found = lance(tmp_path / "en", corpus, search="text").search(["run", "PONY", "the", "running"], 3)
    assert [[passage.id for passage in passages] for passages in found] == [["a"], ["b"], [], ["a"]]
    plain = lance(tmp_path / "plain", corpus, search="text", language=None).search(["run", "the"], 3)
    assert [[passage.id for passage in passages] for passages in plain] == [[], ["a"]]


def test_hybrid_fuses_both_by_ranks(place: Path) -> None:
    dense, text = (lance(place, search=search).search(["amber cedar"], 100)[0] for search in ("dense", "text"))
    sums: dict[str, float] = {}
    for found in (dense, text):
        for rank, passage in enumerate(found, 1):
            sums[passage.id] = sums.get(passage.id, 0.0) + 1 / (60 + rank)
    (fused,) = lance(place, search="hybrid").search(["amber cedar"], 5)
    assert [passage.score for passage in fused] == pytest.approx(sorted(sums.values(), reverse=True)[:5])
    assert all(passage.score == pytest.approx(sums[passage.id]) for passage in fused)


def test_ties_follow_the_corpus_however_many_there_are(tmp_path: Path) -> None:
    corpus = [Passage(f"p{row}", "amber") for row in range(200)]
    for search in ("dense", "text"):
        (found,) = lance(tmp_path / search, corpus, search=search).search(["amber"], 3)
        assert [passage.id for passage in found] == ["p0", "p1", "p2"]


@pytest.mark.parametrize(
    ("index", "kind"), [("IVF_FLAT", "IvfFlat"), ("IVF_PQ", "IvfPq"), ("IVF_HNSW_SQ", "IvfHnswSq")]
)
def test_an_index_with_all_lists_finds_nearly_all(tmp_path: Path, index: str, kind: str) -> None:
    exact = lance(tmp_path / "exact").search(QUERIES[:4], 3)
    retriever = lance(tmp_path / "index", index=index, nprobes=1000)
    assert {found.index_type for found in retriever._table.list_indices()} == {"FTS", kind}
    found = retriever.search(QUERIES[:4], 3)
    shared = [len({p.id for p in a} & {p.id for p in b}) for a, b in zip(exact, found, strict=True)]
    assert sum(shared) >= 6  # a rounding index over 300 texts of eight words loses some


def test_a_table_opens_without_its_corpus_and_knows_its_encoder(tmp_path: Path) -> None:
    made = lance(tmp_path, encoder={"name": "hashed_ngram", "dim": 64})
    opened = lance(tmp_path, corpus=None)
    assert opened.search(QUERIES, 5) == made.search(QUERIES, 5)
    assert opened.fingerprint == made.fingerprint != lance(tmp_path, corpus=None, search="text").fingerprint
    with pytest.raises(DataError, match=r"was made with the encoder .*'dim': 64"):
        lance(tmp_path, corpus=None, encoder="hashed_ngram")
    with pytest.raises(DataError, match=r"was made of the corpus .* but the corpus given is"):
        lance(tmp_path, corpus=CORPUS[:10])


def test_without_a_place_it_is_kept_in_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AGENTIC_RAG_CACHE", str(tmp_path))
    first = lance(None)
    monkeypatch.setattr("agentic_rag_env.retrievers.lancedb.make_table", lambda *_, **__: pytest.fail("made again"))
    assert lance(None).search(QUERIES, 5) == first.search(QUERIES, 5)
    assert lance(None).fingerprint == first.fingerprint


def test_an_unfinished_table_is_made_again(tmp_path: Path) -> None:
    expected = lance(tmp_path).search(QUERIES, 5)
    connect(str(tmp_path), None).open_table("passages").delete("id = 'p7'")
    assert lance(tmp_path).search(QUERIES, 5) == expected


def test_an_incomplete_table_is_not_opened_without_a_corpus(tmp_path: Path) -> None:
    lance(tmp_path)
    table = connect(str(tmp_path), None).open_table("passages")
    table.drop_index("contents_idx")
    with pytest.raises(DataError, match="is incomplete: it has 300 of 300 passages, or lacks an index over contents"):
        lance(tmp_path, corpus=None)
    lance(tmp_path)
    connect(str(tmp_path), None).open_table("passages").delete("id = 'p7'")
    with pytest.raises(DataError, match=r"is incomplete: it has 299 of 300 passages.* Give the corpus"):
        lance(tmp_path, corpus=None)
    with pytest.raises(DataError, match="was made of the corpus"):
        lance(tmp_path, corpus=CORPUS[:10])
    assert connect(str(tmp_path), None).open_table("passages").count_rows() == 299, "nothing was written"


def test_rows_that_were_added_stay(tmp_path: Path) -> None:
    made = lance(tmp_path)
    table = connect(str(tmp_path), None).open_table("passages")
    vector = table.search().limit(1).to_arrow().column("vector")[0].as_py()
    table.add([{"id": "mine", "contents": "amber cedar", "vector": vector}])
    with pytest.raises(DataError, match="was made of 300 passages and now has 301"):
        lance(tmp_path)
    assert connect(str(tmp_path), None).open_table("passages").count_rows() == 301
    opened = lance(tmp_path, corpus=None)
    assert "mine" in {passage.id for passage in opened.search(["amber cedar"], 301)[0]}
    assert opened.fingerprint != made.fingerprint, "it finds other passages"


def test_an_index_that_was_added_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lance(tmp_path)
    connect(str(tmp_path), None).open_table("passages").create_scalar_index("id")
    monkeypatch.setattr("agentic_rag_env.retrievers.lancedb.make_table", lambda *_, **__: pytest.fail("made again"))
    lance(tmp_path)


def test_tables_whose_index_was_trained_apart_are_told_apart(tmp_path: Path) -> None:
    one, other = (lance(tmp_path / name, index="IVF_PQ").fingerprint for name in ("one", "other"))
    assert one != other
    assert lance(tmp_path / "one", corpus=None).fingerprint == one
    exact = {lance(tmp_path / name).fingerprint for name in ("exact", "as exact")}
    assert len(exact) == 1


def make_at(place: str) -> list[list[Passage]]:
    return lance(place).search(QUERIES, 5)


def test_processes_that_make_one_table_at_once(tmp_path: Path, place: Path) -> None:
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        found = list(pool.map(make_at, [str(tmp_path / "new")] * 2))
    assert found == [lance(place).search(QUERIES, 5)] * 2


def test_tables_of_the_cache_folder_have_a_place_for_each_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("AGENTIC_RAG_CACHE", str(tmp_path))
    for table in ("passages", "foo", "passages", "foo"):
        lance(None, table=table)
    assert caplog.text.count("Making a LanceDB table") == 2
    assert "damaged" not in caplog.text


def test_a_table_that_others_made(tmp_path: Path) -> None:
    import pyarrow as pa

    rows = {"id": ["a", "b"], "contents": ["amber", "birch"], "vector": [[1.0, 0.0], [0.0, 1.0]]}
    table = pa.table(rows).cast(
        pa.schema([("id", pa.string()), ("contents", pa.string()), ("vector", pa.list_(pa.float32(), 2))])
    )
    database = connect(str(tmp_path), None)
    database.create_table("passages", table)
    database.create_table("ids", table.drop_columns("contents"))

    class Encoder:
        fingerprint = "mine"

        def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
            return np.array([[0.6, 0.8]] * len(queries), np.float32)

        encode_passages = encode_queries

        def fit(self, passages: Sequence[str]) -> None: ...

        def settings(self) -> dict[str, Any]:
            return {}

        def state(self) -> dict[str, Any]:
            return {}

        def load_state(self, state: Any) -> None: ...

    retriever = lance(tmp_path, corpus=None, encoder=Encoder())
    assert retriever.search(["q"], 2) == [[Passage("b", "birch", 0.8), Passage("a", "amber", 0.6)]]
    assert retriever.fingerprint is None
    for settings, error, said in (
        ({}, ConfigurationError, "does not say which encoder"),
        ({"search": "text"}, DataError, "has no index over words"),
        ({"table": "ids", "encoder": Encoder()}, DataError, "lacks the columns contents"),
    ):
        with pytest.raises(error, match=said):
            lance(tmp_path, corpus=None, **settings)


def test_damaged_notes(tmp_path: Path) -> None:
    import pyarrow as pa

    lance(tmp_path)
    for text in ("{", "[]", '{"corpus": "x"}'):
        connect(str(tmp_path), None).create_table("passages_facts", pa.table({"facts": [text]}), mode="overwrite")
        with pytest.raises(DataError, match="'passages_facts' is damaged"):
            lance(tmp_path, corpus=None)


@pytest.mark.parametrize("search", ["dense", "hybrid"])
def test_a_query_whose_vector_is_not_finite_fails_alone(
    place: Path, monkeypatch: pytest.MonkeyPatch, search: str
) -> None:
    retriever = lance(place, search=search)
    expected = retriever.search(["amber", "fjord"], 3)
    encode = retriever._encoder.encode_queries

    def overflowing(queries: Sequence[str]) -> np.ndarray:
        return np.where([[query == "bad"] for query in queries], np.inf, encode(queries))

    monkeypatch.setattr(retriever._encoder, "encode_queries", overflowing)
    first, bad, last = retriever.search(["amber", "bad", "fjord"], 3)
    assert [first, last] == expected
    assert isinstance(bad, RetrieverError)
    assert "NaN or infinity for the query 'bad'" in str(bad)


def test_a_search_that_fails(tmp_path: Path) -> None:
    retriever = lance(tmp_path)
    connect(str(tmp_path), None).drop_table("passages")
    with pytest.raises(RetrieverError, match="cannot be searched"):
        retriever.search(["amber"], 3)


@pytest.mark.skipif("LANCEDB_URI" not in os.environ, reason="needs LANCEDB_URI=s3://<bucket>/<folder>")
def test_object_storage() -> None:
    """`moto_server` is such a storage: AWS_ENDPOINT=http://127.0.0.1:5000 AWS_ALLOW_HTTP=true and any keys."""
    place = f"{os.environ['LANCEDB_URI']}/{uuid.uuid4().hex}"
    made, expected = lance(place), RETRIEVERS.build("dense", corpus=CORPUS).search(QUERIES, 5)
    assert made.search(QUERIES, 5) == lance(place, corpus=None).search(QUERIES, 5) == expected
    assert lance(place, corpus=None, search="hybrid").search(["amber cedar"], 3)[0]


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"search": "words"}, "search must be one of"),
        ({"index": "FLAT"}, "index must be"),
        ({"nprobes": 0}, "nprobes"),
        ({"language": "english"}, "language must be one of .* Did you mean 'English'"),
        ({"table": "my table"}, "table must be a name of ASCII letters, digits, underscores, hyphens and periods"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        lance(None, **settings)


def test_a_place_without_the_table_needs_a_corpus(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="retriever 'lancedb' searches a corpus, but got none"):
        lance(tmp_path, corpus=None)
