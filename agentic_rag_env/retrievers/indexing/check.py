"""Reads a whole corpus or index, and compares it with the hashes that were written when it was made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from agentic_rag_env.cache_folder import digest_of
from agentic_rag_env.corpus import CorpusStore, check_corpus
from agentic_rag_env.errors import DataError
from agentic_rag_env.retrievers.index_folder import VECTORS_FILE, files_of_index, read_manifest, store_of_index
from agentic_rag_env.retrievers.indexing.progress import Phase


def check(path: str | Path, phase: Phase) -> str:
    """Check a file of passages, a store, or an index folder with its store.

    Args:
        path: The file or folder to check.
        phase: Shows progress.

    Returns:
        The finding, in one line.

    Raises:
        DataError: Something is missing, malformed, or has changed since it was made.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return _check_corpus(folder, phase)
    manifest = read_manifest(folder)
    built_from, files = manifest["corpus"], files_of_index(folder, manifest)
    store = CorpusStore(store_of_index(folder, built_from))
    expected = (built_from["fingerprint"], built_from["num_passages"])
    corpus = _check_corpus(store.path, phase)
    if (store.fingerprint, len(store)) != expected:
        raise DataError(
            f"{folder}: was built from the corpus {expected[0]} with {expected[1]} passages, but {store.path} is "
            f"{store.fingerprint} with {len(store)}; build the index again."
        )
    checked = _check_files(folder, files, phase)
    return f"{manifest['kind']} index, {checked}; {corpus}"


def _check_corpus(path: Path, phase: Phase) -> str:
    with phase(f"Reading {path.name}", None) as advance:
        num_passages, fingerprint = check_corpus(path, advance)
    return f"{num_passages} passages, fingerprint {fingerprint}"


def _check_files(folder: Path, files: dict[str, Any], phase: Phase) -> str:
    if not files:
        return "whose files were not hashed when it was built: build it again to have them checked"
    checked = 0
    with phase("Hashing files", len(files)) as advance:
        for name, digest in files.items():
            file = folder / name
            if name == VECTORS_FILE and not file.exists():  # they may be deleted
                continue
            if not file.exists():
                raise DataError(f"{file}: is missing; build the index again.")
            if digest_of(file) != digest:
                raise DataError(f"{file}: is not what was built; build the index again.")
            checked += 1
            advance(1)
    return f"{checked} files as built"
