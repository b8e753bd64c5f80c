"""Searches that were made before are not made again: an exact cache, also for replaying a run offline."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from agentic_rag_env.corpus import fingerprint as corpus_fingerprint
from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import Retriever, check_search, encodable
from agentic_rag_env.retrievers.cache_file import CacheEntries, digest
from agentic_rag_env.types import Found, Passage


@dataclass
class CachedConfig:
    """What is cached, and where.

    Attributes:
        retriever: The retriever behind: a name, a mapping with `name` and settings, or an object.
        path: File of the results, made if it does not exist; several processes may share it. None: memory only.
        max_in_memory: Most results kept in memory, the ones used last; with a file, all others are read from it.
        offline: Answer from the cache alone; a query it does not hold is a `RetrieverError`.
        fingerprint: Names corpus, index, encoder and settings behind a service that cannot say so itself; a change of
            any of them needs another name. None: the retriever's own.
    """

    retriever: Any = "bm25"
    path: str | None = None
    max_in_memory: int = 100_000
    offline: bool = False
    fingerprint: str | None = None


@RETRIEVERS.register("cached", CachedConfig)
class CachedRetriever:
    """Gives exactly the results of another retriever, ids, order, texts and scores, and searches each only once.

    A result belongs to the fingerprint of the retriever, the query and `top_k`. The query is normalized only where
    every retriever does so (what UTF-8 lacks becomes `?`): an encoder may well tell cases and spaces apart. Failed
    searches are not kept.

    Args:
        config: The settings.
        corpus: For the retriever behind.

    Raises:
        ConfigurationError: A setting can't work, the retriever has no identity, or the file is none of ours.
        RetrieverError: The file can't be opened, or the service behind can't be asked for its fingerprint.

    Attributes:
        fingerprint: Of the retriever behind.
    """

    def __init__(self, config: CachedConfig, corpus: Sequence[Passage] | None = None) -> None:
        if config.max_in_memory < 0:
            raise ConfigurationError(f"cached needs max_in_memory >= 0, got {config.max_in_memory}.")
        if config.offline and config.path is None:
            raise ConfigurationError("cached with offline=true answers from a file; set path to it.")
        self._entries = CacheEntries(config.path, config.max_in_memory)
        self._offline = config.offline
        self._retriever: Retriever | None = None
        if not (config.offline and config.fingerprint):
            self._retriever = build_wrapped("cached", config.retriever, corpus)
        self.fingerprint = config.fingerprint or fingerprint_of(self._retriever, config.retriever, corpus)
        self._entries.enter(self.fingerprint, must_exist=config.offline)
        self._hits = self._misses = 0

    def search(self, queries: Sequence[str], top_k: int) -> list[Found]:
        """See `Retriever.search`.

        Raises:
            RetrieverError: The cache can't be read or written. Offline, that is the result of a query that it lacks.
        """
        check_search(queries, top_k)
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
        """Queries answered without and with a search since the start, and the counts of the retriever behind."""
        return {**stats_of(self._retriever), "cache_hits": self._hits, "cache_misses": self._misses}

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


def fingerprint_of(retriever: Any, spec: Any, corpus: Sequence[Passage] | None) -> str:
    """The identity of a retriever: with equal fingerprints, equal queries have equal results.

    A retriever says it in an attribute `fingerprint` (str): a hash of corpus, encoder and all settings that a result
    depends on; None says that it has none. For one without the attribute, made from a name or mapping over a corpus, it
    is put together from settings and passages; a retriever whose results depend on anything else must have it.

    Args:
        retriever: The retriever.
        spec: What it was built from: a name, a mapping or itself.
        corpus: What it was built over.

    Raises:
        ConfigurationError: It has no identity.
    """
    own = getattr(retriever, "fingerprint", "")
    if own is None:
        raise _no_identity(retriever, "a part of it cannot tell what it is")
    if own:
        return str(own)
    if not isinstance(spec, (str, Mapping)) or corpus is None:
        raise _no_identity(retriever, "it has no attribute 'fingerprint' and is not built over a corpus by name")
    settings = {"name": spec} if isinstance(spec, str) else dict(spec)
    name = settings.pop("name")
    if (config := RETRIEVERS.get(name).config) is not None:
        settings = vars(config(**settings))
    try:
        plain = json.dumps({"name": name, **settings}, sort_keys=True, default=dataclasses.asdict)
    except (TypeError, ValueError) as error:
        raise _no_identity(retriever, f"its settings are no plain data ({error})") from error
    return f"{plain} corpus={corpus_fingerprint(corpus)} version={version('agentic-rag-env')}"


def build_wrapped(wrapper: str, spec: Any, corpus: Sequence[Passage] | None) -> Retriever:
    """The retriever behind another one.

    Raises:
        ConfigurationError: It is none.
    """
    retriever = RETRIEVERS.build(spec, corpus=corpus)
    if not isinstance(retriever, Retriever):
        raise ConfigurationError(
            f"{wrapper} needs a retriever: a name, a mapping or an object with search(queries, top_k), got "
            f"{retriever!r}."
        )
    return retriever


def stats_of(retriever: Any) -> Mapping[str, int]:
    """What a retriever has counted since it was made; nothing, unless it has a method `stats`."""
    stats = getattr(retriever, "stats", None)
    return stats() if callable(stats) else {}


def _no_identity(retriever: Any, reason: str) -> ConfigurationError:
    return ConfigurationError(
        f"{type(retriever).__name__} has no identity to keep results under: {reason}. Give it an attribute "
        "'fingerprint', or name what it searches with fingerprint=<name>, another one for every change of it."
    )
