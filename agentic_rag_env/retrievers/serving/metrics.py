"""Counts what a server does, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from agentic_rag_env.errors import required_library

#: The error where a library of the server is missing.
MISSING = "agentic-rag-serve needs uvicorn, starlette and prometheus-client: pip install 'agentic-rag-env[serve]'."
_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_QUERIES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class ServerMetrics:
    """Counters and histograms of one server.

    Args:
        num_waiting: Gives the number of queries that wait now.
        stats: Gives the counts of the retriever, such as `cache_hits`.

    Raises:
        ConfigurationError: The library `prometheus_client` is missing.
    """

    def __init__(self, num_waiting: Callable[[], int], stats: Callable[[], Mapping[str, int]]) -> None:
        with required_library(MISSING):
            import prometheus_client as prometheus
        # A registry of its own: the global one would add what else the process counts, another server's figures too.
        self._registry = prometheus.CollectorRegistry()
        common: dict[str, Any] = {"namespace": "agentic_rag", "registry": self._registry}
        self._requests = prometheus.Counter("requests", "Answered requests by status.", ["status"], **common)
        self._errors = prometheus.Counter("errors", "Requests answered with a status of 500 or above.", **common)
        self._queries = prometheus.Counter("queries", "Queries searched.", **common)
        self._batches = prometheus.Counter("batches", "Batches searched.", **common)
        waiting = prometheus.Gauge("waiting_queries", "Queries that wait for a search.", **common)
        waiting.set_function(num_waiting)
        self._batch_queries = prometheus.Histogram("batch_queries", "Queries of a batch.", buckets=_QUERIES, **common)
        self._search_seconds = prometheus.Histogram(
            "search_seconds", "Time of the search of a batch.", buckets=_SECONDS, **common
        )
        self._request_seconds = prometheus.Histogram(
            "request_seconds", "Time from a request to its answer.", buckets=_SECONDS, **common
        )
        self._registry.register(_RetrieverStats(stats))

    def observe_request(self, status: int, seconds: float) -> None:
        """Count a request to `/retrieve` that was answered.

        Args:
            status: Status of the reply.
            seconds: Time from the first line of the request to the reply.
        """
        self._requests.labels(str(status)).inc()
        self._errors.inc(status >= 500)
        self._request_seconds.observe(seconds)

    def observe_batch(self, num_queries: int, seconds: float) -> None:
        """Count a batch that was searched."""
        self._queries.inc(num_queries)
        self._batches.inc()
        self._batch_queries.observe(num_queries)
        self._search_seconds.observe(seconds)

    def render(self) -> tuple[bytes, str]:
        """All values as text, and the media type of that text."""
        from prometheus_client import exposition

        return exposition.generate_latest(self._registry), exposition.CONTENT_TYPE_LATEST


class _RetrieverStats:
    """A collector for Prometheus of the retriever's counts, which it asks for when the metrics are read."""

    def __init__(self, stats: Callable[[], Mapping[str, int]]) -> None:
        self._stats = stats

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        for name, value in self._stats().items():
            yield CounterMetricFamily(f"agentic_rag_{name}", "Counted by the retriever.", value=value)
