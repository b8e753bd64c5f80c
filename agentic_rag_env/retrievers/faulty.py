"""A retriever whose searches fail on purpose, to show that a run survives them."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentic_rag_env.errors import RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import Wrapper, build_wrapped, checked_queries, fingerprint_of, scores_by
from agentic_rag_env.settings import FRACTION, Allowed, at_least, check_settings, check_value
from agentic_rag_env.types import Found, Passage

#: What can go wrong with a query; a share of the queries belongs to each.
_FAULTS = ("error", "timeout", "empty", "slow")


@dataclass
class FaultyConfig:
    """Which share of the queries goes wrong, and how; the shares add up to at most 1.

    Attributes:
        retriever: The retriever that answers the other queries: a name, a mapping with `name` and settings, or an
            object.
        error_fraction: Share of the queries that fail at once.
        timeout_fraction: Share of the queries that fail after `delay_s`.
        empty_fraction: Share of the queries for which nothing is found.
        slow_fraction: Share of the queries that get the right result, but only after `delay_s`.
        delay_s: Delay of timeouts and slow results [seconds]; the delays of one batch pass at the same time.
        seed: Seed that picks the queries.
    """

    retriever: Any = "bm25"
    error_fraction: float = 0.0
    timeout_fraction: float = 0.0
    empty_fraction: float = 0.0
    slow_fraction: float = 0.0
    delay_s: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        fractions = [f"{fault}_fraction" for fault in _FAULTS]
        check_settings(self, FRACTION, *fractions)
        total = round(sum(getattr(self, name) for name in fractions), 9)
        check_value("the sum of the fractions", total, Allowed("at most 1", lambda value: value <= 1))
        check_settings(self, at_least(0), "delay_s")


@RETRIEVERS.register("faulty", FaultyConfig)
class FaultyRetriever(Wrapper):
    """Fails for some queries of a batch, and passes the others on to another retriever.

    Seed and query text decide together. So a run meets the same faults in every process, after it is resumed, and
    however its queries are batched. Asking again does not help.

    Args:
        config: The faults.
        corpus: The passages for the retriever behind.

    Raises:
        ConfigurationError: A share is not in [0, 1], they add up to more than 1, or the delay is negative.
    """

    def __init__(self, config: FaultyConfig, corpus: Sequence[Passage] | None = None) -> None:
        self._fractions = {fault: getattr(config, f"{fault}_fraction") for fault in _FAULTS}
        self._config = config
        self._corpus = corpus
        self._retriever = build_wrapped("faulty", config.retriever, corpus)
        self.parts = [self._retriever]

    def search(self, queries: Sequence[str], top_k: int) -> list[Found]:
        """See `Retriever.search`. It raises nothing itself: the result of a query that fails is a `RetrieverError`."""
        queries = checked_queries(queries, top_k)
        faults = [self._fault(query) for query in queries]
        if self._config.delay_s and not {"timeout", "slow"}.isdisjoint(faults):
            time.sleep(self._config.delay_s)
        passed_on = [query for query, fault in zip(queries, faults, strict=True) if fault in (None, "slow")]
        answers = iter(self._retriever.search(passed_on, top_k) if passed_on else [])
        return [
            next(answers) if fault in (None, "slow") else self._result(fault, query)
            for query, fault in zip(queries, faults, strict=True)
        ]

    @property
    def fingerprint(self) -> str:
        """See `base.fingerprint_of`."""
        inner = fingerprint_of(self._retriever, self._config.retriever, self._corpus)
        return f"faulty({inner}, {self._fractions}, seed={self._config.seed})"

    @property
    def scores_by(self) -> str:
        """See `base.scores_by`."""
        return scores_by(self._retriever)

    def _fault(self, query: str) -> str | None:
        key = f"{self._config.seed} {query}".encode("utf-8", errors="surrogatepass")
        draw = int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()) / 2**64
        for kind, fraction in self._fractions.items():
            if draw < fraction:
                return kind
            draw -= fraction
        return None

    def _result(self, fault: str | None, query: str) -> Found:
        if fault == "empty":
            return []
        how = f"timed out after {self._config.delay_s} s" if fault == "timeout" else "failed"
        return RetrieverError(f"injected fault: the search for {query[:80]!r} {how}.")
