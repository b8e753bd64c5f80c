"""What all searches by embeddings share: corpus, encoder and vectors, in memory or in an index on disk."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentic_rag_env.corpus import Texts
from agentic_rag_env.errors import ConfigurationError, DataError, RetrieverError
from agentic_rag_env.retrievers.base import CorpusRetriever, Ranking, hash_of
from agentic_rag_env.retrievers.index_folder import ENCODER_STATE, corpus_of_index, read_json, read_manifest
from agentic_rag_env.retrievers.vectors.encoders import Encoder, StoredEncoder, build_encoder
from agentic_rag_env.retrievers.vectors.ranking import VectorSearch, nearest
from agentic_rag_env.types import Passage

#: Files of an index folder: the FAISS index, and the vectors it was built from.
FAISS_FILE, VECTORS_FILE = "index.faiss", "vectors/vectors.npy"


@dataclass
class EmbeddingConfig:
    """Settings of every search by embeddings.

    Attributes:
        encoder: A registered name (`hashed_ngram`), a mapping with `name` and settings, the folder or hub id of a
            Hugging Face model (`intfloat/e5-base-v2`), a mapping with `model` and settings, or an encoder. None: that
            of the index folder; `hashed_ngram` without an index.
        index: Folder made by `agentic-rag-index dense`, or a FAISS file whose row numbers are those of the passages,
            such as the `e5_Flat.index` of Search-R1, which needs `encoder` too. None: the passages are encoded into
            memory.
        corpus: File of the passages, instead of those of the dataset or the index folder.
    """

    encoder: Any = None
    index: str | None = None
    corpus: str | None = None


class EmbeddingRetriever(CorpusRetriever):
    """Encodes queries and ranks passages by inner products; a subclass opens the search that proposes them.

    Args:
        name: The retriever's, for errors.
        config: The settings.
        corpus: The passages; their order decides ties. None: those of the index folder.

    Raises:
        ConfigurationError: There is no corpus or no encoder, or the encoder gives numbers that are not finite.
        DataError: The index is incomplete or was built from another corpus or with another encoder.
    """

    def __init__(self, name: str, config: EmbeddingConfig, corpus: Sequence[Passage] | None) -> None:
        self.name, self.config, self._given = name, config, corpus
        self._index_path = None if config.index is None else Path(config.index).expanduser()
        self._manifest: dict[str, Any] | None = None
        if self._index_path is not None and not self._index_path.exists():
            raise DataError(f"{config.index}: there is no such index; build one with agentic-rag-index dense.")
        if self._index_path is not None and self._index_path.is_dir():
            self._manifest = read_manifest(self._index_path, "dense")
        self.corpus = corpus_of_index(name, config, corpus, self._manifest)
        self._encoder = self._make_encoder()
        self._search = self._in_memory() if self._index_path is None else self._from_disk(self._index_path)
        self._check_sizes()

    def __reduce__(self) -> str | tuple[Any, ...]:
        # A copy opens the same files.
        return (type(self), (self.config, self._given)) if self._index_path else super().__reduce__()

    def rank(self, queries: Sequence[str], top_k: int) -> list[Ranking]:
        """See `CorpusRetriever.rank`. A query without features (no letter or digit, for n-grams) matches nothing.

        Raises:
            RetrieverError: The encoder gives numbers that are not finite.
        """
        embeddings = np.ascontiguousarray(self._encoder.encode_queries(queries), np.float32)
        if (bad := first_not_finite(embeddings)) is not None:
            raise RetrieverError(f"the encoder gives NaN or infinity for the query {queries[bad][:80]!r}.")
        if embeddings.shape[1] != self._search.dim:
            raise self._wrong_dim(embeddings.shape[1])
        found: list[Ranking] = [[] for _ in queries]
        searched = np.flatnonzero(embeddings.any(axis=1))
        for place, best in zip(searched, nearest(self._search, embeddings[searched], top_k), strict=True):
            found[place] = best
        return found

    @abstractmethod
    def _open_vectors(self, vectors: NDArray[np.floating]) -> VectorSearch:
        """The search over vectors [n, dim] in memory."""

    @abstractmethod
    def _from_disk(self, path: Path) -> VectorSearch:
        """The search over an index folder or a FAISS file."""

    def _identity(self) -> dict[str, Any] | None:
        if not isinstance(self._encoder, StoredEncoder):
            return None
        return {"encoder": self._encoder.fingerprint, **self._search_identity()}

    def _search_identity(self) -> dict[str, Any]:
        """What results depend on beside passages and encoder; nothing, for an exact search."""
        return {"search": "exact", "vectors": self._vectors_identity()}

    def _vectors_identity(self) -> Any:
        """What tells the vectors on disk from others, wherever they lie; None for those made in memory."""
        if self._manifest is not None:
            return self._manifest["vectors"]
        return None if self._index_path is None else _hash_of_blocks(self._index_path)

    def _make_encoder(self) -> Encoder:
        if self._manifest is not None:
            return encoder_of_index(self._manifest, self.config.encoder)
        if self._index_path is not None and self.config.encoder is None:
            raise ConfigurationError(
                f"the index {self._index_path} does not say which encoder made it; give one, such as "
                "encoder=intfloat/e5-base-v2."
            )
        return build_encoder(self.config.encoder or "hashed_ngram")

    def _in_memory(self) -> VectorSearch:
        texts = Texts(self.corpus)
        self._encoder.fit(texts)
        vectors = np.ascontiguousarray(self._encoder.encode_passages(texts), np.float32)
        if (bad := first_not_finite(vectors)) is not None:
            raise ConfigurationError(
                f"the encoder of retriever {self.name!r} gives NaN or infinity for passage {self.corpus[bad].id!r}; "
                "try dtype=float32."
            )
        return self._open_vectors(vectors)

    def _check_sizes(self) -> None:
        if self._search.num_rows != len(self.corpus):
            raise DataError(
                f"the index {self.config.index} has {self._search.num_rows} rows, but the corpus has "
                f"{len(self.corpus)} passages; rows are passages, so give the corpus that it was built from."
            )
        if self._index_path is not None and self._manifest is None:
            dim = self._encoder.encode_queries(["dimension"]).shape[1]
            if dim != self._search.dim:
                raise self._wrong_dim(dim)

    def _wrong_dim(self, dim: int) -> DataError:
        return DataError(
            f"the index {self.config.index} holds vectors of {self._search.dim} numbers, but the encoder gives {dim}; "
            "give the encoder that it was built with."
        )


def encoder_of_index(manifest: Mapping[str, Any], given: Any) -> Encoder:
    """The encoder that an index was built with.

    Args:
        manifest: Of the index.
        given: An encoder, or what `build_encoder` makes one from, where the manifest's is elsewhere; or None.

    Raises:
        ConfigurationError: It cannot be made.
        DataError: It is not the one that the index was built with.
    """
    built_with = manifest["encoder"]
    encoder = build_encoder(built_with["settings"] if given is None else given)
    if not isinstance(encoder, StoredEncoder):
        raise ConfigurationError(
            f"encoder {type(encoder).__name__} cannot be compared with that of the index {manifest['folder']}: it "
            "lacks a fingerprint (see StoredEncoder)."
        )
    encoder.load_state(read_json(Path(manifest["folder"]) / ENCODER_STATE)["state"])
    if encoder.fingerprint != built_with["fingerprint"]:
        raise DataError(
            f"{manifest['folder']}: was built with the encoder {built_with['fingerprint']} ({built_with['settings']}), "
            f"but the encoder given is {encoder.fingerprint} ({encoder.settings()}); give that encoder, or build the "
            "index again."
        )
    return encoder


def first_not_finite(vectors: NDArray[np.floating]) -> int | None:
    """The first row of [n, dim] that holds NaN or infinity, if any does."""
    finite = np.isfinite(vectors).all(axis=1)
    return None if finite.all() else int(np.argmin(finite))


def _hash_of_blocks(file: Path, num_blocks: int = 256, block_bytes: int = 4096) -> str:
    """Hash of the size of a file and of blocks spread evenly over it, its end included.

    A file of 60 GB takes no time, and one of other embeddings differs in nearly every block.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        blocks = []
        for number in range(num_blocks):
            opened.seek(max(0, size - block_bytes) * number // (num_blocks - 1))
            blocks.append(opened.read(block_bytes).hex())
    return hash_of([size, blocks])
