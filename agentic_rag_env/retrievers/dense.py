"""Dense search: exact inner products of embeddings, in a flat FAISS index."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import check_search, require_corpus
from agentic_rag_env.retrievers.encoders import build_encoder
from agentic_rag_env.types import Passage

#: Scores are compared after rounding to this many decimals: a text encoded in another batch differs by some 1e-7.
SCORE_DECIMALS = 5
#: Candidates fetched beyond `top_k`, so that most ties are decided without a second look.
MARGIN = 8


@dataclass
class DenseConfig:
    """Settings of dense search.

    Attributes:
        encoder: A registered name (`hashed_ngram`), a mapping with `name` and settings, the folder or hub id of a
            Hugging Face model (`intfloat/e5-base-v2`), a mapping with `model` and settings, or an encoder.
    """

    encoder: Any = "hashed_ngram"


@RETRIEVERS.register("dense", DenseConfig)
class DenseRetriever:
    """Searches the embeddings of a corpus held in memory, 4 bytes x dim x passages.

    Args:
        config: The encoder.
        corpus: The passages; their order decides ties.

    Raises:
        ConfigurationError: There is no corpus, a library is missing, or the encoder gives numbers that are not finite.
    """

    def __init__(self, config: DenseConfig, corpus: Sequence[Passage] | None = None) -> None:
        try:
            import faiss
        except ImportError as error:
            raise ConfigurationError(
                "retriever 'dense' needs the library faiss: pip install faiss-cpu; retriever=bm25 does without."
            ) from error
        self._corpus = require_corpus("dense", corpus)
        self._encoder = build_encoder(config.encoder)
        texts = [passage.contents for passage in self._corpus]
        self._encoder.fit(texts)
        embeddings = self._encoder.encode_passages(texts)
        if not np.isfinite(embeddings).all():
            raise ConfigurationError(
                f"the encoder of retriever 'dense' gives NaN or infinity for passage "
                f"{self._corpus[int(np.argmin(np.isfinite(embeddings).all(axis=1)))].id!r}; try dtype=float32."
            )
        self._index = faiss.IndexFlatIP(embeddings.shape[1])
        self._index.add(np.ascontiguousarray(embeddings, np.float32))

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """See `Retriever.search`. A query without features (no letter or digit, for n-grams) matches nothing."""
        check_search(queries, top_k)
        if not queries:
            return []
        embeddings = np.ascontiguousarray(self._encoder.encode_queries(queries), np.float32)
        if not np.isfinite(embeddings).all():
            bad = int(np.argmin(np.isfinite(embeddings).all(axis=1)))
            raise RetrieverError(f"the encoder gives NaN or infinity for the query {queries[bad][:80]!r}.")
        searched = np.flatnonzero(embeddings.any(axis=1))
        found: list[list[Passage]] = [[] for _ in queries]
        for index, best in zip(searched, self._nearest(embeddings[searched], top_k), strict=True):
            found[index] = [replace(self._corpus[row], score=score) for row, score in best]
        return found

    def _nearest(self, queries: NDArray[np.float32], top_k: int) -> list[list[tuple[int, float]]]:
        """The best rows and scores for queries [n, dim]; equal scores in the order of the corpus."""
        top_k = min(top_k, len(self._corpus))
        fetched = min(top_k + MARGIN, len(self._corpus))
        rough, rows, vectors = self._index.search_and_reconstruct(queries, fetched)
        found = []
        for query, bounds, candidates, embeddings in zip(queries, rough, rows, vectors, strict=True):
            best = _rank(query, candidates, embeddings, top_k)
            # Whatever was not fetched scores at most what the last candidate does, up to rounding.
            while len(candidates) < len(self._corpus) and best[-1][1] <= bounds[-1] + 10.0**-SCORE_DECIMALS:
                wider = min(4 * len(candidates), len(self._corpus))
                (bounds,), (candidates,), (embeddings,) = self._index.search_and_reconstruct(query[None], wider)
                best = _rank(query, candidates, embeddings, top_k)
            found.append(best)
        return found


def _rank(
    query: NDArray[np.float32], rows: NDArray[np.int64], embeddings: NDArray[np.float32], top_k: int
) -> list[tuple[int, float]]:
    """Sort candidates by inner products that, unlike those of FAISS, do not depend on the size of the batch.

    Args:
        query: [dim].
        rows: [m], places in the corpus.
        embeddings: [m, dim].
        top_k: How many to return.

    Returns:
        Rows and scores, best first.
    """
    scores = np.round((embeddings.astype(np.float64) * query).sum(axis=1), SCORE_DECIMALS)
    best = np.lexsort((rows, -scores))[:top_k]
    return [(int(rows[place]), float(scores[place])) for place in best]
