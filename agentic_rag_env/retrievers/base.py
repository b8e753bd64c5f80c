"""What every retriever is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from agentic_rag_env.types import Passage


@runtime_checkable
class Retriever(Protocol):
    """Finds passages for queries, many at a time."""

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """Search.

        Args:
            queries: One or more query texts.
            top_k: Most passages per query, at least 1.

        Returns:
            One list per query, in the order of the queries: at most `top_k` passages, best first. The result for a
            query does not depend on the other queries.

        Raises:
            RetrieverError: The search failed; an empty list only ever means that nothing matched.
        """
        ...
