"""Fixed search results, for tests and demonstrations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentic_rag_env.errors import ConfigurationError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import checked_queries, require_corpus
from agentic_rag_env.types import Passage


@dataclass
class StaticConfig:
    """What a static retriever returns.

    Attributes:
        passages: A list of passages, which is the result of every query; or a mapping from queries to such lists, where
            any other query matches nothing. None: the first passages of the corpus. A passage is a `Passage` or a
            mapping with `id` and `contents`.
    """

    passages: Any = None


@RETRIEVERS.register("static", StaticConfig)
class StaticRetriever:
    """Returns what its settings say, whatever the corpus holds.

    Args:
        config: The passages.
        corpus: Passages that are returned where the settings name none.

    Raises:
        ConfigurationError: The passages have another form, or there are neither passages nor a corpus.
    """

    def __init__(self, config: StaticConfig, corpus: Sequence[Passage] | None = None) -> None:
        given = config.passages
        self._by_query: dict[str, Sequence[Passage]] | None = None
        self._always: Sequence[Passage] = ()
        if isinstance(given, Mapping):
            self._by_query = {query: _passages(listed) for query, listed in given.items()}
        else:
            self._always = require_corpus("static", corpus) if given is None else _passages(given)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """See `Retriever.search`."""
        checked_queries(queries, top_k)
        if self._by_query is None:
            return [list(self._always[:top_k]) for _ in queries]
        return [list(self._by_query.get(query, ())[:top_k]) for query in queries]


def _passages(given: Any) -> tuple[Passage, ...]:
    if isinstance(given, (str, Mapping)) or not hasattr(given, "__iter__"):
        raise ConfigurationError(f"static passages must be a list of passages, got {type(given).__name__}.")
    return tuple(_passage(item) for item in given)


def _passage(item: Any) -> Passage:
    if isinstance(item, Passage):
        return item
    if isinstance(item, Mapping) and {"id", "contents"} <= set(item) <= {"id", "contents", "score"}:
        return Passage(str(item["id"]), str(item["contents"]), float(item.get("score", 0.0)))
    raise ConfigurationError(f"a static passage is a Passage or a mapping with 'id' and 'contents', got {item!r}.")
