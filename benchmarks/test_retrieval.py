"""Queries per second, recall, opening time and memory of each kind of index, over passages of the tiny world.

`pytest benchmarks/test_retrieval.py -s` uses 20,000 passages. RETRIEVAL_PASSAGES=1000000 uses a million; that takes
some 6 GB of disk, and nearly all time goes to encoding and building. RETRIEVAL_FOLDER=<folder> keeps the indexes for
the next time. On a busy machine, --benchmark-timer=time.process_time measures processor time.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import pytest

from agentic_rag_env.corpus import CorpusStore, open_corpus, write_store
from agentic_rag_env.datasets.tiny import TinyConfig, tiny
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.bm25 import BM25Config
from agentic_rag_env.retrievers.indexing.builder import DenseIndexConfig, build_bm25, build_dense
from agentic_rag_env.retrievers.indexing.progress import progress
from agentic_rag_env.types import Question

NUM_PASSAGES = int(os.environ.get("RETRIEVAL_PASSAGES", 20_000))
BATCH, TOP_K, NUM_QUESTIONS = 64, 3, 512
ENCODER = {"name": "hashed_ngram", "dim": 256}
LISTS = 2 ** (max(1, NUM_PASSAGES).bit_length() // 2)
#: FAISS factory strings by the name of their folder; `torch` searches the vectors of `flat`.
DENSE = {
    "flat": "Flat",
    "ivf": f"IVF{LISTS},Flat",
    "ivf_sq8": f"IVF{LISTS},SQ8",
    "ivf_pq": f"IVF{LISTS},PQ64",
    "hnsw": "HNSW32",
    "sq_fp16": "SQfp16",
}
#: Opens a retriever in a process that has loaded the libraries; prints the seconds and the growth in memory [MiB], of
#: its own and mapped from files, before and after a first batch of queries.
OPEN = """
import json, sys, time
import agentic_rag_env, bm25s, faiss, pyarrow, torch
from agentic_rag_env.corpus import CorpusStore
from agentic_rag_env.registry import RETRIEVERS
spec, store, queries = json.loads(sys.argv[1])
def memory():
    fields = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
    return [int(fields[name].split()[0]) / 1024 for name in ("RssAnon", "RssFile")]
CorpusStore(store)[0]
before, start = memory(), time.perf_counter()
opened_store = CorpusStore(store)
store_s = time.perf_counter() - start
retriever = RETRIEVERS.build(spec, corpus=opened_store) if spec else None
open_s = time.perf_counter() - start
opened = memory()
if retriever: retriever.search(queries, 3)
grown = [b - a for after in (opened, memory()) for a, b in zip(before, after)]
print(json.dumps([store_s, open_s, *grown]))
"""


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    kept = os.environ.get("RETRIEVAL_FOLDER")
    place = Path(kept).expanduser() if kept else tmp_path_factory.mktemp("retrieval")
    place = place / str(NUM_PASSAGES)
    place.mkdir(parents=True, exist_ok=True)
    return place


@pytest.fixture(scope="session")
def questions(folder: Path) -> list[Question]:
    """Make one-hop questions and write the store of their world."""
    world = tiny(TinyConfig(subset="single_hop", num_questions=NUM_QUESTIONS, num_passages=NUM_PASSAGES))
    if not (folder / "c.arrow").exists():
        write_store(world.corpus or (), folder / "c.arrow")
    return list(world)


@pytest.fixture(scope="session")
def store(folder: Path, questions: list[Question]) -> CorpusStore:
    return open_corpus(folder / "c.arrow")


def spec_of(kind: str, folder: Path, store: CorpusStore) -> dict[str, Any]:
    """Settings of a retriever. Its index is built if it is missing; all indexes share one encoding of the passages."""
    if kind == "bm25":
        build_bm25(store.path, folder / kind, BM25Config(), progress)
        return {"name": "bm25", "index": str(folder / kind)}
    if kind == "torch":
        return {**spec_of("flat", folder, store), "backend": "torch", "device": "cpu"}
    if kind == "hybrid":
        parts = [spec_of(part, folder, store) for part in ("bm25", "ivf")]
        return {"name": "hybrid", "retrievers": parts}
    if kind != "flat" and not (folder / kind).exists():
        spec_of("flat", folder, store)
        (folder / kind).mkdir()
        shutil.copytree(folder / "flat" / "vectors", folder / kind / "vectors", copy_function=os.link)
        shutil.copy(folder / "flat" / "encoder.json", folder / kind)
    # Several threads build another HNSW graph every time; here it is as good and takes half as long.
    config = DenseIndexConfig(encoder=ENCODER, index=DENSE[kind], threads=faiss.omp_get_max_threads())
    build_dense(store.path, folder / kind, config, progress)
    return {"name": "dense", "index": str(folder / kind)}


KINDS = ["bm25", *DENSE, "torch", "hybrid"]


@pytest.mark.parametrize("batch", [1, BATCH])
@pytest.mark.parametrize("kind", KINDS)
def test_search(
    benchmark: Any, folder: Path, store: CorpusStore, questions: list[Question], kind: str, batch: int
) -> None:
    spec = spec_of(kind, folder, store)
    retriever = RETRIEVERS.build(spec, corpus=store)
    texts = [question.text for question in questions]
    num_batches = 4 if batch > 1 else 16
    batches = iter([texts[first : first + batch] for first in range(0, batch * num_batches, batch)])
    benchmark.pedantic(lambda: retriever.search(next(batches), TOP_K), rounds=num_batches - 1, warmup_rounds=1)
    found = retriever.search(texts, TOP_K)
    supporting = [question.metadata["supporting"][0] for question in questions]
    hits = [gold in [passage.id for passage in passages] for gold, passages in zip(supporting, found, strict=True)]
    rate = batch / benchmark.stats.stats.median
    report = {"queries/s": round(rate, 1), "recall@3 of gold": round(sum(hits) / len(hits), 3)}
    if kind in DENSE:
        manifest = json.loads((folder / kind / "manifest.json").read_text())
        report["recall@3 of exact"] = manifest["recall"]["recall@3"]
    benchmark.extra_info.update(report)
    print(f"\n{len(store)} passages, {kind}, batches of {batch}: {report}")


@pytest.mark.parametrize("kind", ["store", *KINDS])
def test_open(folder: Path, store: CorpusStore, questions: list[Question], kind: str) -> None:
    """Opening runs in its own process. The files are in the page cache, as for the second process on a machine."""
    spec = None if kind == "store" else spec_of(kind, folder, store)
    texts = [question.text for question in questions[:BATCH]]
    done = subprocess.run(
        [sys.executable, "-c", OPEN, json.dumps([spec, str(store.path), texts])],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    store_s, open_s, own, mapped, own_after, mapped_after = json.loads(done.stdout)
    print(
        f"\n{len(store)} passages, {kind}: store opened in {store_s:.4f} s, all in {open_s:.3f} s; memory {own:.0f} "
        f"MiB of its own and {mapped:.0f} mapped, after {BATCH} queries {own_after:.0f} and {mapped_after:.0f}"
    )
