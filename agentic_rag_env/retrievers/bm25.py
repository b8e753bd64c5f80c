"""Lexical search: Okapi BM25 through the bm25s library."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import check_search, require_corpus
from agentic_rag_env.types import Passage


@dataclass
class BM25Config:
    """Settings of BM25.

    Attributes:
        k1: Saturation of the term frequency; Anserini's default.
        b: Strength of the length normalization, in [0, 1]; Anserini's default.
    """

    k1: float = 0.9
    b: float = 0.4


@RETRIEVERS.register("bm25", BM25Config)
class BM25Retriever:
    """Searches a corpus held in memory, title and text together.

    A text is its lower-cased words, with neither stemming nor stop words. Memory is about 8 bytes per distinct word of
    each passage beside the corpus itself.

    Args:
        config: The BM25 parameters.
        corpus: The passages; their order decides ties.

    Raises:
        ConfigurationError: There is no corpus, it holds no words, or a parameter is out of range.
    """

    def __init__(self, config: BM25Config, corpus: Sequence[Passage] | None = None) -> None:
        import bm25s

        self._corpus = require_corpus("bm25", corpus)
        if config.k1 < 0 or not 0 <= config.b <= 1:
            raise ConfigurationError(f"bm25 needs k1 >= 0 and b in [0, 1], got k1={config.k1}, b={config.b}.")
        words = self._tokenize([passage.contents for passage in self._corpus])
        if not any(words):
            raise ConfigurationError(f"retriever 'bm25' found no words in the {len(words)} passages of the corpus.")
        # The library switches its own debug messages on, which any program with a root handler would print.
        logging.getLogger("bm25s").setLevel(logging.WARNING)
        self._index = bm25s.BM25(k1=config.k1, b=config.b)
        self._index.index(words, show_progress=False)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """See `Retriever.search`. A query without a known word matches nothing."""
        check_search(queries, top_k)
        return [self._best(words, top_k) for words in self._tokenize(queries)]

    def _tokenize(self, texts: Sequence[str]) -> list[list[str]]:
        import bm25s

        return bm25s.tokenize(list(texts), token_pattern=r"\w+", stopwords=None, return_ids=False, show_progress=False)

    def _best(self, words: list[str], top_k: int) -> list[Passage]:
        ids = self._index.get_tokens_ids(words)
        if not ids:
            return []
        scores = self._index.get_scores_from_ids(ids)
        top_k = min(top_k, len(scores))
        cut = np.partition(scores, -top_k)[-top_k]
        candidates = np.flatnonzero((scores >= cut) & (scores > 0))
        best = candidates[np.argsort(-scores[candidates], kind="stable")[:top_k]]
        return [replace(self._corpus[int(row)], score=float(scores[row])) for row in best]
