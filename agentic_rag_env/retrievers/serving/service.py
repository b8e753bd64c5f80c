"""Answers the requests to the server, apart from HTTP."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from agentic_rag_env.corpus import json_type
from agentic_rag_env.errors import RetrieverError
from agentic_rag_env.retrievers.base import MAX_QUERY_CHARS, Retriever, encodable, stats_of
from agentic_rag_env.retrievers.serving.batcher import Batcher, BusyError
from agentic_rag_env.retrievers.serving.metrics import ServerMetrics
from agentic_rag_env.settings import COUNT, Allowed, above, at_least, check_settings, within
from agentic_rag_env.types import Found, Passage

logger = logging.getLogger(__name__)


@dataclass
class ServerConfig:
    """Where a server listens, and its limits.

    Attributes:
        host: Address to listen on; the default can be reached from this machine only.
        port: Port to listen on; 0 takes a free one.
        top_k: Number of passages per query where a request does not say.
        max_top_k: Most passages per query that a request may ask for.
        max_batch: Most queries of a request, and of the batch to which concurrent requests are joined.
        max_wait_ms: Longest wait of a request for others to join its batch while nothing is searched; a client that is
            alone waits only the first time [milliseconds].
        max_waiting: Most queries that wait for a search; further requests are refused with status 503.
        max_query_chars: Most characters of a query.
        max_body_bytes: Most bytes of a request.
        timeout_s: Longest time for a request to arrive, for its search, and for a client to take the reply; also the
            time that requests have to finish when the server is stopped [seconds].
    """

    host: str = "127.0.0.1"
    port: int = 8000
    top_k: int = 3
    max_top_k: int = 100
    max_batch: int = 1024
    max_wait_ms: float = 3.0
    max_waiting: int = 16_384
    max_query_chars: int = MAX_QUERY_CHARS
    max_body_bytes: int = 4_000_000
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        check_settings(
            self, COUNT, "top_k", "max_top_k", "max_batch", "max_waiting", "max_query_chars", "max_body_bytes"
        )
        check_settings(self, Allowed(f"at most max_top_k={self.max_top_k}", self.max_top_k.__ge__), "top_k")
        check_settings(self, Allowed(f"at most max_waiting={self.max_waiting}", self.max_waiting.__ge__), "max_batch")
        check_settings(self, at_least(0), "max_wait_ms")
        check_settings(self, above(0), "timeout_s")
        check_settings(self, within(0, 65535), "port")


class RequestError(Exception):
    """A request that cannot be answered.

    Args:
        status: Status of the reply.
        message: Message for the client.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class RetrieveRequest:
    """What a request asks for.

    Attributes:
        queries: The queries in their order; a query that is too long is replaced by its error.
        top_k: Number of passages per query.
        return_scores: Whether documents come with their scores.
        return_errors: Whether the failure of a query is its own result; otherwise the request fails.
    """

    queries: tuple[str | RetrieverError, ...]
    top_k: int
    return_scores: bool
    return_errors: bool


def parse_request(body: bytes, config: ServerConfig) -> RetrieveRequest:
    """Read the body of a request to `/retrieve`; unknown fields are ignored.

    Raises:
        RequestError: The body is not JSON (400), or a field has another type or is over its limit (422).
    """
    try:
        given = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError(400, "The body is not valid JSON.") from None
    if not isinstance(given, dict):
        raise RequestError(422, f"The body must be an object with 'queries', got {json_type(given)}.")
    queries, top_k = _queries(given), given.get("topk")
    if len(queries) > config.max_batch:
        raise RequestError(422, f"'queries' must hold at most {config.max_batch} queries, got {len(queries)}.")
    for number, query in enumerate(queries):
        if not isinstance(query, str):
            raise RequestError(422, f"'queries' must be a list of strings; item {number} is {json_type(query)}.")
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int)):
        raise RequestError(422, f"'topk' must be an integer or null, got {json_type(top_k)}.")
    if not 0 <= (top_k or 0) <= config.max_top_k:
        raise RequestError(422, f"'topk' must be in [1, {config.max_top_k}], or null for {config.top_k}.")
    flags = {name: given.get(name, False) for name in ("return_scores", "return_errors")}
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise RequestError(422, f"{name!r} must be true or false, got {json_type(flag)}.")
    checked = [_not_too_long(query, number, config.max_query_chars) for number, query in enumerate(queries)]
    if not flags["return_errors"] and (refused := [each for each in checked if isinstance(each, RetrieverError)]):
        raise RequestError(422, str(refused[0]))
    return RetrieveRequest(tuple(checked), top_k or config.top_k, **flags)


def _queries(given: dict[str, Any]) -> list[Any]:
    """The list under `queries`, or the one query that some clients send under `query`."""
    if "query" in given and "queries" not in given:
        if not isinstance(given["query"], str):
            raise RequestError(422, f"'query' must be a string, got {json_type(given['query'])}.")
        return [given["query"]]
    if "query" in given:
        raise RequestError(422, "The body has both 'query' and 'queries'; send one of them.")
    queries = given.get("queries")
    if not isinstance(queries, list):
        raise RequestError(422, f"'queries' must be a list of strings, got {json_type(queries)}.")
    return queries


def _not_too_long(query: str, number: int, limit: int) -> str | RetrieverError:
    if len(query) > limit:
        return RetrieverError(f"A query may have {limit} characters; item {number} has {len(query)}.")
    return encodable(query)


def format_reply(found: Sequence[Found], return_scores: bool) -> bytes:
    """The body of a reply: for each query a list of documents, with or without scores, or the query's error."""

    def item(passage: Passage) -> dict[str, Any]:
        document = {"id": passage.id, "contents": passage.contents}
        return {"document": document, "score": float(passage.score)} if return_scores else document

    result = [
        {"error": str(each)} if isinstance(each, RetrieverError) else [item(passage) for passage in each]
        for each in found
    ]
    return json.dumps({"result": result}, allow_nan=False, separators=(",", ":")).encode()


class Service:
    """What the server does with each request, apart from HTTP.

    Args:
        retriever: Where to search.
        config: The limits.
        fingerprint: Fingerprint of the retriever; None if it has none.
    """

    def __init__(self, retriever: Retriever, config: ServerConfig, fingerprint: str | None = None) -> None:
        self._retriever = retriever
        self._config = config
        self._fingerprint = fingerprint
        self._metrics = ServerMetrics(lambda: self._batcher.num_waiting, lambda: stats_of(retriever))
        self._batcher = Batcher(
            retriever,
            max_batch=config.max_batch,
            max_wait_s=config.max_wait_ms / 1000,
            max_waiting=config.max_waiting,
            observe_batch=self._metrics.observe_batch,
        )

    @contextlib.asynccontextmanager
    async def running(self, app: Any = None) -> AsyncIterator[None]:
        """While inside, requests are answered."""
        task = asyncio.create_task(self._batcher.run())
        try:
            yield
        finally:
            task.cancel()

    async def retrieve(
        self, chunks: AsyncIterator[bytes], length: str | None, client_left: Callable[[], Awaitable[None]]
    ) -> tuple[int, bytes]:
        """Answer a request to `/retrieve`.

        Args:
            chunks: Pieces of the request's body, as they arrive.
            length: The request's header `Content-Length`.
            client_left: Returns when nobody waits for the reply any more; called once the body has arrived.

        Returns:
            The status and the body in JSON.
        """
        start = time.monotonic()
        try:
            request = parse_request(await self._read(chunks, length), self._config)
            status, reply = 200, await self._answer(request, client_left)
        except RequestError as error:
            status, reply = error.status, _detail(str(error))
        except BusyError:
            status, reply = 503, _detail(f"{self._config.max_waiting} queries are waiting already; try again later.")
        except RetrieverError as error:
            status, reply = 503, _detail(f"The search failed: {error}")
        except TimeoutError:
            status, reply = 503, _detail(f"The search took longer than {self._config.timeout_s} s.")
        except Exception as error:
            # The batcher has logged what the retriever raised.
            logger.debug("A request failed.", exc_info=error)
            status, reply = 500, _detail("The search failed; the log of the server says why.")
        self._metrics.observe_request(status, time.monotonic() - start)
        return status, reply

    def health(self) -> tuple[int, bytes]:
        """Answer a request to `/health`: status 503 while a search hangs."""
        hangs = self._batcher.searching_s > self._config.timeout_s
        return 503 if hangs else 200, json.dumps(
            {
                "status": "the search hangs" if hangs else "ok",
                "retriever": type(self._retriever).__name__,
                "fingerprint": self._fingerprint,
                "waiting": self._batcher.num_waiting,
            }
        ).encode()

    def metrics(self) -> tuple[bytes, str]:
        """Answer a request to `/metrics`: the body and its media type."""
        return self._metrics.render()

    async def _answer(self, request: RetrieveRequest, client_left: Callable[[], Awaitable[None]]) -> bytes:
        searched = [query for query in request.queries if isinstance(query, str)]
        results = iter(await self._search(searched, request.top_k, client_left) if searched else [])
        answers = [next(results) if isinstance(query, str) else query for query in request.queries]
        if not request.return_errors:
            for answer in answers:
                if isinstance(answer, RetrieverError):
                    raise answer
        return format_reply(answers, request.return_scores)

    async def _search(
        self, queries: Sequence[str], top_k: int, client_left: Callable[[], Awaitable[None]]
    ) -> list[Found]:
        """Search for as long as somebody waits for the result."""
        search = asyncio.ensure_future(self._batcher.search(queries, top_k))
        left = asyncio.ensure_future(client_left())
        try:
            await asyncio.wait({search, left}, timeout=self._config.timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if search.done():
                return search.result()
            if left.done():
                raise RequestError(499, "The client has left.")
            raise TimeoutError
        finally:
            search.cancel()
            left.cancel()

    async def _read(self, chunks: AsyncIterator[bytes], length: str | None) -> bytes:
        limit = self._config.max_body_bytes
        too_large = RequestError(413, f"The body may have {limit} bytes; send fewer queries at once.")
        if length is not None and length.isdecimal() and int(length) > limit:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._config.timeout_s):
                async for chunk in chunks:
                    body += chunk
                    if len(body) > limit:
                        raise too_large
        except TimeoutError:
            raise RequestError(408, f"The body did not arrive within {self._config.timeout_s} s.") from None
        return bytes(body)


def _detail(message: str) -> bytes:
    return json.dumps({"detail": message}).encode()
