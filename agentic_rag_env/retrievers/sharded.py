"""Searches a corpus that lies in parts on several machines: asks every part, and merges the results by score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import Retriever, Wrapper, build_wrapped, hash_with, scores_by, search_once
from agentic_rag_env.types import Found, Passage


@dataclass
class ShardedConfig:
    """Which services or retrievers hold the parts.

    Attributes:
        shards: Two or more parts with different passages, in the order of the corpus. A part is the address of a
            service (see `HttpConfig.url`), a mapping with `name` and settings, or a retriever. A mapping such as
            `{name: http, url: [...]}` names equal services that stand in for each other.
    """

    shards: list[Any]

    def __post_init__(self) -> None:
        if isinstance(self.shards, str) or not isinstance(self.shards, Sequence) or len(self.shards) < 2:
            raise ConfigurationError(f"sharded needs shards, a list of two parts or more, got {self.shards!r}.")
        for number, spec in enumerate(self.shards, 1):
            name = spec.get("name") if isinstance(spec, Mapping) else spec
            if isinstance(name, str) and name in RETRIEVERS.names():
                _require_comparable(number, name, RETRIEVERS.get(name).factory)  # before anything is opened


@RETRIEVERS.register("sharded", ShardedConfig)
class ShardedRetriever(Wrapper):
    """Asks all parts at once and merges their passages by score.

    The result is the ranking of one index over the whole corpus if the score of a passage depends on nothing but query
    and passage, as for exact dense search and rerankers. Equal scores are in the order of the parts. It is not for
    services that score by BM25, whose scores depend on the word statistics of their part; such a service cannot be told
    from others, so take care. Nor is it for services that score by distance or send no scores; there a query fails as
    soon as one of them finds two passages for it.
    A passage that two parts hold, with one id and one text, is returned once.

    Args:
        config: The parts.
        corpus: Ignored; each part has its own passages.

    Raises:
        ConfigurationError: There are fewer than two parts, or a part cannot be made or has no comparable scores.
    """

    def __init__(self, config: ShardedConfig, corpus: Sequence[Passage] | None = None) -> None:
        self._shards: list[tuple[str, Retriever]] = []
        for number, spec in enumerate(config.shards, 1):
            is_address = isinstance(spec, str) and spec not in RETRIEVERS.names()
            of_shard = {"name": "http", "url": spec} if is_address else spec
            shard = build_wrapped(f"part {number} of sharded", of_shard, corpus=None)
            _require_comparable(number, type(shard).__name__, shard)
            urls = getattr(shard, "urls", None)
            what = ", ".join(urls) if urls else type(shard).__name__
            self._shards.append((f"part {number} of {len(config.shards)} ({what})", shard))
        self.parts = [shard for _, shard in self._shards]

    @property
    def fingerprint(self) -> str | None:
        """Hash of all that results depend on; None if a part cannot tell what it is."""
        return hash_with(self.parts, "sharded")

    def search(self, queries: Sequence[str], top_k: int) -> list[Found]:
        """See `Retriever.search`. A query fails if it fails in one of the parts; the error names the part."""
        return search_once(queries, top_k, lambda distinct: self._merged(distinct, top_k))

    def _merged(self, queries: list[str], top_k: int) -> list[Found]:
        with ThreadPoolExecutor(len(self._shards)) as pool:
            of_shards = list(pool.map(lambda shard: _search(shard[0], shard[1], queries, top_k), self._shards))
        return [_merge(found, top_k) for found in zip(*of_shards, strict=True)]


def _search(name: str, shard: Retriever, queries: list[str], top_k: int) -> list[Found]:
    """The results of one part; its errors name it. Two passages are asked for at least, since one shows no order."""
    try:
        return [_checked(name, shard, found) for found in shard.search(queries, max(top_k, 2))]
    except RetrieverError as error:
        raise RetrieverError(f"{name}: {error}") from error


def _checked(name: str, shard: Retriever, found: Found) -> Found:
    if isinstance(found, RetrieverError):
        return RetrieverError(f"{name}: {found}")
    scores = [passage.score for passage in found]
    # A service that sends no scores has zeros here. A part that computes its scores may well find nothing alike.
    unsent = len(scores) > 1 and not any(scores) and scores_by(shard) == "service"
    if unsent or scores != sorted(scores, reverse=True):
        return RetrieverError(
            f"{name}: its scores are {scores[:3]}, best first; sharded needs scores that are higher the better, not "
            "distances, and needs them sent."
        )
    return found


def _require_comparable(number: int, name: str, retriever: Any) -> None:
    if scores_by(retriever) == "corpus":
        raise ConfigurationError(
            f"sharded merges by score, but a score of {name} depends on the other passages of its part (part "
            f"{number}), so scores of two parts cannot be compared. Shard a dense index, or search one index."
        )


def _merge(of_shards: Sequence[Found], top_k: int) -> Found:
    passages: dict[tuple[str, str], Passage] = {}
    for found in of_shards:
        if isinstance(found, RetrieverError):
            return found
        for passage in found:
            known = passages.get(key := (passage.id, passage.contents))
            if known is None or passage.score > known.score:
                passages[key] = passage
    return sorted(passages.values(), key=lambda passage: -passage.score)[:top_k]
