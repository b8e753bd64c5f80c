"""Index folders: built, killed and finished, opened, refused; and the FAISS files of others."""

from __future__ import annotations

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import time
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import filelock
import numpy as np
import pytest

from agentic_rag_env.corpus import CorpusStore, fingerprint, write_store
from agentic_rag_env.errors import ConfigurationError, DataError, UnknownNameError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import hash_of
from agentic_rag_env.retrievers.bm25 import BM25Config
from agentic_rag_env.retrievers.dense import DenseConfig
from agentic_rag_env.retrievers.indexing import faiss_builder
from agentic_rag_env.retrievers.indexing.builder import DenseIndexConfig, build_bm25, build_dense
from agentic_rag_env.retrievers.indexing.cli import main
from agentic_rag_env.retrievers.indexing.faiss_builder import default_index
from agentic_rag_env.retrievers.vectors import hashed_ngram, torch_search
from agentic_rag_env.retrievers.vectors.encoders import StoredEncoder, build_encoder
from agentic_rag_env.retrievers.vectors.faiss_search import FlatSearch
from agentic_rag_env.retrievers.vectors.hashed_ngram import HashedNgramEncoder
from agentic_rag_env.types import Passage

NUM_PASSAGES = 600
PASSAGES = tuple(Passage(f"p{row}", f'"Title {row}"\nword{row % 7} and number{row}') for row in range(NUM_PASSAGES))
#: The first ten passages are the same text, so that there are ties.
PASSAGES = (*(Passage(f"p{row}", PASSAGES[0].contents) for row in range(10)), *PASSAGES[10:])
STEMS = {"stemmer": "english", "stopwords": "english"}
TORCH = {"name": "dense", "backend": "torch"}
QUERIES = [passage.contents for passage in PASSAGES[::60]] + ["something else", PASSAGES[0].contents]


class CrcEncoder:
    """A random direction for each text; notes in a file which passages it was given."""

    def __init__(self, log: Path | None = None, name: str = "crc", dim: int = 16, pause_s: float = 0.0) -> None:
        self.log, self.name, self.dim, self.pause_s = log, name, dim, pause_s

    @property
    def fingerprint(self) -> str:
        return f"hash of {self.name}"

    def settings(self) -> dict[str, Any]:
        return {"name": self.name}

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: Mapping[str, Any]) -> None:
        pass

    def fit(self, passages: Sequence[str]) -> None:
        pass

    def encode_passages(self, passages: Sequence[str]) -> np.ndarray:
        if self.log is not None:
            with self.log.open("a") as log:
                log.write("".join(f"{text.split('number')[-1]}\n" for text in passages))
        time.sleep(self.pause_s)
        return self.encode_queries(passages)

    def encode_queries(self, queries: Sequence[str]) -> np.ndarray:
        rows = [np.random.default_rng(zlib.crc32(text.encode())).normal(size=self.dim) for text in queries]
        return np.array([row / np.linalg.norm(row) for row in rows], np.float32)


def brute_force(queries: Sequence[str], top_k: int, dtype: str = "float32") -> list[list[tuple[str, float]]]:
    encoder = CrcEncoder()
    vectors = encoder.encode_queries([passage.contents for passage in PASSAGES]).astype(dtype).astype(float)
    scores = np.round(encoder.encode_queries(queries).astype(float) @ vectors.T, 5)
    best = [sorted(range(NUM_PASSAGES), key=lambda row: (-line[row], row))[:top_k] for line in scores]
    return [[(f"p{row}", float(line[row])) for row in rows] for line, rows in zip(scores, best, strict=True)]


def found_by(retriever: Any, queries: Sequence[str] = QUERIES, top_k: int = 5) -> list[list[tuple[str, float]]]:
    return [[(passage.id, passage.score) for passage in found] for found in retriever.search(queries, top_k)]


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CorpusStore:
    return write_store(PASSAGES, tmp_path_factory.mktemp("corpus") / "c.arrow")


@pytest.fixture(scope="module")
def dense_folder(store: CorpusStore) -> Path:
    folder = store.path.parent / "dense"
    build_dense(store.path, folder, DenseIndexConfig(encoder=CrcEncoder(), index="Flat", shard_size=64))
    return folder


@pytest.fixture(scope="module")
def bm25_folder(store: CorpusStore) -> Path:
    folder = store.path.parent / "bm25"
    build_bm25(store.path, folder, BM25Config())
    return folder


# Building


def test_what_a_dense_folder_holds(store: CorpusStore, dense_folder: Path) -> None:
    manifest = json.loads((dense_folder / "manifest.json").read_text())
    assert manifest["corpus"] == {
        "path": "../c.arrow",
        "fingerprint": fingerprint(PASSAGES),
        "num_passages": NUM_PASSAGES,
    }
    assert manifest["encoder"] == {"settings": {"name": "crc"}, "fingerprint": "hash of crc"}
    assert manifest["recall"] == {"num_queries": 256, "recall@3": 1.0, "recall@10": 1.0}
    assert set(manifest["files"]) == {"index.faiss", "encoder.json", "vectors/vectors.npy"}
    vectors_file = (dense_folder / "vectors" / "vectors.npy").read_bytes()
    assert manifest["files"]["vectors/vectors.npy"] == hashlib.blake2b(vectors_file, digest_size=16).hexdigest()
    vectors = np.load(dense_folder / "vectors" / "vectors.npy")
    np.testing.assert_array_equal(vectors, CrcEncoder().encode_queries([passage.contents for passage in store]))
    assert set(files_in(dense_folder)) == {
        ".lock",
        "encoder.json",
        "index.faiss",
        "manifest.json",
        "vectors/encoding.json",
        "vectors/vectors.npy",
    }


@pytest.mark.parametrize("shard_size", [1, 64, 600, 10_000])
def test_files_do_not_depend_on_the_shards(tmp_path: Path, store: CorpusStore, shard_size: int) -> None:
    for folder, size in (("one", 64), ("other", shard_size)):
        config = DenseIndexConfig(encoder=CrcEncoder(), index="IVF4,SQ8", shard_size=size)
        shutil.copy(store.path, tmp_path / "c.arrow")
        build_dense(tmp_path / "c.arrow", tmp_path / folder, config)
    assert files_in(tmp_path / "one") == files_in(tmp_path / "other")


def test_another_index_over_the_same_vectors(tmp_path: Path, store: CorpusStore) -> None:
    folder, log = tmp_path / "index", tmp_path / "log"
    manifests = [
        build_dense(store.path, folder, DenseIndexConfig(encoder=CrcEncoder(log), index=index))
        for index in ("Flat", "IVF4,Flat", "IVF4,Flat")
    ]
    assert len(log.read_text().splitlines()) == NUM_PASSAGES
    assert manifests[1] == manifests[2] == json.loads((folder / "manifest.json").read_text())
    assert manifests[1]["index"]["factory"] == "IVF4,Flat"
    assert isinstance(faiss.read_index(str(folder / "index.faiss")), faiss.IndexIVFFlat)


@pytest.mark.parametrize("index", ["IVF8,Flat", "IVF4,PQ4x4", "HNSW16", "SQfp16", "IVF8,SQ8"])
def test_kinds_of_index(tmp_path: Path, store: CorpusStore, index: str) -> None:
    manifest = build_dense(store.path, tmp_path, DenseIndexConfig(encoder=CrcEncoder(), index=index))
    # PQ keeps 2 bytes of 64; the others are close to exact at this size, where all lists are looked into.
    assert manifest["recall"]["recall@10"] > (0.2 if "PQ" in index else 0.95)
    retriever = RETRIEVERS.build({"name": "dense", "index": str(tmp_path), "encoder": CrcEncoder()}, corpus=None)
    together = retriever.search(QUERIES * 3, 4)
    assert together == [retriever.search([query], 4)[0] for query in QUERIES * 3]
    if "PQ" not in index:
        assert [found[0].id for found in together[:10]] == [f"p{row}" for row in range(0, 600, 60)]


def test_recall_is_measured_and_not_assumed(store: CorpusStore) -> None:
    vectors = CrcEncoder().encode_queries([passage.contents for passage in store])
    empty = faiss.IndexFlatIP(16)
    empty.add(np.zeros_like(vectors))
    from agentic_rag_env.corpus import Texts
    from agentic_rag_env.retrievers.indexing.progress import silent

    report = faiss_builder.measure_recall(empty, vectors, Texts(store), CrcEncoder(), 0, silent)
    assert report["recall@3"] < 0.1


def test_recall_is_measured_where_the_vectors_are(store: CorpusStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU, which may be too small for them, is not asked."""
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    build_dense(store.path, store.path.parent / "near a GPU", DenseIndexConfig(encoder=CrcEncoder(), index="Flat"))


def test_default_index() -> None:
    sizes = [1, 200_000, 200_001, 1_000_000, 2_000_000, 2_000_001, 21_015_324]
    assert [default_index(size) for size in sizes] == [
        "Flat",
        "Flat",
        "IVF2048,Flat",
        "IVF4096,Flat",
        "IVF4096,Flat",
        "IVF4096,SQ8",
        "IVF16384,SQ8",
    ]


# Killed


def kill_and_finish(tmp_path: Path, index: str, num_kills: int, seed: int) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"id": p.id, "contents": p.contents}) + "\n" for p in PASSAGES))
    log = tmp_path / "log"

    def build(folder: Path) -> None:
        import torch

        torch.set_num_threads(1)
        faiss.omp_set_num_threads(1)
        encoder = CrcEncoder(log, pause_s=0.005)
        build_dense(corpus, folder, DenseIndexConfig(encoder=encoder, index=index, shard_size=8))

    def start(folder: Path) -> Any:
        process = multiprocessing.get_context("fork").Process(target=build, args=(folder,))
        process.start()
        return process

    began = time.monotonic()
    whole = start(tmp_path / "whole")
    whole.join()
    assert whole.exitcode == 0
    duration_s = time.monotonic() - began
    rng = random.Random(seed)
    folder = tmp_path / "killed"
    for _ in range(num_kills):
        process = start(folder)
        time.sleep(rng.uniform(0, duration_s))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        saved = rows_on_disk(folder / "vectors")
        log.unlink(missing_ok=True)
        # What is on disk now is not encoded again, whatever comes.
        again = start(folder)
        time.sleep(rng.uniform(0, duration_s / 2))
        os.kill(again.pid, signal.SIGKILL)
        again.join()
        encoded = [int(line) for line in log.read_text().split()] if log.exists() else []
        assert not saved & set(encoded)
        assert len(encoded) == len(set(encoded))
    last = start(folder)
    last.join()
    assert last.exitcode == 0
    assert files_in(folder) == files_in(tmp_path / "whole")


def rows_on_disk(vectors: Path) -> set[int]:
    if (vectors / "vectors.npy").exists():
        return set(range(10, NUM_PASSAGES))
    firsts = [int(shard.stem.rpartition("-")[2]) for shard in vectors.glob("shard-*.npy")]
    return {row for first in firsts for row in range(first, first + 8) if row >= 10}


@pytest.mark.parametrize("index", ["IVF4,Flat"])
def test_killed_builds_end_with_the_same_files(tmp_path: Path, index: str) -> None:
    kill_and_finish(tmp_path, index, num_kills=1, seed=0)


@pytest.mark.nightly
@pytest.mark.parametrize("index", ["Flat", "IVF4,PQ4x4", "HNSW8"])
def test_builds_killed_many_times(tmp_path: Path, index: str) -> None:
    kill_and_finish(tmp_path, index, num_kills=10, seed=1)


@pytest.mark.parametrize("words", [{}, STEMS], ids=["words", "stems"])
def test_a_killed_bm25_build_is_finished(tmp_path: Path, store: CorpusStore, words: dict[str, str]) -> None:
    folder, config = tmp_path / "bm25", BM25Config(**words)
    (folder / ".bm25.saving").mkdir(parents=True)
    (folder / ".bm25.saving" / "vocabulary.arrow").write_bytes(b"half")
    (folder / ".manifest.json.77.partial").write_bytes(b"half")
    with pytest.raises(DataError, match="holds no finished index"):
        RETRIEVERS.build({"name": "bm25", "index": str(folder), **words}, corpus=PASSAGES)
    build_bm25(store.path, folder, config)
    build_bm25(store.path, tmp_path / "whole", config)
    assert files_in(folder) == files_in(tmp_path / "whole")


def test_two_builders_in_one_folder(tmp_path: Path, store: CorpusStore) -> None:
    with filelock.FileLock(tmp_path / ".lock"), pytest.raises(DataError, match="another process is building an index"):
        build_bm25(store.path, tmp_path, BM25Config())
    assert build_bm25(store.path, tmp_path, BM25Config())["kind"] == "bm25"


def test_a_file_system_without_locks(tmp_path: Path, store: CorpusStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(filelock.FileLock, "_acquire", unsupported)
    with pytest.raises(DataError, match=r"cannot be locked: .*No locks available; build on a local disk"):
        build_bm25(store.path, tmp_path, BM25Config())


# Opened


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_flat_torch_and_brute_force_agree(
    tmp_path: Path, store: CorpusStore, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    build_dense(store.path, tmp_path, DenseIndexConfig(encoder=CrcEncoder(), index="Flat", dtype=dtype))
    for top_k in (1, 5, 40, 600, 1000):
        expected = brute_force(QUERIES, top_k, dtype)
        for setting in ({}, {"dtype": "float32"}, {"dtype": "float16"}, {"dtype": "bfloat16"}):
            spec = {**TORCH, "index": str(tmp_path), "encoder": CrcEncoder(), "device": "cpu", **setting}
            assert found_by(RETRIEVERS.build(spec, corpus=None), top_k=top_k) == expected
        spec = {"name": "dense", "index": str(tmp_path), "encoder": CrcEncoder()}
        for many, library in ((1, "torch"), (10_000, "FAISS")):
            monkeypatch.setattr(FlatSearch, "MANY", many)
            assert found_by(RETRIEVERS.build(spec, corpus=None), top_k=top_k) == expected, library
    assert [name for name, _ in brute_force(QUERIES, 10, dtype)[0]] == [f"p{row}" for row in range(10)]


def test_what_many_queries_need_is_loaded_beforehand(dense_folder: Path) -> None:
    dense = RETRIEVERS.build({"name": "dense", "index": str(dense_folder), "encoder": CrcEncoder()}, corpus=None)
    assert "_products" not in vars(dense._search), "a lone query needs no torch"
    dense.prepare()
    assert "_products" in vars(dense._search)


@pytest.mark.parametrize("block_rows", [1, 7, 64, 599])
def test_torch_in_blocks(dense_folder: Path, monkeypatch: pytest.MonkeyPatch, block_rows: int) -> None:
    monkeypatch.setattr(torch_search, "CPU_BLOCK_ROWS", block_rows)
    for dtype in (None, "bfloat16"):
        spec = {**TORCH, "index": str(dense_folder), "encoder": CrcEncoder(), "dtype": dtype}
        assert found_by(RETRIEVERS.build({**spec, "device": "cpu"}, corpus=None), top_k=12) == brute_force(QUERIES, 12)


@pytest.mark.parametrize("name", ["faiss", "torch", "hybrid"])
def test_on_disk_equals_in_memory(dense_folder: Path, bm25_folder: Path, name: str) -> None:
    in_memory: Any = {"name": "dense", "encoder": CrcEncoder(), "backend": "auto" if name == "hybrid" else name}
    on_disk: Any = {**in_memory, "index": str(dense_folder)}
    if name == "hybrid":
        on_disk = {
            "name": name,
            "retrievers": [on_disk, {"name": "bm25", "index": str(bm25_folder)}],
        }
        in_memory = {"name": name, "retrievers": [in_memory, "bm25"]}
    opened, made = RETRIEVERS.build(on_disk, corpus=None), RETRIEVERS.build(in_memory, corpus=PASSAGES)
    assert found_by(opened) == found_by(made)
    assert found_by(pickle.loads(pickle.dumps(opened))) == found_by(made)


@pytest.mark.parametrize(
    ("settings", "has_gpus", "backend"),
    [
        ({}, True, "faiss"),
        ({"device": "cpu"}, False, "faiss"),
        ({"device": "cuda"}, True, "faiss"),
        ({"device": "cuda:0,cuda:1"}, False, "torch"),
        ({"device": "cuda", "nprobe": 4}, False, "faiss"),
        ({"dtype": "float16"}, True, "torch"),
        ({"ef_search": 4}, False, "faiss"),
        ({"backend": "torch"}, True, "torch"),
        ({"backend": "faiss", "device": "cuda"}, False, "faiss"),
    ],
)
def test_what_auto_comes_to(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], has_gpus: bool, backend: str
) -> None:
    monkeypatch.setattr("agentic_rag_env.retrievers.dense.faiss_has_gpus", lambda: has_gpus)
    assert DenseConfig(**settings).chosen_backend() == backend


def test_without_faiss_torch_searches(monkeypatch: pytest.MonkeyPatch, dense_folder: Path) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    spec = {"name": "dense", "index": str(dense_folder), "encoder": CrcEncoder()}
    assert found_by(RETRIEVERS.build(spec, corpus=None)) == brute_force(QUERIES, 5)


def test_caches_of_older_versions_stay_valid(dense_folder: Path) -> None:
    """Results are kept under these, so they must never change."""
    on_disk = {"index": str(dense_folder), "encoder": CrcEncoder()}
    corpus = fingerprint(PASSAGES)
    index = [{"dtype": "float32"}, {"factory": "Flat", "seed": 0}]
    faiss_identity = {"encoder": "hash of crc", "search": "faiss", "index": index, "nprobe": None, "ef_search": None}
    torch_identity = {"encoder": "hash of crc", "search": "exact", "vectors": {"dtype": "float32"}}
    dense = RETRIEVERS.build({"name": "dense", **on_disk}, corpus=None)
    assert dense.fingerprint == hash_of({**faiss_identity, "corpus": corpus})
    assert RETRIEVERS.build({**TORCH, **on_disk}, corpus=None).fingerprint == hash_of(
        {**torch_identity, "corpus": corpus}
    )


def test_the_former_name_says_the_new_one() -> None:
    for spec in (
        "torch_exact",
        {"name": "torch_exact", "device": "cpu"},
        {"name": "cached", "retriever": "torch_exact"},
    ):
        with pytest.raises(UnknownNameError, match="retriever 'torch_exact' is now 'dense' with backend=torch"):
            RETRIEVERS.build(spec, corpus=PASSAGES)
    assert "torch_exact" not in RETRIEVERS.names()


def test_bm25_on_disk_equals_in_memory(bm25_folder: Path) -> None:
    opened = RETRIEVERS.build({"name": "bm25", "index": str(bm25_folder)}, corpus=None)
    made = RETRIEVERS.build("bm25", corpus=PASSAGES)
    queries = [*QUERIES, "number7 number8 word3", "no such thing", ""]
    assert found_by(opened, queries) == found_by(made, queries)
    assert found_by(opened, ["number300"])[0][0][0] == "p300"
    assert found_by(pickle.loads(pickle.dumps(opened)), queries) == found_by(made, queries)
    assert opened.fingerprint == made.fingerprint
    assert isinstance(opened._index.scores["data"].base, np.memmap)


def test_bm25_over_stems_on_disk(tmp_path: Path, store: CorpusStore, bm25_folder: Path) -> None:
    folder = tmp_path / "stems"
    manifest = build_bm25(store.path, folder, BM25Config(**STEMS))
    assert manifest["index"] == {"k1": 0.9, "b": 0.4, **STEMS, "words": 2}
    assert manifest["versions"].keys() == {"agentic-rag-env", "bm25s", "PyStemmer"}
    opened = RETRIEVERS.build({"name": "bm25", "index": str(folder), **STEMS}, corpus=None)
    made = RETRIEVERS.build({"name": "bm25", **STEMS}, corpus=PASSAGES)
    queries = ["titled", "and", "word3 numbers300 titles", *QUERIES]
    assert found_by(opened, queries) == found_by(made, queries)
    assert [len(found) for found in opened.search(queries[:2], 5)] == [5, 0]
    assert opened.fingerprint == made.fingerprint != RETRIEVERS.build("bm25", corpus=PASSAGES).fingerprint
    for index, asked, message in (
        (folder, {}, r"b=0\.4, stemmer=english, stopwords=english, but k1=0\.9, b=0\.4 are asked"),
        (bm25_folder, STEMS, r"b=0\.4, but k1=0\.9, b=0\.4, stemmer=english, stopwords=english are"),
    ):
        with pytest.raises(ConfigurationError, match=message):
            RETRIEVERS.build({"name": "bm25", "index": str(index), **asked}, corpus=None)


def test_bm25_folders_know_nothing_of_stems_without_them(store: CorpusStore, bm25_folder: Path) -> None:
    before = files_in(bm25_folder)
    assert json.loads(before["manifest.json"])["index"] == {"k1": 0.9, "b": 0.4, "words": 2}
    build_bm25(store.path, bm25_folder, BM25Config(stemmer=None, stopwords=None))
    assert files_in(bm25_folder) == before


def test_a_bm25_index_of_other_words_is_built_again(tmp_path: Path, store: CorpusStore, bm25_folder: Path) -> None:
    shutil.copytree(bm25_folder, tmp_path / "index")
    shutil.copy(store.path, tmp_path)
    manifest = json.loads((bm25_folder / "manifest.json").read_text())
    for of_words in ({}, {"tokenizer": "bigrams", "words": 2}):
        older = {**manifest, "index": {"k1": 0.9, "b": 0.4, **of_words}}
        (tmp_path / "index" / "manifest.json").write_text(json.dumps(older))
        with pytest.raises(DataError, match="was built by another version, which cuts texts into other words; build"):
            RETRIEVERS.build({"name": "bm25", "index": str(tmp_path / "index")}, corpus=PASSAGES)
    build_bm25(tmp_path / "c.arrow", tmp_path / "index", BM25Config())
    assert files_in(tmp_path / "index") == files_in(bm25_folder)


def test_looking_into_all_lists_is_exact(tmp_path: Path, store: CorpusStore) -> None:
    build_dense(store.path, tmp_path, DenseIndexConfig(encoder=CrcEncoder(), index="IVF16,Flat"))
    one, all_lists = (
        RETRIEVERS.build({"name": "dense", "index": str(tmp_path), "encoder": CrcEncoder(), "nprobe": n}, corpus=None)
        for n in (1, 16)
    )
    assert found_by(all_lists) == brute_force(QUERIES, 5)
    assert found_by(one) != brute_force(QUERIES, 5)
    assert one.fingerprint != all_lists.fingerprint


def test_a_learned_encoder_travels_with_the_index(tmp_path: Path, store: CorpusStore) -> None:
    build_dense(store.path, tmp_path, DenseIndexConfig(encoder={"name": "hashed_ngram", "dim": 64}))
    opened = RETRIEVERS.build({"name": "dense", "index": str(tmp_path)}, corpus=None)
    made = RETRIEVERS.build({"name": "dense", "encoder": {"name": "hashed_ngram", "dim": 64}}, corpus=PASSAGES)
    assert found_by(opened) == found_by(made)
    fitted = HashedNgramEncoder()
    fitted.fit(["amber"])
    assert isinstance(fitted, StoredEncoder)
    assert fitted.fingerprint != HashedNgramEncoder().fingerprint


def test_what_another_version_learned_is_learned_anew(
    tmp_path: Path, store: CorpusStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An index whose vectors were deleted, built when words were cut in another way."""
    config = DenseIndexConfig(encoder={"name": "hashed_ngram", "dim": 64})
    build_dense(store.path, tmp_path / "new", config)
    monkeypatch.setattr(hashed_ngram, "WORDS", {"words": 1})
    monkeypatch.setattr(HashedNgramEncoder, "state", lambda self: {"num_passages": 7, "document_frequency": {}})
    build_dense(store.path, tmp_path / "index", config)
    monkeypatch.undo()
    shutil.rmtree(tmp_path / "index" / "vectors")
    build_dense(store.path, tmp_path / "index", config)
    assert files_in(tmp_path / "index") == files_in(tmp_path / "new")


# Refused


def test_another_corpus_is_refused(dense_folder: Path, bm25_folder: Path) -> None:
    other = PASSAGES[:-1]
    for spec, folder in (({"name": "dense"}, dense_folder), (TORCH, dense_folder), ({"name": "bm25"}, bm25_folder)):
        with pytest.raises(DataError) as caught:
            RETRIEVERS.build({**spec, "index": str(folder)}, corpus=other)
        assert f"was built from the corpus {fingerprint(PASSAGES)} with 600" in str(caught.value)
        assert f"the corpus given is {fingerprint(other)} with 599" in str(caught.value)


def test_another_encoder_is_refused(dense_folder: Path) -> None:
    spec = {"name": "dense", "index": str(dense_folder), "encoder": CrcEncoder(name="other")}
    with pytest.raises(
        DataError, match=r"built with the encoder hash of crc .* but the encoder given is hash of other"
    ):
        RETRIEVERS.build(spec, corpus=None)


def test_a_folder_keeps_to_its_corpus_and_encoder(tmp_path: Path, store: CorpusStore) -> None:
    build_dense(store.path, tmp_path, DenseIndexConfig(encoder=CrcEncoder(), index="Flat"))
    before = files_in(tmp_path)
    with pytest.raises(DataError, match=r"holds vectors of .*hash of crc.* but asked for are .*hash of other"):
        build_dense(store.path, tmp_path, DenseIndexConfig(encoder=CrcEncoder(name="other"), index="Flat"))
    assert files_in(tmp_path) == before


def test_a_folder_keeps_its_corpus_where_the_file_has_grown(tmp_path: Path, store: CorpusStore) -> None:
    """The command that is refused leaves the index as it was, the passages written out beside it included."""
    corpus, folder = tmp_path / "c.jsonl", tmp_path / "index"
    rows = [json.dumps({"id": passage.id, "contents": passage.contents}) + "\n" for passage in PASSAGES]
    corpus.write_text("".join(rows[:-1]))
    build_dense(corpus, folder, DenseIndexConfig(encoder=CrcEncoder(), index="Flat"))
    before = files_in(folder)
    corpus.write_text("".join(rows))
    with pytest.raises(
        DataError, match=r"belongs to files .* but the passages given are .*, 600 of them; choose another"
    ):
        build_dense(corpus, folder, DenseIndexConfig(encoder=CrcEncoder(), index="Flat"))
    assert files_in(folder) == before
    retriever = RETRIEVERS.build({"name": "dense", "index": str(folder), "encoder": CrcEncoder()}, corpus=None)
    assert len(retriever.corpus) == 599
    corpus.write_text("".join(rows[:-1]))  # the same passages, written anew
    build_dense(corpus, folder, DenseIndexConfig(encoder=CrcEncoder(), index="Flat"))


def test_a_strangers_index_names_no_place_of_this_machine(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(
        json.dumps({**manifest, "corpus": {**manifest["corpus"], "path": "/etc/hostname"}})
    )
    spec = {"name": "dense", "index": str(copied), "encoder": CrcEncoder()}
    with pytest.raises(DataError, match="names the corpus /etc/hostname; only a path that begins at the folder"):
        RETRIEVERS.build(spec, corpus=None)
    assert main(["check", str(copied)]) == 2
    assert "names the corpus /etc/hostname" in capsys.readouterr().err

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    settings = {"name": "huggingface", "model": "stranger/model"}
    encoder = {**manifest["encoder"], "settings": settings}
    (copied / "manifest.json").write_text(json.dumps({**manifest, "encoder": encoder}))
    with pytest.raises(ConfigurationError, match="stranger/model"):
        RETRIEVERS.build({"name": "dense", "index": str(copied)}, corpus=None)
    assert f"The encoder of {copied}, stranger/model, is looked for on the Hugging Face hub." in capsys.readouterr().out


def test_a_moved_corpus_is_asked_for(tmp_path: Path, store: CorpusStore) -> None:
    shutil.copy(store.path, tmp_path / "c.arrow")
    build_dense(tmp_path / "c.arrow", tmp_path / "index", DenseIndexConfig(encoder=CrcEncoder(), index="Flat"))
    (tmp_path / "c.arrow").rename(tmp_path / "moved.arrow")
    spec = {"name": "dense", "index": str(tmp_path / "index"), "encoder": CrcEncoder()}
    with pytest.raises(DataError, match=r"its corpus is not at .*c\.arrow any more; give .* a corpus=<file>"):
        RETRIEVERS.build(spec, corpus=None)
    moved = RETRIEVERS.build({**spec, "corpus": str(tmp_path / "moved.arrow")}, corpus=None)
    assert found_by(moved) == brute_force(QUERIES, 5)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"index": "Flatt"}, "FAISS cannot build index='Flatt' of 600 vectors of 16 numbers"),
        ({"index": "IVF4000,Flat"}, "FAISS cannot build index='IVF4000,Flat'"),
        ({"dtype": "int8"}, "dtype must be one of float32, float16, got 'int8'"),
        ({"shard_size": 0}, "shard_size must be an integer of at least 1, got 0"),
        ({"encoder": object()}, "encoder object cannot build an index on disk"),
    ],
)
def test_settings_that_cannot_work(tmp_path: Path, store: CorpusStore, setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_dense(store.path, tmp_path, DenseIndexConfig(**{"encoder": CrcEncoder(), **setting}))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"nprobe": 4}, "nprobe=4 was given, but an index of type IndexFlatIP has no such parameter"),
        ({"ef_search": 0}, "ef_search must be an integer of at least 1, or None, got 0"),
        ({"device": "cuda", "backend": "faiss"}, "needs a GPU and a FAISS built for it; backend=torch searches"),
        ({"backend": "fais"}, "got 'fais'. Did you mean 'faiss'"),
        ({"backend": "torch", "nprobe": 4}, "nprobe is a setting of backend=faiss"),
        ({"backend": "faiss", "dtype": "float16"}, "dtype=float16 is a setting of backend=torch"),
        ({"nprobe": 4, "dtype": "float16"}, "dtype=float16 is a setting of backend=torch"),
        ({"dtype": "int8"}, "one of float32, float16, bfloat16, or None, got 'int8'"),
    ],
)
def test_ways_of_searching_that_cannot_work(dense_folder: Path, setting: dict[str, Any], message: str) -> None:
    if setting.get("device") and hasattr(faiss, "StandardGpuResources"):
        pytest.skip("this FAISS was built for GPUs")
    with pytest.raises(ConfigurationError, match=message):
        RETRIEVERS.build({"name": "dense", "index": str(dense_folder), "encoder": CrcEncoder(), **setting}, corpus=None)


def test_torch_device_that_is_not_there(dense_folder: Path) -> None:
    spec = {**TORCH, "index": str(dense_folder), "encoder": CrcEncoder(), "device": "cuda:99"}
    with pytest.raises(ConfigurationError, match="dense backend=torch cannot use device='cuda:99'"):
        RETRIEVERS.build(spec, corpus=None)


def test_folders_of_the_wrong_kind(dense_folder: Path, bm25_folder: Path, tmp_path: Path) -> None:
    for name, folder, message in (
        ("dense", bm25_folder, "holds an index of kind 'bm25', but 'dense' is needed"),
        ("bm25", dense_folder, "holds an index of kind 'dense', but 'bm25' is needed"),
        ("bm25", tmp_path, "holds no finished index"),
        ("dense", tmp_path / "none", "there is no such index"),
    ):
        with pytest.raises(DataError, match=message):
            RETRIEVERS.build({"name": name, "index": str(folder)}, corpus=PASSAGES)
    with pytest.raises(ConfigurationError, match=r"was built with k1=0\.9, b=0\.4, but k1=1\.2"):
        RETRIEVERS.build({"name": "bm25", "index": str(bm25_folder), "k1": 1.2}, corpus=None)


@pytest.mark.parametrize("name", ["bm25/vocabulary.arrow", "bm25/data.csc.index.npy"])
def test_a_damaged_bm25_folder(tmp_path: Path, bm25_folder: Path, name: str) -> None:
    shutil.copytree(bm25_folder, tmp_path / "index")
    (tmp_path / "index" / name).write_bytes(b"nonsense")
    with pytest.raises(DataError, match="is a damaged BM25 index"):
        RETRIEVERS.build({"name": "bm25", "index": str(tmp_path / "index")}, corpus=PASSAGES)


def test_vectors_that_were_deleted(tmp_path: Path, dense_folder: Path) -> None:
    shutil.copytree(dense_folder, tmp_path / "index")
    shutil.rmtree(tmp_path / "index" / "vectors")
    spec = {"index": str(tmp_path / "index"), "encoder": CrcEncoder()}
    assert found_by(RETRIEVERS.build({"name": "dense", **spec}, corpus=PASSAGES)) == brute_force(QUERIES, 5)
    with pytest.raises(DataError, match=r"vectors\.npy: is missing.* delete .*manifest\.json and give the same"):
        RETRIEVERS.build({**TORCH, **spec}, corpus=PASSAGES)
    (tmp_path / "index" / "manifest.json").unlink()
    shutil.copy(dense_folder.parent / "c.arrow", tmp_path)
    build_dense(tmp_path / "c.arrow", tmp_path / "index", DenseIndexConfig(encoder=CrcEncoder(), index="Flat"))
    assert files_in(tmp_path / "index") == files_in(dense_folder)
    assert found_by(RETRIEVERS.build({**TORCH, **spec}, corpus=PASSAGES)) == brute_force(QUERIES, 5)


def test_a_finished_index_needs_no_vectors_to_be_finished(tmp_path: Path, store: CorpusStore) -> None:
    config = DenseIndexConfig(encoder=CrcEncoder(tmp_path / "log"), index="Flat")
    manifest = build_dense(store.path, tmp_path / "index", config)
    shutil.rmtree(tmp_path / "index" / "vectors")
    (tmp_path / "log").unlink()
    assert build_dense(store.path, tmp_path / "index", config) == manifest
    assert not (tmp_path / "log").exists(), "nothing is encoded again"
    other = DenseIndexConfig(encoder=config.encoder, index="HNSW8")
    assert build_dense(store.path, tmp_path / "index", other)["index"]["factory"] == "HNSW8"
    assert (tmp_path / "log").exists()


# Damaged, and built again by the same command


def harm(file: Path, how: str) -> None:
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes({"short": content[:middle], "empty": b"", "changed": flipped}[how])


FILES_OF_DENSE = ("index.faiss", "encoder.json", "vectors/vectors.npy")
HARMS = ("short", "empty", "changed", "gone")


@pytest.mark.parametrize(
    ("name", "how"),
    [*((name, how) for name in FILES_OF_DENSE for how in HARMS), ("manifest.json", "short"), ("manifest.json", "gone")],
)
def test_a_damaged_dense_index_is_built_again(
    copied: Path, dense_folder: Path, tmp_path: Path, name: str, how: str
) -> None:
    harm(copied / name, how)
    log = tmp_path / "log"
    log.touch()
    build_dense(tmp_path / "c.arrow", copied, DenseIndexConfig(encoder=CrcEncoder(log), index="Flat"))
    expected = files_in(dense_folder)
    if (name, how) == ("vectors/vectors.npy", "gone"):  # they may be deleted
        del expected[name]
    assert files_in(copied) == expected
    encoded = len(log.read_text().splitlines())
    assert encoded == (NUM_PASSAGES if name == "vectors/vectors.npy" and how != "gone" else 0), "only what was damaged"


def test_index_and_vectors_are_made_again_together(copied: Path, dense_folder: Path, tmp_path: Path) -> None:
    harm(copied / "index.faiss", "short")
    harm(copied / "vectors/vectors.npy", "gone")
    build_dense(tmp_path / "c.arrow", copied, DenseIndexConfig(encoder=CrcEncoder(), index="Flat"))
    assert files_in(copied) == files_in(dense_folder)


def test_damaged_vectors_build_no_other_index(copied: Path, tmp_path: Path) -> None:
    harm(copied / "vectors/vectors.npy", "changed")
    build_dense(tmp_path / "c.arrow", copied, DenseIndexConfig(encoder=CrcEncoder(), index="IVF1,Flat"))
    opened = RETRIEVERS.build({"name": "dense", "index": str(copied), "encoder": CrcEncoder()}, corpus=None)
    assert found_by(opened) == brute_force(QUERIES, 5)


@pytest.mark.parametrize("how", HARMS)
@pytest.mark.parametrize("name", ["bm25/data.csc.index.npy", "bm25/vocabulary.arrow"])
def test_a_damaged_bm25_index_is_built_again(
    tmp_path: Path, bm25_folder: Path, store: CorpusStore, name: str, how: str
) -> None:
    shutil.copytree(bm25_folder, tmp_path / "index")
    shutil.copy(store.path, tmp_path)
    harm(tmp_path / "index" / name, how)
    if how != "changed":
        with pytest.raises(DataError, match=r"is a damaged BM25 index .* build it again"):
            RETRIEVERS.build({"name": "bm25", "index": str(tmp_path / "index")}, corpus=PASSAGES)
    build_bm25(tmp_path / "c.arrow", tmp_path / "index", BM25Config())
    assert files_in(tmp_path / "index") == files_in(bm25_folder)


def test_a_damaged_store_in_an_index_folder_is_written_again(tmp_path: Path) -> None:
    corpus, folder = tmp_path / "c.jsonl", tmp_path / "index"
    corpus.write_text("".join(json.dumps({"id": p.id, "contents": p.contents}) + "\n" for p in PASSAGES))
    build_bm25(corpus, folder, BM25Config())
    before = files_in(folder)
    harm(folder / "corpus.arrow", "changed")
    assert main(["check", str(folder)]) == 2
    build_bm25(corpus, folder, BM25Config())
    assert files_in(folder) == before


def test_a_strangers_manifest_has_no_other_file_removed(copied: Path, tmp_path: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, "files": {"../c.arrow": "0"}}))
    with pytest.raises(DataError, match=r"names '\.\./c\.arrow', which is no file of the folder"):
        build_dense(tmp_path / "c.arrow", copied, DenseIndexConfig(encoder=CrcEncoder(), index="Flat"))
    assert (tmp_path / "c.arrow").exists()


@pytest.mark.parametrize("how", ["empty", "short"])
def test_torch_says_how_vectors_are_made_again(copied: Path, how: str) -> None:
    harm(copied / "vectors/vectors.npy", how)
    with pytest.raises(DataError, match=r"vectors\.npy: cannot be read .*; give the same agentic-rag-index"):
        RETRIEVERS.build({**TORCH, "index": str(copied), "encoder": CrcEncoder()}, corpus=None)


@pytest.mark.parametrize(
    ("entry", "changed"),
    [("corpus", None), ("corpus", {"path": "c"}), ("index", None), ("encoder", {}), ("vectors", "float32")],
)
def test_a_manifest_without_its_entries(copied: Path, entry: str, changed: Any) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    (copied / "manifest.json").write_text(json.dumps({**manifest, entry: changed}))
    with pytest.raises(DataError, match=rf"manifest\.json: is damaged \(it has {entry} .*build the index again"):
        RETRIEVERS.build({"name": "dense", "index": str(copied), "encoder": CrcEncoder()}, corpus=None)


# Files of Search-R1


@pytest.fixture
def search_r1(tmp_path: Path) -> dict[str, Any]:
    """Files as Search-R1 publishes them: JSON lines with `id` and `contents`, and a bare flat index."""
    corpus, index = tmp_path / "wiki-18.jsonl", tmp_path / "e5_Flat.index"
    corpus.write_text("".join(json.dumps({"id": p.id, "contents": p.contents}) + "\n" for p in PASSAGES))
    flat = faiss.index_factory(16, "Flat", faiss.METRIC_INNER_PRODUCT)
    flat.add(CrcEncoder().encode_queries([passage.contents for passage in PASSAGES]))
    faiss.write_index(flat, str(index))
    return {"index": str(index), "corpus": str(corpus), "encoder": CrcEncoder()}


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_files_of_search_r1(search_r1: dict[str, Any], backend: str) -> None:
    retriever = RETRIEVERS.build({"name": "dense", "backend": backend, **search_r1}, corpus=None)
    assert found_by(retriever) == brute_force(QUERIES, 5)
    assert found_by(pickle.loads(pickle.dumps(retriever))) == brute_force(QUERIES, 5)
    assert not Path(search_r1["corpus"] + ".arrow").exists()


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_a_bare_index_is_known_by_its_contents(search_r1: dict[str, Any], backend: str, tmp_path: Path) -> None:
    elsewhere, other = tmp_path / "copy.index", tmp_path / "other.index"
    shutil.copy(search_r1["index"], elsewhere)
    changed = faiss.read_index(search_r1["index"])
    faiss.rev_swig_ptr(changed.get_xb(), changed.ntotal * changed.d)[:] *= -1
    faiss.write_index(changed, str(other))
    first, copied, different = (
        RETRIEVERS.build(
            {"name": "dense", "backend": backend, **search_r1, "index": str(file)}, corpus=None
        ).fingerprint
        for file in (search_r1["index"], elsewhere, other)
    )
    assert first is not None
    assert first == copied != different


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_files_of_search_r1_that_do_not_fit(search_r1: dict[str, Any], backend: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="does not say which encoder made it"):
        RETRIEVERS.build({"name": "dense", "backend": backend, **search_r1, "encoder": None}, corpus=None)
    with pytest.raises(DataError, match="vectors of 16 numbers, but the encoder gives 8"):
        RETRIEVERS.build({"name": "dense", "backend": backend, **search_r1, "encoder": CrcEncoder(dim=8)}, corpus=None)
    with pytest.raises(DataError, match="has 600 rows, but the corpus has 599 passages"):
        RETRIEVERS.build({"name": "dense", "backend": backend, **search_r1, "corpus": None}, corpus=PASSAGES[1:])
    Path(search_r1["index"]).write_bytes(b"nonsense")
    with pytest.raises(DataError, match="is no FAISS index, or a damaged one"):
        RETRIEVERS.build({"name": "dense", "backend": backend, **search_r1}, corpus=None)
    faiss.write_index(faiss.IndexFlatL2(16), search_r1["index"])
    with pytest.raises(DataError, match="does not search by inner products"):
        RETRIEVERS.build({"name": "dense", "backend": backend, **search_r1}, corpus=None)


# The command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus = tmp_path / "c.jsonl"
    corpus.write_text("".join(json.dumps({"id": p.id, "contents": p.contents}) + "\n" for p in PASSAGES))
    assert main(["store", str(corpus), str(tmp_path / "c.arrow")]) == 0
    assert f"600 passages, fingerprint {fingerprint(PASSAGES)}" in capsys.readouterr().out
    encoder = '{"name": "hashed_ngram", "dim": 32}'
    assert main(["dense", str(corpus), str(tmp_path / "dense"), "--encoder", encoder, "--dtype", "float16"]) == 0
    assert "dense, factory Flat, seed 0, num_queries 256, recall@3 1.0, recall@10 1.0" in capsys.readouterr().out
    assert (tmp_path / "dense" / "corpus.arrow").exists()
    assert np.load(tmp_path / "dense" / "vectors" / "vectors.npy").dtype == np.float16
    assert main(["bm25", str(corpus), str(tmp_path / "bm25"), "--k1", "1.2"]) == 0
    assert "600 passages, bm25, k1 1.2, b 0.4, words 2\n" in capsys.readouterr().out
    words = ["--stemmer", "english", "--stopwords", "english"]
    assert main(["bm25", str(corpus), str(tmp_path / "bm25"), *words]) == 0
    assert "k1 0.9, b 0.4, stemmer english, stopwords english, words 2\n" in capsys.readouterr().out
    found = {"dense": "dense index, 3 files as built; ", "bm25": "bm25 index, 6 files as built; ", "c.arrow": ""}
    for name, checked in {**found, "c.jsonl": ""}.items():
        assert main(["check", str(tmp_path / name)]) == 0
        expected = f"{tmp_path / name}: {checked}600 passages, fingerprint {fingerprint(PASSAGES)}\n"
        assert capsys.readouterr().out.endswith(expected)


@pytest.fixture
def copied(tmp_path: Path, dense_folder: Path, store: CorpusStore) -> Path:
    """A dense index with its store, to be harmed."""
    shutil.copytree(dense_folder, tmp_path / "index")
    shutil.copy(store.path, tmp_path / "c.arrow")
    return tmp_path / "index"


@pytest.mark.parametrize("name", ["index.faiss", "encoder.json", "vectors/vectors.npy"])
def test_a_file_that_was_changed_is_found_when_asked(
    copied: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content = bytearray((copied / name).read_bytes())
    content[-1] ^= 1
    (copied / name).write_bytes(content)
    assert main(["check", str(copied)]) == 2
    assert f"{copied / name}: is not what was built" in capsys.readouterr().err


def test_what_else_a_check_finds(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def check(status: int, message: str) -> None:
        assert main(["check", str(copied)]) == status
        output = capsys.readouterr()
        assert message in output.out + output.err

    shutil.rmtree(copied / "vectors")  # as its docstring allows
    check(0, "2 files as built")
    manifest = json.loads((copied / "manifest.json").read_text())
    changes: list[tuple[dict[str, Any], str]] = [
        ({"files": {"../c.arrow": "0"}}, "names '../c.arrow', which is no file of the folder"),
        ({"files": {"/etc/hostname": "0"}}, "names '/etc/hostname', which is no file of the folder"),
        ({"files": 5}, "manifest.json: is damaged"),
        ({"corpus": {}}, "manifest.json: is damaged"),
        ({"corpus": {**manifest["corpus"], "fingerprint": "0"}}, "was built from the corpus 0 with 600 passages"),
    ]
    for change, message in changes:
        (copied / "manifest.json").write_text(json.dumps({**manifest, **change}))
        check(2, message)
    older = {key: value for key, value in manifest.items() if key != "files"}
    (copied / "manifest.json").write_text(json.dumps(older))
    check(0, "whose files were not hashed when it was built")
    RETRIEVERS.build({"name": "dense", "index": str(copied), "encoder": CrcEncoder()}, corpus=None)
    (copied / "index.faiss").unlink()
    (copied / "manifest.json").write_text(json.dumps(manifest))
    check(2, "index.faiss: is missing")
    (copied / "manifest.json").unlink()
    check(2, "holds no finished index")
    copied.parent.joinpath("c.arrow").write_bytes(b"")
    assert main(["check", str(copied.parent / "c.arrow")]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bm25", "none.jsonl", "index"], "none.jsonl: cannot be read: No such file"),
        (["bm25", "c.jsonl", "index", "--b", "2"], "b must be in [0, 1], got 2.0"),
        (["bm25", "c.jsonl", "index", "--stemmer", "englsh"], "PyStemmer has no stemmer 'englsh'. Did you mean"),
        (
            ["dense", "c.jsonl", "index", "--encoder", "hashed"],
            "Unknown encoder 'hashed'. Did you mean 'hashed_ngram'?",
        ),
        (["dense", "c.jsonl", "index", "--index", "nonsense"], "FAISS cannot build index='nonsense'"),
        (["store", "c.jsonl", "c.txt"], "a store needs a name in .arrow"),
    ],
)
def test_the_command_refuses(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("c.jsonl").write_text('{"id": "a", "contents": "amber birch"}\n')
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


# A model of transformers


def test_a_model_is_known_by_its_weights(tmp_path: Path, store: CorpusStore) -> None:
    import torch
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: place for place, word in enumerate(["[UNK]", "word1", "word2", "Title", "and"])}
    inner = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=len(words), **sizes))
    for name in ("one", "moved", "tuned"):
        transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]").save_pretrained(tmp_path / name)
        if name == "tuned":
            with torch.no_grad():
                model.encoder.layer[0].output.dense.bias[3] += 1e-3
        model.save_pretrained(tmp_path / name)
    build_dense(
        store.path, tmp_path / "index", DenseIndexConfig(encoder={"model": str(tmp_path / "one"), "preset": "e5"})
    )
    expected = build_encoder({"model": str(tmp_path / "one"), "preset": "e5"}).encode_passages([PASSAGES[70].contents])
    np.testing.assert_allclose(np.load(tmp_path / "index/vectors/vectors.npy")[70:71], expected, atol=1e-6)
    shutil.rmtree(tmp_path / "one")
    moved = {"model": str(tmp_path / "moved"), "preset": "e5", "batch_size": 3, "dtype": "bfloat16"}
    RETRIEVERS.build({"name": "dense", "index": str(tmp_path / "index"), "encoder": moved}, corpus=None)
    e5 = {"query_prefix": "query: ", "passage_prefix": "passage: "}
    by_cls = {"model": moved["model"], "pooling": "cls", **e5}
    for other in ({**moved, "model": str(tmp_path / "tuned")}, by_cls, {**moved, "query_prefix": ""}):
        with pytest.raises(DataError, match=r"was built with the encoder .* but the encoder given is"):
            RETRIEVERS.build({"name": "dense", "index": str(tmp_path / "index"), "encoder": other}, corpus=None)
