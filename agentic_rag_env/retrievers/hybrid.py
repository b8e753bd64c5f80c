"""Joins several retrievers into one by reciprocal rank fusion."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from agentic_rag_env.corpus import fingerprint
from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import CorpusRetriever, Retriever, Wrapper, build_wrapped, hash_with, search_once
from agentic_rag_env.settings import COUNT, check_settings
from agentic_rag_env.types import Found, Passage

Key = TypeVar("Key", bound=Hashable)


@dataclass
class HybridConfig:
    """Which retrievers are joined, and how.

    Attributes:
        retrievers: Two or more: names, mappings with `name` and settings, or objects.
        rank_constant: The k of the formula; with a larger k, the first places count less.
        depth: Number of passages taken from each retriever; `top_k` if that is more.
    """

    retrievers: list[Any] = field(default_factory=lambda: ["bm25", "dense"])
    rank_constant: int = 60
    depth: int = 100

    def __post_init__(self) -> None:
        if len(self.retrievers) < 2:
            raise ConfigurationError(f"hybrid needs two or more retrievers, got {self.retrievers!r}.")
        check_settings(self, COUNT, "rank_constant", "depth")


@RETRIEVERS.register("hybrid", HybridConfig)
class HybridRetriever(Wrapper):
    """Scores a passage by the sum of 1 / (k + rank) over the retrievers that find it, ranks from 1.

    This is reciprocal rank fusion, Cormack et al. 2009. Passages are told apart by their ids. Passages with equal sums
    are in the order of the corpus if all retrievers search the same one. Otherwise they are in the order of the first
    retriever, then of the second, and so on.

    Args:
        config: The retrievers.
        corpus: The passages for those retrievers that search a corpus.

    Raises:
        ConfigurationError: A setting can't work, or a retriever cannot be made.
    """

    scores_by = "corpus"

    def __init__(self, config: HybridConfig, corpus: Sequence[Passage] | None = None) -> None:
        self._config = config
        self.parts = [build_wrapped("hybrid", spec, corpus) for spec in config.retrievers]
        self._corpus = _common_corpus(self.parts)

    @property
    def fingerprint(self) -> str | None:
        """Hash of all that results depend on; None if a part cannot tell what it is."""
        return hash_with(self.parts, "hybrid", self._config.rank_constant, self._config.depth)

    def search(self, queries: Sequence[str], top_k: int) -> list[Found]:
        """See `Retriever.search`. A query fails if it fails for one of the retrievers."""
        fuse = self._fuse_passages if self._corpus is None else self._fuse_rows
        return search_once(queries, top_k, lambda distinct: fuse(distinct, top_k))

    def _fuse_rows(self, queries: list[str], top_k: int) -> list[Found]:
        corpus, depth = self._corpus, max(top_k, self._config.depth)
        assert corpus is not None
        fused: list[Found] = []
        for rankings in zip(*(part.rank(queries, depth) for part in self.parts), strict=True):  # type: ignore[attr-defined]
            if error := _first_failure(rankings):
                fused.append(error)
                continue
            scores = self._fuse([[row for row, _ in ranking] for ranking in rankings])
            best = sorted(scores, key=lambda row: (-scores[row], row))[:top_k]
            fused.append([replace(corpus[row], score=scores[row]) for row in best])
        return fused

    def _fuse_passages(self, queries: list[str], top_k: int) -> list[Found]:
        depth = max(top_k, self._config.depth)
        fused: list[Found] = []
        for results in zip(*(part.search(queries, depth) for part in self.parts), strict=True):
            if error := _first_failure(results):
                fused.append(error)
                continue
            passages = {passage.id: passage for found in reversed(results) for passage in found}
            scores = self._fuse([[passage.id for passage in found] for found in results])
            best = sorted(scores, key=lambda key: -scores[key])[:top_k]
            fused.append([replace(passages[key], score=scores[key]) for key in best])
        return fused

    def _fuse(self, lists: Sequence[Sequence[Key]]) -> dict[Key, float]:
        """The fused score of each listed key, in the order in which the keys are first met.

        A service may list a passage twice; its first place counts.
        """
        scores: dict[Key, float] = {}
        for listed in lists:
            for rank, key in enumerate(dict.fromkeys(listed), 1):
                scores[key] = scores.get(key, 0.0) + 1 / (self._config.rank_constant + rank)
        # Rounded, since the order of a sum must not decide a tie.
        return {key: round(score, 12) for key, score in scores.items()}


def _first_failure(results: Iterable[Any]) -> RetrieverError | None:
    """The first failure among what the retrievers return for one query."""
    return next((result for result in results if isinstance(result, RetrieverError)), None)


def _common_corpus(parts: Sequence[Retriever]) -> Sequence[Passage] | None:
    """The corpus that all retrievers search by row, if there is one."""
    corpora = [part.corpus for part in parts if isinstance(part, CorpusRetriever)]
    if len(corpora) < len(parts):
        return None
    same = all(corpus is corpora[0] for corpus in corpora) or len({fingerprint(corpus) for corpus in corpora}) == 1
    return corpora[0] if same else None
