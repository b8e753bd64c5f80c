"""A text encoder without a model: hashed character n-grams."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agentic_rag_env.retrievers.base import encodable, hash_of
from agentic_rag_env.retrievers.vectors.encoders import ENCODERS
from agentic_rag_env.retrievers.words import WORDS, composed, word_pattern
from agentic_rag_env.settings import COUNT, at_least, check_settings


@dataclass
class HashedNgramConfig:
    """Settings of the hashed n-gram encoder.

    Attributes:
        dim: Width of the vectors; chance similarity of unrelated texts falls as 1 / sqrt(dim).
        min_n: Shortest character n-gram.
        max_n: Longest character n-gram.
    """

    dim: int = 1024
    min_n: int = 3
    max_n: int = 5

    def __post_init__(self) -> None:
        check_settings(self, COUNT, "dim", "min_n", "max_n")
        check_settings(self, at_least(self.min_n), "max_n")


@ENCODERS.register("hashed_ngram", HashedNgramConfig)
class HashedNgramEncoder:
    """TF-IDF over words, each word the signed sum of its hashed character n-grams: no download and no torch.

    A text is sum over its words w of (1 + ln tf_w) idf_w v_w, where idf_w = ln((1 + N) / (1 + df_w)) + 1 over the N
    passages of the corpus and v_w adds +1 or -1, as a hash decides, at the hashed place of `<w>` and of each of its
    n-grams, scaled to length 1 (feature hashing, Weinberger et al. 2009). Misspelt and inflected words stay close. The
    same text gives the same bits in every process.

    Args:
        config: Width and n-gram lengths.

    Raises:
        ConfigurationError: A setting is out of range.
    """

    def __init__(self, config: HashedNgramConfig | None = None) -> None:
        self.config = config or HashedNgramConfig()
        self._num_passages = 0
        self._document_frequency: Counter[str] = Counter()

    def fit(self, passages: Sequence[str]) -> None:
        """Count in how many passages each word occurs."""
        self._num_passages = len(passages)
        self._document_frequency = Counter()
        for passage in passages:
            self._document_frequency.update(set(_words(passage)))

    @property
    def fingerprint(self) -> str:
        """See `StoredEncoder`."""
        return hash_of([self.settings(), self.state(), WORDS["words"]])

    def settings(self) -> dict[str, Any]:
        """See `StoredEncoder`."""
        return {"name": "hashed_ngram", **asdict(self.config)}

    def state(self) -> dict[str, Any]:
        """See `StoredEncoder`."""
        frequencies = dict(sorted(self._document_frequency.items()))
        return {"num_passages": self._num_passages, "document_frequency": frequencies}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """See `StoredEncoder`."""
        self._num_passages = state["num_passages"]
        self._document_frequency = Counter(state["document_frequency"])

    def encode_passages(self, passages: Sequence[str]) -> NDArray[np.float32]:
        """See `Encoder`."""
        rows = np.zeros((len(passages), self.config.dim), np.float32)
        for row, passage in zip(rows, passages, strict=True):
            self._encode(passage, row)
        return rows

    def encode_queries(self, queries: Sequence[str]) -> NDArray[np.float32]:
        """See `Encoder`."""
        return self.encode_passages(queries)

    def _encode(self, text: str, row: NDArray[np.float32]) -> None:
        counts = Counter(_words(text))
        if not counts:
            return
        vectors = [_word_vector(word, self.config.dim, self.config.min_n, self.config.max_n) for word in counts]
        weights = [
            (1 + np.log(count)) * self._idf(word) / np.sqrt(len(places))
            for (word, count), (places, _) in zip(counts.items(), vectors, strict=True)
        ]
        places = np.concatenate([places for places, _ in vectors])
        signs = np.concatenate([signs for _, signs in vectors])
        weight = np.repeat(weights, [len(places) for places, _ in vectors])
        dense = np.bincount(places, weights=signs * weight, minlength=self.config.dim)
        norm = np.sqrt(np.square(dense).sum())
        if norm > 0:
            row[:] = dense / norm

    def _idf(self, word: str) -> float:
        return np.log((1 + self._num_passages) / (1 + self._document_frequency[word])) + 1


def _words(text: str) -> list[str]:
    # Words beyond 64 characters are split: the number of n-grams to remember per word stays bounded.
    return word_pattern(most=64).findall(composed(encodable(text)).lower())


@lru_cache(maxsize=2**18)
def _word_vector(word: str, dim: int, min_n: int, max_n: int) -> tuple[NDArray[np.int32], NDArray[np.int8]]:
    """Places [m] in [0, dim) and signs [m] of a word and its n-grams; CRC-32 is the same in every process."""
    marked = f"<{word}>"
    grams = [marked]
    for n in range(min_n, min(max_n, len(marked) - 1) + 1):
        grams += [marked[start : start + n] for start in range(len(marked) - n + 1)]
    hashes = np.array([zlib.crc32(gram.encode()) for gram in grams], np.uint32)
    return (hashes % np.uint32(dim)).astype(np.int32), np.where(hashes >> 31, 1, -1).astype(np.int8)
