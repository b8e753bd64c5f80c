"""LanceDB beside our own indexes: recall, queries per second and memory, over the vectors of `test_sharded.py`.

`pytest benchmarks/test_lancedb.py -s` searches a million passages of 32 numbers and six words each, exactly and by an
index of lists; SHARDED_PASSAGES=<n> takes another number. Each retriever is made by one process and measured in
another. Recall is that of ten passages beside exact search. Memory is the process's own and what it has mapped, after
opening and 200 lone queries. On a busy machine the figures compare; they are no absolutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_sharded import DIM, NUM_PASSAGES, TOP_K, clustered

from agentic_rag_env.corpus import write_store
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.vectors.encoders import ENCODERS
from agentic_rag_env.retrievers.vectors.hashed_ngram import HashedNgramConfig
from agentic_rag_env.types import Passage

pytest.importorskip("lancedb")
NUM_QUERIES, NUM_WORDS = 50, 20_000
LISTS = 2 ** (NUM_PASSAGES.bit_length() // 2)
#: What is compared; `{folder}` is where it lies.
SPECS: dict[str, dict[str, Any]] = {
    "ours, flat": {"name": "dense", "index": "{folder}/flat"},
    "ours, lists": {"name": "dense", "index": "{folder}/ivf", "nprobe": 20},
    "lancedb, exact": {"name": "lancedb", "uri": "{folder}/exact"},
    "lancedb, lists": {"name": "lancedb", "uri": "{folder}/lists", "nprobes": 20},
    "ours, bm25": {"name": "bm25", "index": "{folder}/bm25"},
    "lancedb, bm25": {"name": "lancedb", "uri": "{folder}/exact", "search": "text"},
}


@ENCODERS.register("numbered", HashedNgramConfig)
class Numbered:
    """Takes the number that a text begins with for its row among random vectors; a query is a row of others."""

    fingerprint = "numbered"

    def __init__(self, config: Any) -> None:
        self._passages, self._queries = clustered(NUM_PASSAGES, seed=1), clustered(NUM_QUERIES, seed=2)

    def fit(self, passages: Sequence[str]) -> None:
        pass

    def settings(self) -> dict[str, Any]:
        return {"name": "numbered"}

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self._passages = np.empty((0, DIM), np.float32)  # which a search does not need

    def encode_passages(self, passages: Sequence[str]) -> np.ndarray:
        return self._passages[[int(text.split()[0]) for text in passages]]

    def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        return self._queries[[int(text.split()[0]) % NUM_QUERIES if text[:1].isdigit() else 0 for text in queries]]


def words(rng: np.random.Generator, count: int) -> str:
    return " ".join(f"w{number}" for number in np.minimum(rng.zipf(1.3, count), NUM_WORDS))


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Open and search in this process."""

    def memory() -> np.ndarray:
        fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return np.array([int(fields[name].split()[0]) // 1024 for name in ("RssAnon", "RssFile")])

    rng = np.random.default_rng(3)
    queries = [f"{number} {words(rng, 6)}" for number in range(NUM_QUERIES)]
    before = memory()
    retriever = RETRIEVERS.build(spec, corpus=None)
    retriever.search(queries[:3], TOP_K)
    start = time.perf_counter()
    found = [retriever.search([query], TOP_K)[0] for query in queries]
    alone = time.perf_counter() - start
    grown, start = memory() - before, time.perf_counter()
    retriever.search(queries, TOP_K)
    together = time.perf_counter() - start
    ids = [[passage.id for passage in passages] for passages in found]
    return {"ids": ids, "alone": NUM_QUERIES / alone, "together": NUM_QUERIES / together, "MiB": grown.tolist()}


def make(folder: Path) -> None:
    from agentic_rag_env.retrievers.bm25 import BM25Config
    from agentic_rag_env.retrievers.indexing.builder import DenseIndexConfig, build_bm25, build_dense
    from agentic_rag_env.retrievers.vectors.lance_tables import connect, make_table

    rng, encoder = np.random.default_rng(4), Numbered(None)
    store = write_store(
        (Passage(str(row), f"{row} {words(rng, 6)}") for row in range(NUM_PASSAGES)), folder / "c.arrow"
    )
    for name, factory in {"flat": "Flat", "ivf": f"IVF{LISTS},Flat"}.items():
        build_dense(store.path, folder / name, DenseIndexConfig(encoder=encoder, index=factory))
    build_bm25(store.path, folder / "bm25", BM25Config())
    for place, index in {"exact": None, "lists": "IVF_FLAT"}.items():
        start = time.perf_counter()
        make_table(connect(str(folder / place), None), "passages", store, encoder, index=index, language=None)
        print(f"\nlancedb, {place}: made in {time.perf_counter() - start:.0f} s", end="", flush=True)


def test_lancedb_beside_ours(tmp_path: Path) -> None:
    make(tmp_path)
    figures = {}
    for name, spec in SPECS.items():
        given = json.dumps(spec).replace("{folder}", str(tmp_path))
        done = subprocess.run(
            [sys.executable, __file__, given], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
        )
        figures[name] = json.loads(done.stdout.splitlines()[-1])
    exact = figures["ours, flat"]["ids"]
    for name, figure in figures.items():
        shared = [len({*a} & {*b}) / TOP_K for a, b in zip(exact, figure["ids"], strict=True)]
        recall = "" if "bm25" in name else f"recall {np.mean(shared):.3f}, "
        print(f"\n{NUM_PASSAGES} passages, {name}: {recall}{figure['alone']:.0f} lone queries/s, ", end="")
        print(f"{figure['together']:.0f} in a batch, {figure['MiB'][0]} MiB own and {figure['MiB'][1]} mapped", end="")
    assert figures["lancedb, exact"]["ids"] == exact


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1]))))
