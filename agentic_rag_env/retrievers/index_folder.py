"""The folder of an index: its manifest, and the hashes that tie index, corpus and encoder together."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentic_rag_env.corpus import CorpusStore, fingerprint, open_corpus
from agentic_rag_env.errors import DataError
from agentic_rag_env.files import written_whole
from agentic_rag_env.retrievers.base import require_corpus
from agentic_rag_env.types import Passage

#: The manifest is written last, so a folder that has one is complete.
MANIFEST = "manifest.json"
#: The file with what an encoder has learned from the corpus.
ENCODER_STATE = "encoder.json"
#: The FAISS file of a dense index, and the vectors that it was built from.
FAISS_FILE, VECTORS_FILE = "index.faiss", "vectors/vectors.npy"
#: The entries of a manifest that are read, by the kind of index, with the keys that each must have.
_ENTRIES: dict[Any, dict[str, set[str]]] = {
    "bm25": (_OF_ALL := {"corpus": {"path", "fingerprint", "num_passages"}, "index": set()}),
    "dense": {**_OF_ALL, "encoder": {"settings", "fingerprint"}, "vectors": set()},
}


def read_manifest(folder: str | Path, kind: str | None = None) -> dict[str, Any]:
    """The manifest of an index folder.

    Args:
        folder: The folder.
        kind: The kind of index that it must hold: `bm25` or `dense`; None: either.

    Raises:
        DataError: There is no finished index of that kind in the folder, or the manifest is damaged.
    """
    file = Path(folder).expanduser() / MANIFEST
    if not file.exists():
        raise DataError(
            f"{folder}: holds no finished index (no {MANIFEST}); build one with agentic-rag-index "
            f"{kind or 'bm25 or dense'}, or let the same command as before finish it."
        )
    manifest = read_json(file)
    found = manifest.get("kind")
    if found not in _ENTRIES or kind not in (None, found):
        raise DataError(f"{folder}: holds an index of kind {found!r}, but {kind or 'bm25 or dense'!r} is needed.")
    for name, keys in _ENTRIES[found].items():
        entry = manifest.get(name)
        if not isinstance(entry, dict) or not keys <= entry.keys():
            lacking = f"it has {name} {entry!r:.80}, without {', '.join(sorted(keys))}"
            raise DataError(f"{file}: is damaged ({lacking}); build the index again.")
    # The folder is noted, because other paths are relative to it.
    return {**manifest, "folder": str(file.parent)}


def corpus_of_index(
    name: str, file: str | None, corpus: Sequence[Passage] | None, manifest: Mapping[str, Any] | None
) -> Sequence[Passage]:
    """The passages that a retriever searches.

    Args:
        name: The retriever, for errors.
        file: The file of passages that the retriever's settings name; it comes first.
        corpus: Passages of the dataset; they come second.
        manifest: Manifest of the index; the store named there comes last.

    Raises:
        ConfigurationError: There is no corpus, or it is empty.
        DataError: The corpus is not the one that the index was built from, or it cannot be opened.
    """
    if file is not None:
        corpus = open_corpus(file)
    if manifest is None:
        return require_corpus(name, corpus)
    built_from = manifest["corpus"]
    if corpus is None:
        store = store_of_index(manifest["folder"], built_from)
        if not store.exists():
            raise DataError(
                f"{manifest['folder']}: its corpus is not at {store} any more; give retriever {name!r} a corpus=<file>."
            )
        corpus = CorpusStore(store)
    if (found := fingerprint(corpus)) != built_from["fingerprint"]:
        raise DataError(
            f"{manifest['folder']}: was built from the corpus {built_from['fingerprint']} with "
            f"{built_from['num_passages']} passages, but the corpus given is {found} with {len(corpus)}; give that "
            "corpus, or build the index again."
        )
    return corpus


def store_of_index(folder: str | Path, built_from: Mapping[str, Any]) -> Path:
    """The store that the manifest of an index folder names.

    Args:
        folder: The folder.
        built_from: The entry `corpus` of its manifest.

    Raises:
        DataError: The store is named by an absolute path, as no builder of this package names it.
    """
    path = Path(built_from["path"])
    if path.is_absolute():
        raise DataError(
            f"{folder}: its manifest names the corpus {path}; only a path that begins at the folder is followed. Give "
            "the retriever a corpus=<file>, or build the index again."
        )
    return Path(folder) / path


def files_of_index(folder: Path, manifest: Mapping[str, Any]) -> dict[str, str]:
    """The names of an index's files with their hashes; empty for an index of an older version, which noted none.

    Raises:
        DataError: The manifest names files that do not lie in the folder, or no files at all.
    """
    files = manifest.get("files", {})
    if not isinstance(files, dict):
        raise DataError(f"{folder / MANIFEST}: is damaged (its files are {files!r:.80}); delete it and build again.")
    for name in files:
        if not (folder / name).resolve().is_relative_to(folder.resolve()):
            raise DataError(f"{folder / MANIFEST}: names {name!r}, which is no file of the folder.")
    return files


def read_json(file: Path) -> dict[str, Any]:
    """An object from a JSON file of an index folder.

    Raises:
        DataError: The file is missing or damaged.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: cannot be read ({error}); build the index again.") from error


def load_vectors(file: Path, mend: str) -> NDArray[np.floating]:
    """The vectors [n, dim] of a file, memory-mapped.

    Args:
        file: The file.
        mend: What to do if it is damaged, for the error.

    Raises:
        DataError: The file is missing or damaged.
    """
    try:
        return np.load(file, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{file}: cannot be read ({error}); {mend}.") from error


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write plain data to a complete file, in a form that depends on nothing but the data."""
    with written_whole(file) as partial:
        partial.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
