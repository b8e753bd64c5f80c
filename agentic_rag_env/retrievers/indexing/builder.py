"""Builds index folders. Finished work is on disk, so after a kill the same command goes on where it was."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentic_rag_env.cache_folder import digest_of
from agentic_rag_env.corpus import CorpusStore, Texts, open_corpus
from agentic_rag_env.errors import DataError
from agentic_rag_env.files import remove_partial, sync_all, written_whole
from agentic_rag_env.retrievers.bm25 import BM25_FOLDER, BM25Config, index_texts, save_index
from agentic_rag_env.retrievers.index_folder import (
    ENCODER_STATE,
    FAISS_FILE,
    MANIFEST,
    VECTORS_FILE,
    files_of_index,
    load_vectors,
    read_json,
    write_json,
)
from agentic_rag_env.retrievers.indexing.faiss_builder import build_index, default_index, measure_recall
from agentic_rag_env.retrievers.indexing.progress import Phase, silent
from agentic_rag_env.retrievers.vectors.encoders import StoredEncoder, build_encoder, first_not_finite, stored
from agentic_rag_env.settings import COUNT, check_settings, one_of, or_none

#: The file that says which corpus and encoder the vectors in an index folder belong to.
_ENCODING = "vectors/encoding.json"


@dataclass
class DenseIndexConfig:
    """What a dense index is made of.

    Attributes:
        encoder: A registered name, the folder or hub id of a model, or a mapping with `name` or `model` and settings.
        index: A FAISS factory string (`Flat`, `IVF4096,Flat`, `IVF4096,PQ64`, `HNSW32`, `SQfp16`, ...), or `auto`: see
            `default_index`.
        dtype: Precision of the vectors on disk, `float32` or `float16` (half the size; the usual choice from a million
            passages on).
        shard_size: Number of passages encoded between two savings; a kill can cost so many. The files do not depend on
            it.
        seed: Seed of the vectors that the index is trained on and of the queries of the recall report.
        threads: Number of threads that build the index. None: all threads, but one for an HNSW graph, since several
            threads build another graph every time.
    """

    encoder: Any = "hashed_ngram"
    index: str = "auto"
    dtype: str = "float32"
    shard_size: int = 8192
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        check_settings(self, one_of(["float32", "float16"]), "dtype")
        check_settings(self, COUNT, "shard_size")
        check_settings(self, or_none(COUNT), "threads")


def build_dense(
    corpus: str | Path, folder: str | Path, config: DenseIndexConfig, phase: Phase = silent
) -> dict[str, Any]:
    """Encode a corpus and index the vectors by FAISS.

    The folder then holds `manifest.json`, `index.faiss`, `encoder.json` (what the encoder learned) and `vectors/`. It
    also holds `corpus.arrow` if the corpus was no store. `vectors/` serves `dense` with `backend=torch`, and builds
    another kind of index without encoding again; it may be deleted. The files are the same whether or not the process
    was killed on the way.

    Args:
        corpus: A store, or a file that `passages_in` reads.
        folder: The folder, made if it is missing. An unfinished index in it is finished; another kind is replaced. A
            file of it that was damaged is made again.
        config: The settings.
        phase: Shows progress.

    Returns:
        The manifest, with the recall of the index.

    Raises:
        ConfigurationError: A setting can't work.
        DataError: The corpus is malformed, an encoder gives numbers that are not finite, the folder belongs to another
            corpus or encoder, or another process builds in it.
    """
    folder = Path(folder).expanduser()
    with _builder_of(folder):
        store = _corpus_store(corpus, folder, phase, _read(folder / _ENCODING).get("corpus"))
        encoder = stored(build_encoder(config.encoder), "build an index on disk")
        _drop_damaged(folder, _corpus_entry(store, folder), encoder.settings(), phase)
        learned = _fit(encoder, store, folder, phase)
        factory = default_index(len(store)) if config.index == "auto" else config.index
        manifest: dict[str, Any] = {
            "kind": "dense",
            "corpus": _corpus_entry(store, folder),
            "encoder": {"settings": encoder.settings(), "fingerprint": encoder.fingerprint},
            "vectors": {"dtype": config.dtype},
            "index": {"factory": factory, "seed": config.seed},
            "versions": _versions("faiss"),
        }
        if (finished := _finished(folder, manifest)) is not None:
            return finished
        _claim(folder, manifest, learned)
        vectors = _encode(store, encoder, folder, config, phase)
        (folder / MANIFEST).unlink(missing_ok=True)
        index = build_index(vectors, factory, config.seed, config.threads, phase)
        import faiss

        with written_whole(folder / FAISS_FILE) as partial:
            faiss.write_index(index, str(partial))
        manifest["recall"] = measure_recall(index, vectors, Texts(store), encoder, config.seed, phase)
        manifest["files"] = _digests(folder, [FAISS_FILE, ENCODER_STATE, VECTORS_FILE], phase)
        write_json(folder / MANIFEST, manifest)
        return manifest


def build_bm25(corpus: str | Path, folder: str | Path, config: BM25Config, phase: Phase = silent) -> dict[str, Any]:
    """Index a corpus by its words.

    The folder then holds `manifest.json`, `bm25/` and, if the corpus was no store, `corpus.arrow`. Building takes
    memory: about 30 bytes per distinct word of each passage.

    Args:
        corpus: A store, or a file that `passages_in` reads.
        folder: The folder, made if it is missing. A damaged index in it is made again.
        config: The settings.
        phase: Shows progress.

    Returns:
        The manifest.

    Raises:
        ConfigurationError: The corpus holds no words, or the stemmer or the list of stop words is missing.
        DataError: The corpus is malformed, or another process builds in the folder.
    """
    config.make_tokenizer().words(())  # reports a missing library before anything long begins
    folder = Path(folder).expanduser()
    with _builder_of(folder):
        store = _corpus_store(corpus, folder, phase)
        _drop_damaged(folder, _corpus_entry(store, folder), None, phase)
        manifest = {
            "kind": "bm25",
            "corpus": _corpus_entry(store, folder),
            "index": config.of_index(),
            "versions": _versions("bm25s") | ({"PyStemmer": version("PyStemmer")} if config.stemmer else {}),
        }
        if (finished := _finished(folder, manifest)) is not None:
            return finished
        (folder / MANIFEST).unlink(missing_ok=True)
        with phase("Reading words", len(store)) as advance:
            index, vocabulary = index_texts(Texts(store), config, advance)
        with phase("Saving", None):
            partial = folder / f".{BM25_FOLDER}.saving"
            shutil.rmtree(partial, ignore_errors=True)
            save_index(index, vocabulary, partial)
            sync_all(partial)
            shutil.rmtree(folder / BM25_FOLDER, ignore_errors=True)
            partial.rename(folder / BM25_FOLDER)
        names = sorted(f"{BM25_FOLDER}/{file.name}" for file in (folder / BM25_FOLDER).iterdir())
        manifest["files"] = _digests(folder, names, phase)
        write_json(folder / MANIFEST, manifest)
        return manifest


@contextmanager
def _builder_of(folder: Path) -> Iterator[None]:
    """Keep other builders out of a folder; the lock ends with the process."""
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"{folder}: cannot be made: {error.strerror}.") from error
    try:
        locked = FileLock(folder / ".lock", timeout=0).acquire()
    except Timeout as error:
        raise DataError(f"{folder}: another process is building an index here; wait for it.") from error
    except (OSError, NotImplementedError) as error:
        raise DataError(f"{folder}: cannot be locked: {error}; build on a local disk.") from error
    with locked:
        remove_partial(folder)
        remove_partial(folder / "vectors")
        yield


def _corpus_store(corpus: str | Path, folder: Path, phase: Phase, needed: str | None = None) -> CorpusStore:
    """The passages as a store, which is written into the folder unless the corpus is one."""
    with phase("Reading passages", None) as advance:
        return open_corpus(corpus, folder / "corpus.arrow", advance, needed)


def _corpus_entry(store: CorpusStore, folder: Path) -> dict[str, Any]:
    path = os.path.relpath(store.path.resolve(), folder.resolve())
    return {"path": path, "fingerprint": store.fingerprint, "num_passages": len(store)}


def _digests(folder: Path, names: list[str], phase: Phase) -> dict[str, str]:
    """Hashes of files, by which `agentic-rag-index check` finds damage."""
    with phase("Hashing files", len(names)) as advance:
        digests = {}
        for name in names:
            digests[name] = digest_of(folder / name)
            advance(1)
    return digests


def _versions(library: str) -> dict[str, str]:
    return {"agentic-rag-env": version("agentic-rag-env"), library: import_module(library).__version__}


def _read(file: Path) -> dict[str, Any]:
    """The object in a JSON file of the folder; empty if the file is missing or damaged, so that it is written again."""
    try:
        return read_json(file)
    except DataError:
        return {}


def _drop_damaged(folder: Path, corpus: dict[str, Any], encoder: dict[str, Any] | None, phase: Phase) -> None:
    """Remove the damaged files of an index of this corpus and encoder, and its manifest, so that they are made again.

    An index of another corpus or encoder stays as it is. So does one whose vectors are missing, as they may be.
    """
    manifest = _read(folder / MANIFEST)
    built_with = manifest.get("encoder") or {}
    if manifest.get("corpus") != corpus or built_with.get("settings") != encoder:
        return
    files = files_of_index(folder, manifest)
    found = _digests(folder, [name for name in files if (folder / name).exists()], phase)
    damaged = [name for name in found if found[name] != files[name]]
    if damaged or files.keys() - found.keys() - {VECTORS_FILE}:
        (folder / MANIFEST).unlink()
    for name in damaged:
        (folder / name).unlink()


def _finished(folder: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a folder if it holds the index that is asked for, else None."""
    manifest = _read(folder / MANIFEST)
    same = all(manifest.get(key) == value for key, value in asked.items() if key != "versions")
    return manifest if same else None


def _fit(encoder: StoredEncoder, store: CorpusStore, folder: Path, phase: Phase) -> dict[str, Any]:
    """Let the encoder learn from the corpus, or take over what it learned before; returns the content of its file."""
    # The fingerprint before it learns: another version may learn something else by the same settings.
    known = {"corpus": store.fingerprint, "settings": encoder.settings(), "encoder": encoder.fingerprint}
    saved = _read(folder / ENCODER_STATE)
    if saved.get("learned_by") == known:
        encoder.load_state(saved["state"])
        return saved
    with phase("Fitting the encoder", None):
        encoder.fit(Texts(store))
    return {"learned_by": known, "state": encoder.state()}


def _claim(folder: Path, manifest: dict[str, Any], learned: dict[str, Any]) -> None:
    """Note whose vectors the folder holds, with what the encoder has learned.

    Raises:
        DataError: The folder holds the vectors of another corpus or encoder.
    """
    belongs_to = {
        "corpus": manifest["corpus"]["fingerprint"],
        "encoder": manifest["encoder"]["fingerprint"],
        "dtype": manifest["vectors"]["dtype"],
    }
    note = folder / _ENCODING
    if note.exists() and (found := _read(note)) != belongs_to:
        raise DataError(
            f"{folder}: holds vectors of {found}, but asked for are {belongs_to}; choose another folder, or delete it."
        )
    note.parent.mkdir(exist_ok=True)
    write_json(folder / ENCODER_STATE, learned)
    write_json(note, belongs_to)


def _encode(
    store: CorpusStore,
    encoder: StoredEncoder,
    folder: Path,
    config: DenseIndexConfig,
    phase: Phase,
) -> NDArray[np.floating]:
    """The vectors of all passages, [n, dim], memory-mapped; vectors that are on disk already are not made again."""
    whole = folder / VECTORS_FILE
    with phase("Encoding", len(store)) as advance:
        if whole.exists():
            advance(len(store))
        else:
            shards = _encode_shards(store, encoder, whole.parent, config, advance)
            _join(shards, len(store), whole)
    for shard in whole.parent.glob("shard-*.npy"):
        shard.unlink()
    return load_vectors(whole, "delete it and give the same command again")


def _encode_shards(
    store: CorpusStore, encoder: StoredEncoder, folder: Path, config: DenseIndexConfig, advance: Callable[[int], None]
) -> list[Path]:
    shards = []
    for first in range(0, len(store), config.shard_size):
        passages = range(first, min(first + config.shard_size, len(store)))
        shard = folder / f"shard-{config.shard_size}-{first:010d}.npy"
        shards.append(shard)
        if not shard.exists():
            texts = [passage.contents for passage in store[passages.start : passages.stop]]
            vectors = encoder.encode_passages(texts).astype(config.dtype)
            if (bad := first_not_finite(vectors)) is not None:
                raise DataError(
                    f"the encoder gives NaN or infinity for passage {store[first + bad].id!r}; try another dtype of it."
                )
            with written_whole(shard) as partial, partial.open("wb") as file:
                np.save(file, vectors)
        advance(len(passages))
    return shards


def _join(shards: list[Path], num_passages: int, whole: Path) -> None:
    first = np.load(shards[0], mmap_mode="r")
    with written_whole(whole) as partial:
        joined = np.lib.format.open_memmap(partial, "w+", first.dtype, (num_passages, first.shape[1]))
        row = 0
        for shard in shards:
            vectors = np.load(shard)
            joined[row : row + len(vectors)] = vectors
            row += len(vectors)
        joined.flush()
        del joined
