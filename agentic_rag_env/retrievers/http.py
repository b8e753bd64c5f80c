"""Search through a retrieval service that speaks the protocol of Search-R1."""

from __future__ import annotations

import hashlib
import json
import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import check_search, encodable
from agentic_rag_env.types import Passage


@dataclass
class HttpConfig:
    """Where the service is and how long to wait for it.

    Attributes:
        url: Address of the service, such as `http://127.0.0.1:8000/retrieve`; without a path, `/retrieve` is added.
        timeout_s: Longest wait for a connection, for the next piece of a reply, and for the whole reply [seconds].
        max_retries: How often a request is repeated after a failed connection, a timeout or a status of 500 or above.
        backoff_s: Pause before the first repetition; each further one takes twice as long [seconds].
    """

    url: str
    timeout_s: float = 10.0
    max_retries: int = 3
    backoff_s: float = 0.5


@RETRIEVERS.register("http", HttpConfig)
class HttpRetriever:
    """Asks a service: `POST /retrieve` with all queries at once, over connections that stay open.

    The order of the reply is trusted to be best first, since a service may score by similarity or by distance.

    Args:
        config: Address and patience.
        corpus: Ignored; the service has its own.

    Raises:
        ConfigurationError: A setting is out of range, or the library `httpx` is missing.
    """

    def __init__(self, config: HttpConfig, corpus: Sequence[Passage] | None = None) -> None:
        try:
            import httpx  # noqa: F401
        except ImportError as error:
            raise ConfigurationError("retriever 'http' needs the library httpx: pip install httpx.") from error
        self.config = config
        self.url = _check(config)
        self._client: Any = None
        self._client_pid = 0

    def __reduce__(self) -> tuple[Any, ...]:
        # Open connections cannot be copied; a copy, in this process or another, opens its own.
        return HttpRetriever, (self.config,)

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Passage]]:
        """See `Retriever.search`. An empty list of queries sends nothing."""
        check_search(queries, top_k)
        if not queries:
            return []
        payload = {"queries": [encodable(query) for query in queries], "topk": top_k, "return_scores": True}
        return self._parse(*self._post(payload), num_queries=len(queries), top_k=top_k)

    def close(self) -> None:
        """Close the open connections; the next search opens new ones."""
        if self._client is not None and self._client_pid == os.getpid():
            self._client.close()
        self._client = None

    def _post(self, payload: dict[str, Any]) -> tuple[bytes, int]:
        """Send, and repeat where it may help; the body of the reply and the number of tries it took."""
        import httpx

        pause_s = self.config.backoff_s
        for attempt in range(1, self.config.max_retries + 2):
            try:
                status, body = self._exchange(payload)
                if status == 200:
                    return body, attempt
                problem = f"status {status}: {body[:200].decode('utf-8', errors='replace')}"
                if status < 500:
                    raise self._failure(problem, attempt)
            except httpx.RequestError as error:
                problem = f"{type(error).__name__}: {error}. Is the service running and reachable from here?"
            if attempt <= self.config.max_retries:
                time.sleep(pause_s)
                pause_s *= 2
        raise self._failure(problem, self.config.max_retries + 1)

    def _exchange(self, payload: dict[str, Any]) -> tuple[int, bytes]:
        import httpx

        deadline = time.monotonic() + self.config.timeout_s
        chunks = []
        with self._connected_client().stream("POST", self.url, json=payload) as response:
            for chunk in response.iter_bytes():
                chunks.append(chunk)
                # httpx bounds the wait for each piece only: a reply that trickles would never time out.
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout(f"the reply took longer than {self.config.timeout_s} s")
            return response.status_code, b"".join(chunks)

    def _connected_client(self) -> Any:
        import httpx

        # A forked worker must not share a socket with its parent: replies would get mixed up.
        if self._client is None or self._client_pid != os.getpid():
            self._client, self._client_pid = httpx.Client(timeout=self.config.timeout_s), os.getpid()
        return self._client

    def _parse(self, body: bytes, attempt: int, *, num_queries: int, top_k: int) -> list[list[Passage]]:
        try:
            reply = json.loads(body)
        except (ValueError, RecursionError) as error:
            start = body[:200].decode("utf-8", errors="replace")
            raise self._failure(f"the reply is not JSON: {start!r}", attempt) from error
        if not isinstance(reply, dict) or not isinstance(reply.get("result"), list):
            raise self._failure(f"the reply has no list 'result': {str(reply)[:200]}", attempt)
        result = reply["result"]
        if len(result) != num_queries:
            raise self._failure(f"the reply has {len(result)} result lists for {num_queries} queries", attempt)
        for number, found in enumerate(result):
            if not isinstance(found, list):
                raise self._failure(f"result {number} is no list but {type(found).__name__}", attempt)
        try:
            return [[_passage(item) for item in found[:top_k]] for found in result]
        except ValueError as error:
            raise self._failure(str(error), attempt) from error

    def _failure(self, problem: str, attempt: int) -> RetrieverError:
        tries = f"{attempt} {'try' if attempt == 1 else 'tries'}"
        return RetrieverError(f"retriever at {self.url} failed after {tries}: {problem}")


def _check(config: HttpConfig) -> str:
    """The complete address, if all settings are in range."""
    import httpx

    try:
        url = httpx.URL(config.url)
    except httpx.InvalidURL as error:
        raise ConfigurationError(f"http url {config.url!r} is invalid: {error}.") from error
    if url.scheme not in ("http", "https") or not url.host or (url.port or 80) > 65535:
        raise ConfigurationError(f"http url must look like http://host:8000/retrieve, got {config.url!r}.")
    if not (config.timeout_s > 0 and config.max_retries >= 0 and config.backoff_s >= 0):
        raise ConfigurationError(
            "http needs timeout_s > 0, max_retries >= 0 and backoff_s >= 0, got "
            f"timeout_s={config.timeout_s}, max_retries={config.max_retries}, backoff_s={config.backoff_s}."
        )
    return str(url.copy_with(path="/retrieve")) if url.path in ("", "/") else config.url


def _passage(item: Any) -> Passage:
    """One passage of a reply: `{"document": {...}, "score": x}`, or the bare document of a service without scores.

    The BM25 and web services of Search-R1 send no `id`; a hash of the contents takes its place.

    Raises:
        ValueError: It is neither.
    """
    document, score = (item.get("document"), item.get("score")) if _is_scored(item) else (item, None)
    contents = document.get("contents") if isinstance(document, dict) else None
    if not isinstance(contents, str):
        raise ValueError(f"a document has no text 'contents': {str(item)[:200]}")
    identifier = document.get("id")
    if identifier is None:
        identifier = hashlib.blake2b(encodable(contents).encode(), digest_size=8).hexdigest()
    if isinstance(identifier, bool) or not isinstance(identifier, (str, int)):
        raise ValueError(f"a document's id is no string: {str(item)[:200]}")
    score = 0.0 if score is None else score
    if isinstance(score, bool) or not isinstance(score, (int, float)) or not math.isfinite(score):
        raise ValueError(f"a document's score is no finite number: {str(item)[:200]}")
    return Passage(str(identifier), encodable(contents), float(score))


def _is_scored(item: Any) -> bool:
    return isinstance(item, dict) and "document" in item
