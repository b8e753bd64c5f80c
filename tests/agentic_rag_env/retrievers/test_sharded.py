"""Parts of a corpus, searched side by side and merged."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import agentic_rag_env  # noqa: F401
from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.dense import DenseConfig, DenseRetriever
from agentic_rag_env.types import Found, Passage

WORDS = ["amber", "birch", "cedar", "delta", "ember", "fjord", "grove", "haven"]
RNG = np.random.default_rng(0)
#: Some texts occur more than once, so that there are ties within parts and between them.
CORPUS = [Passage(f"p{row}", " ".join(RNG.choice(WORDS, RNG.integers(1, 4)))) for row in range(200)]
QUERIES = ["amber cedar", "fjord", "haven grove delta", "amber cedar", "??"]


class Vectors:
    """An encoder that counts words, which needs no corpus to learn from."""

    def fit(self, passages: Sequence[str]) -> None:
        pass

    def encode_passages(self, passages: Sequence[str]) -> np.ndarray:
        counts = np.array([[text.split().count(word) for word in WORDS] for text in passages], np.float32)
        return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9)

    encode_queries = encode_passages


class Scored:
    """Returns what it is told, with scores; or raises."""

    def __init__(self, *found: tuple[str, float], error: str = "", bad: str = "") -> None:
        self.found, self.error, self.bad = found, error, bad

    def search(self, queries: Sequence[str], top_k: int) -> list[Found]:
        if self.error:
            raise RetrieverError(self.error)
        passages = [Passage(name, f"text of {name}", score) for name, score in self.found[:top_k]]
        return [RetrieverError("no luck") if query == self.bad else list(passages) for query in queries]


def sharded(*shards: Any) -> Any:
    return RETRIEVERS.build({"name": "sharded", "shards": list(shards)}, corpus=None)


def ids(found: Any) -> list[str]:
    return [passage.id for passage in found]


@pytest.mark.parametrize("top_k", [1, 3, 50, 1000])
def test_parts_rank_like_one_index(top_k: int) -> None:
    def dense(passages: list[Passage]) -> DenseRetriever:
        return DenseRetriever(DenseConfig(encoder=Vectors()), passages)

    parts = [dense(CORPUS[first : first + 50]) for first in range(0, 200, 50)]
    assert sharded(*parts).search(QUERIES, top_k) == dense(CORPUS).search(QUERIES, top_k)


def test_merged_by_score_and_ties_by_part() -> None:
    first, second = Scored(("a", 3.0), ("b", 1.0), ("c", -2.0)), Scored(("d", 5.0), ("e", 1.0), ("f", 0.5))
    (found,) = sharded(first, second).search(["q"], 4)
    assert [(passage.id, passage.score) for passage in found] == [("d", 5.0), ("a", 3.0), ("b", 1.0), ("e", 1.0)]
    assert ids(sharded(second, first).search(["q"], 4)[0]) == ["d", "a", "e", "b"]


def test_a_passage_of_two_parts_is_returned_once() -> None:
    (found,) = sharded(Scored(("a", 1.0), ("b", 0.5)), Scored(("b", 0.7), ("a", 0.2))).search(["q"], 4)
    assert [(passage.id, passage.score) for passage in found] == [("a", 1.0), ("b", 0.7)]


def test_no_queries_and_repeated_ones() -> None:
    retriever = sharded(Scored(("a", 1.0)), Scored(("b", 2.0)))
    assert retriever.search([], 3) == []
    once, again = retriever.search(["q", "q"], 3)
    assert once == again
    assert once is not again
    with pytest.raises(ConfigurationError, match="top_k must be"):
        retriever.search(["q"], 0)


def test_a_failing_part_is_named() -> None:
    retriever = sharded(Scored(("a", 1.0)), Scored(error="gone"), Scored(("b", 1.0)))
    with pytest.raises(RetrieverError, match=r"^part 2 of 3 \(Scored\): gone$"):
        retriever.search(["q"], 3)


def test_a_query_that_fails_in_one_part_fails_alone() -> None:
    good, bad = sharded(Scored(("a", 1.0)), Scored(("b", 2.0), bad="bad")).search(["good", "bad"], 3)
    assert ids(good) == ["b", "a"]
    assert str(bad) == "part 2 of 2 (Scored): no luck"


@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("scores", [(0.1, 0.9), (0.0, 0.0)], ids=["distances", "no scores"])
def test_a_part_without_comparable_scores_is_named(scores: tuple[float, float], top_k: int) -> None:
    service = Scored(("b", scores[0]), ("c", scores[1]))
    service.scores_by = "service"  # type: ignore[attr-defined]
    retriever = sharded(Scored(("a", 1.0)), {"name": "cached", "retriever": service, "fingerprint": "mine"})
    (error,) = retriever.search(["q"], top_k)
    assert isinstance(error, RetrieverError)
    assert re.match(r"part 2 of 2 \(CachedRetriever\): its scores are .* higher the better", str(error))


def test_a_query_like_no_passage_of_a_part_costs_nothing() -> None:
    """A cosine of 0 is a score, too."""
    parts = [DenseRetriever(DenseConfig(encoder=Vectors()), [Passage(f"{w}{n}", w) for n in "12"]) for w in WORDS[:2]]
    found = sharded(*parts).search(["amber", "birch"], 2)
    assert [ids(passages) for passages in found] == [["amber1", "amber2"], ["birch1", "birch2"]]


def test_parts_whose_scores_depend_on_their_passages() -> None:
    bm25 = RETRIEVERS.build("bm25", corpus=CORPUS)
    hybrid = RETRIEVERS.build({"name": "hybrid", "retrievers": [bm25, bm25]}, corpus=CORPUS)
    cached, faulty = ({"name": name, "retriever": bm25} for name in ("cached", "faulty"))
    for part in (bm25, hybrid, cached, faulty, {"name": "cached", "retriever": faulty}):
        with pytest.raises(ConfigurationError, match=r"depends on the other passages of its part \(part 2\)"):
            sharded(Scored(("a", 1.0)), part)


@pytest.mark.parametrize("search", ["dense", "text", "hybrid"])
def test_parts_in_tables(tmp_path: Path, search: str) -> None:
    pytest.importorskip("lancedb")
    table = RETRIEVERS.build({"name": "lancedb", "uri": str(tmp_path), "search": search}, corpus=CORPUS)
    if search == "dense":
        assert len(sharded(Scored(("a", 1.0)), table).search(["amber"], 3)[0]) == 3
        return
    with pytest.raises(ConfigurationError, match="a score of LanceDBRetriever depends"):
        sharded(Scored(("a", 1.0)), table)


@pytest.mark.parametrize(
    ("shards", "said"),
    [
        (["http://localhost:1"], "a list of two parts or more"),
        ("http://localhost:1", "a list of two parts or more"),
        (["http://localhost:1", "bm25"], r"a score of bm25 depends on the other passages of its part \(part 2\)"),
        ([{"name": "hybrid"}, "http://localhost:1"], "a score of hybrid"),
        (["http://localhost:1", 7], "part 2 of sharded needs a retriever: .* got 7"),
    ],
)
def test_what_cannot_be_sharded(shards: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        RETRIEVERS.build({"name": "sharded", "shards": shards}, corpus=None)


def test_fingerprint() -> None:
    one, other = Scored(("a", 1.0)), Scored(("b", 1.0))
    assert sharded(one, other).fingerprint is None
    one.fingerprint, other.fingerprint = "one", "other"  # type: ignore[attr-defined]
    assert sharded(one, other).fingerprint == sharded(one, other).fingerprint != sharded(other, one).fingerprint


# Services


@pytest.fixture
def services() -> Iterator[list[ThreadingHTTPServer]]:
    """Two services; each finds one passage, named after its place, whose score is the place."""
    made = []
    for place in (1, 2):
        result = [{"document": {"id": f"s{place}", "contents": "c"}, "score": place}]

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self, result: Any = result) -> None:
                asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                body = json.dumps({"result": [result] * len(asked["queries"])}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        made.append(server)
    yield made
    for server in made:
        server.shutdown()
        server.server_close()


def test_services(services: list[ThreadingHTTPServer]) -> None:
    one, two = (f"http://127.0.0.1:{server.server_address[1]}" for server in services)
    found = sharded(one, {"name": "http", "url": two}).search(["q", "r"], 3)
    assert [ids(passages) for passages in found] == [["s2", "s1"]] * 2


def test_a_service_that_is_gone_is_named(services: list[ThreadingHTTPServer]) -> None:
    url = f"http://127.0.0.1:{services[0].server_address[1]}"
    gone = {"name": "http", "url": "http://127.0.0.1:9/retrieve", "max_retries": 0, "backoff_s": 0.0}
    with pytest.raises(RetrieverError, match=r"part 2 of 2 \(http://127.0.0.1:9/retrieve\): retriever at http"):
        sharded(url, gone).search(["q"], 3)
