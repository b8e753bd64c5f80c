"""An exact cache of searches, so that none is made twice; a run can also be replayed from it offline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import (
    OUTSIDE,
    Retriever,
    Wrapper,
    build_wrapped,
    checked_queries,
    encodable,
    fingerprint_of,
    scores_by,
)
from agentic_rag_env.retrievers.cache_file import CacheEntries, digest
from agentic_rag_env.settings import PLACE, TEXT, at_least, check_settings, or_none
from agentic_rag_env.types import Found, Passage


@dataclass
class CachedConfig:
    """What is cached, and where.

    Attributes:
        retriever: The retriever behind the cache: a name, a mapping with `name` and settings, or an object.
        path: File of the results, made if it does not exist; several processes may share it. None: memory only.
        max_in_memory: Most results kept in memory, the ones used last; with a file, all others are read from it.
        offline: Whether to answer from the cache alone; a query that it does not hold is then a `RetrieverError`. The
            file is not written then, and may be one that cannot be.
        fingerprint: Name for the corpus, index, encoder and settings of a service that cannot name them itself; a
            change of any of them needs another name. None: the retriever's own fingerprint.
    """

    retriever: Any = "bm25"
    path: str | None = field(default=None, metadata={OUTSIDE: True})
    max_in_memory: int = 100_000
    offline: bool = False
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        check_settings(self, at_least(0), "max_in_memory")
        check_settings(self, or_none(PLACE), "path")
        check_settings(self, or_none(TEXT), "fingerprint")


@RETRIEVERS.register("cached", CachedConfig)
class CachedRetriever(Wrapper):
    """Gives exactly the results of another retriever (ids, order, texts and scores), and searches each only once.

    A result belongs to the fingerprint of the retriever, the query and `top_k`. The query is normalized only where
    every retriever does so: a character that UTF-8 lacks becomes `?`. An encoder may well tell cases and spaces apart.
    Failed searches are not kept.

    Args:
        config: The settings.
        corpus: The passages for the retriever behind the cache.

    Raises:
        ConfigurationError: A setting can't work, the retriever has no identity, or the file is none of ours.
        RetrieverError: The file can't be opened, or the service behind can't be asked for its fingerprint.

    Attributes:
        fingerprint: Fingerprint of the retriever behind the cache.
    """

    def __init__(self, config: CachedConfig, corpus: Sequence[Passage] | None = None) -> None:
        if config.offline and config.path is None:
            raise ConfigurationError("cached with offline=true answers from a file; set path to it.")
        self._entries = CacheEntries(config.path, config.max_in_memory, read_only=config.offline)
        self._offline = config.offline
        self._retriever: Retriever | None = None
        if not (config.offline and config.fingerprint):
            self._retriever = build_wrapped("cached", config.retriever, corpus)
        self.parts = [] if self._retriever is None else [self._retriever]
        self.fingerprint = config.fingerprint or fingerprint_of(self._retriever, config.retriever, corpus)
        self._entries.enter(self.fingerprint)
        self._hits = self._misses = 0

    def search(self, queries: Sequence[str], top_k: int) -> list[Found]:
        """See `Retriever.search`.

        Raises:
            RetrieverError: The cache can't be read or written. Offline, a query that the cache lacks has this error as
                its result.
        """
        queries = checked_queries(queries, top_k)
        keys = [self._key(query, top_k) for query in queries]
        found: dict[bytes, Found] = dict(self._entries.read(keys))
        missing = {key: query for key, query in zip(keys, queries, strict=True) if key not in found}
        self._hits += len(queries) - len(missing)
        self._misses += len(missing)
        if missing:
            new = dict(zip(missing, self._search_anew(list(missing.values()), top_k), strict=True))
            self._entries.write({key: got for key, got in new.items() if not isinstance(got, RetrieverError)})
            found |= new
        return [result if isinstance(result := found[key], RetrieverError) else list(result) for key in keys]

    def stats(self) -> Mapping[str, int]:
        """The numbers of queries answered without and with a search so far, and the counts of the retriever behind."""
        return {**super().stats(), "cache_hits": self._hits, "cache_misses": self._misses}

    @property
    def scores_by(self) -> str:
        """See `base.scores_by`."""
        return scores_by(self._retriever)

    def close(self) -> None:
        """Close the file; the next search opens it again."""
        self._entries.close()

    def _key(self, query: str, top_k: int) -> bytes:
        return digest(self.fingerprint.encode(), str(top_k).encode(), encodable(query).encode())

    def _search_anew(self, queries: list[str], top_k: int) -> Sequence[Found]:
        if self._offline or self._retriever is None:
            return [
                RetrieverError(
                    f"the cache {self._entries.path} holds no result for the query {query[:200]!r} with "
                    f"top_k={top_k}, and offline=true forbids searching for it."
                )
                for query in queries
            ]
        return self._retriever.search(queries, top_k)
