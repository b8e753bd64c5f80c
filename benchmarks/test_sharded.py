"""The parts of a corpus, served side by side, against one index over all of it.

`pytest benchmarks/test_sharded.py -s` cuts a million passages into four; SHARDED_PASSAGES=<n> takes another number.
The vectors are random points around a thousand centres, with 32 numbers each: small enough for any machine, and exact
search ranks them like any other width. Passages are made when they are asked for.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.dense import DenseConfig, DenseRetriever
from agentic_rag_env.retrievers.vectors.faiss_search import flat_index
from agentic_rag_env.types import Passage

NUM_PASSAGES = int(os.environ.get("SHARDED_PASSAGES", 1_000_000))
NUM_SHARDS, DIM, NUM_QUERIES, TOP_K = 4, 32, 256, 10


def clustered(count: int, seed: int, num_centres: int = 1000) -> np.ndarray:
    """Vectors of length 1 around random centres, [count, DIM]; one in 100 is a copy of its neighbour, for ties."""
    centres = np.random.default_rng(0).standard_normal((num_centres, DIM), np.float32)
    rng = np.random.default_rng(seed)
    rows = centres[rng.integers(num_centres, size=count)] + 0.7 * rng.standard_normal((count, DIM), np.float32)
    rows[100::100] = rows[99 : count - 1 : 100][: len(rows[100::100])]
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


class Corpus(Sequence):  # type: ignore[type-arg]
    """Passages of a range of rows."""

    def __init__(self, rows: range) -> None:
        self.rows = rows
        self.fingerprint = f"rows {rows}"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> Passage:  # type: ignore[override]
        return Passage(str(self.rows[row]), f"passage {self.rows[row]}")


class Numbered:
    """Takes a query's number for its text."""

    def __init__(self, queries: np.ndarray) -> None:
        self.queries = queries

    def fit(self, passages: Sequence[str]) -> None:
        pass

    def encode_passages(self, passages: Sequence[str]) -> np.ndarray:
        raise AssertionError("the vectors are in the index")

    def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        return self.queries[[int(query) if query.isdigit() else 0 for query in queries]]


def test_four_parts_rank_like_one_index(tmp_path: Path) -> None:
    import faiss

    vectors, asked = clustered(NUM_PASSAGES, seed=1), Numbered(clustered(NUM_QUERIES, seed=2))

    def dense(rows: range) -> DenseRetriever:
        file = tmp_path / f"{rows.start}-{rows.stop}.index"
        faiss.write_index(flat_index(vectors[rows.start : rows.stop]), str(file))
        return DenseRetriever(DenseConfig(encoder=asked, index=str(file)), Corpus(rows))

    size = -(-NUM_PASSAGES // NUM_SHARDS)
    parts = [dense(range(first, min(first + size, NUM_PASSAGES))) for first in range(0, NUM_PASSAGES, size)]
    queries, taken, found = [str(number) for number in range(NUM_QUERIES)], {}, {}
    sharded = RETRIEVERS.build({"name": "sharded", "shards": parts}, corpus=None)
    for name, retriever in {"one index": dense(range(NUM_PASSAGES)), "parts": sharded}.items():
        start = time.perf_counter()
        found[name] = retriever.search(queries, TOP_K)
        taken[name] = time.perf_counter() - start
    print(f"\n{NUM_PASSAGES} passages, {NUM_QUERIES} queries: " + ", ".join(f"{k} {v:.2f} s" for k, v in taken.items()))
    assert found["parts"] == found["one index"]
