"""Search through a retrieval service that speaks the protocol of Search-R1."""

from __future__ import annotations

import hashlib
import json
import math
import os
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import check_search, encodable
from agentic_rag_env.types import Found, Passage

#: Replies of a 4xx status that another try may change: the request came in too slowly, or too many came in.
_PASSING_STATUSES = (408, 429)
_TOO_LARGE = 413


@dataclass
class HttpConfig:
    """Where the service is and how long to wait for it.

    Attributes:
        url: Address of the service, such as `http://127.0.0.1:8000/retrieve`; without a path, `/retrieve` is added. A
            list of addresses: servers with the same contents, which take turns and stand in for each other.
        timeout_s: Longest wait for a connection, for the next piece of a reply, and for the whole reply [seconds].
        max_retries: How often a request is repeated after a failed connection, a timeout or a status of 500 or above;
            each time by every server until one answers.
        backoff_s: Pause before the first repetition; each further one takes twice as long, and up to half of it is
            added by chance, so that many clients do not come back at once [seconds].
        max_batch: Most queries of one request; longer batches are split. A request that the server finds too large
            (status 413) is halved besides.
        skip_s: How long a server that failed is asked only if all others fail too [seconds].
        seed: Of the pauses; None: another one for every client.
    """

    url: Any
    timeout_s: float = 10.0
    max_retries: int = 3
    backoff_s: float = 0.5
    max_batch: int = 512
    skip_s: float = 30.0
    seed: int | None = None


class _TooLargeError(Exception):
    """The server wants smaller requests."""


@RETRIEVERS.register("http", HttpConfig)
class HttpRetriever:
    """Asks a service: `POST /retrieve` with all queries at once, over connections that stay open.

    The order of the reply is trusted to be best first, since a service may score by similarity or by distance.

    Args:
        config: Address and patience.
        corpus: Ignored; the service has its own.

    Raises:
        ConfigurationError: A setting is out of range, or the library `httpx` is missing.

    Attributes:
        urls: The complete addresses.
    """

    def __init__(self, config: HttpConfig, corpus: Sequence[Passage] | None = None) -> None:
        try:
            import httpx  # noqa: F401
        except ImportError as error:
            raise ConfigurationError("retriever 'http' needs the library httpx: pip install httpx.") from error
        self.config = config
        self.urls = _check(config)
        self._skipped_until = dict.fromkeys(self.urls, 0.0)
        self._turn = 0
        self._chance = random.Random(config.seed)
        self._client: Any = None
        self._client_pid = 0

    def __reduce__(self) -> tuple[Any, ...]:
        # Open connections cannot be copied; a copy, in this process or another, opens its own.
        return HttpRetriever, (self.config,)

    def search(self, queries: Sequence[str], top_k: int) -> list[Found]:
        """See `Retriever.search`. An empty list of queries sends nothing."""
        check_search(queries, top_k)
        texts = [encodable(query) for query in queries]
        found: list[Found] = []
        for start in range(0, len(texts), self.config.max_batch):
            found += self._search(texts[start : start + self.config.max_batch], top_k)
        return found

    @property
    def fingerprint(self) -> str:
        """See `base.fingerprint_of`; asked of the servers at `/health`.

        Raises:
            ConfigurationError: A server does not tell, or two differ.
            RetrieverError: A server cannot be reached.
        """
        told = {url: self._ask_fingerprint(url) for url in self.urls}
        first, *others = told.items()
        for url, fingerprint in others:
            if fingerprint != first[1]:
                raise ConfigurationError(
                    f"the servers do not search the same: {first[0]} has {first[1]!r}, {url} has {fingerprint!r}."
                )
        return first[1]

    def close(self) -> None:
        """Close the open connections; the next search opens new ones."""
        if self._client is not None and self._client_pid == os.getpid():
            self._client.close()
        self._client = None

    def _search(self, queries: list[str], top_k: int) -> list[Found]:
        # A server of agentic-rag-serve then answers a query that fails by its error; others do not know the field.
        payload = {"queries": queries, "topk": top_k, "return_scores": True, "return_errors": True}
        try:
            return self._parse(*self._post(payload), num_queries=len(queries), top_k=top_k)
        except _TooLargeError:
            middle = len(queries) // 2
            return self._search(queries[:middle], top_k) + self._search(queries[middle:], top_k)

    def _post(self, payload: dict[str, Any]) -> tuple[bytes, str, int]:
        """Send, and repeat where it may help; the body of the reply, who sent it and the number of tries it took."""
        import httpx

        for attempt in range(1, self.config.max_retries + 2):
            for url in self._servers():
                try:
                    status, body = self._exchange(url, payload)
                    if status == 200:
                        self._skipped_until[url] = 0.0
                        return body, url, attempt
                    problem = f"status {status}: {body[:200].decode('utf-8', errors='replace')}"
                    if status == _TOO_LARGE and len(payload["queries"]) > 1:
                        raise _TooLargeError
                    if status < 500 and status not in _PASSING_STATUSES:
                        raise self._failure(problem, url, attempt)
                except httpx.RequestError as error:
                    problem = f"{type(error).__name__}: {error}. Is the service running and reachable from here?"
                self._skipped_until[url] = time.monotonic() + self.config.skip_s
            if attempt <= self.config.max_retries:
                time.sleep(self.config.backoff_s * 2 ** (attempt - 1) * (1 + self._chance.random() / 2))
        raise self._failure(problem, url, attempt)

    def _servers(self) -> list[str]:
        """All servers in the order in which to ask them: by turns, those that failed lately at the end."""
        now, first = time.monotonic(), self._turn
        self._turn = (first + 1) % len(self.urls)
        return sorted(self.urls[first:] + self.urls[:first], key=lambda url: max(self._skipped_until[url], now))

    def _exchange(self, url: str, payload: dict[str, Any]) -> tuple[int, bytes]:
        import httpx

        deadline = time.monotonic() + self.config.timeout_s
        chunks = []
        with self._connected_client().stream("POST", url, json=payload) as response:
            for chunk in response.iter_bytes():
                chunks.append(chunk)
                # httpx bounds the wait for each piece only: a reply that trickles would never time out.
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout(f"the reply took longer than {self.config.timeout_s} s")
            return response.status_code, b"".join(chunks)

    def _ask_fingerprint(self, url: str) -> str:
        import httpx

        try:
            fingerprint = self._connected_client().get(httpx.URL(url).join("health")).json()["fingerprint"]
            if not isinstance(fingerprint, str):
                raise TypeError(f"fingerprint is {fingerprint!r}")
            return fingerprint
        except httpx.RequestError as error:
            raise RetrieverError(f"the service at {url} cannot be asked for its fingerprint: {error}.") from error
        except (ValueError, LookupError, TypeError) as error:
            raise ConfigurationError(
                f"the service at {url} does not tell what it searches; name it yourself with fingerprint=<name>, "
                "another one for every change of its corpus, index or settings."
            ) from error

    def _connected_client(self) -> Any:
        import httpx

        # A forked worker must not share a socket with its parent: replies would get mixed up.
        if self._client is None or self._client_pid != os.getpid():
            self._client, self._client_pid = httpx.Client(timeout=self.config.timeout_s), os.getpid()
        return self._client

    def _parse(self, body: bytes, url: str, attempt: int, *, num_queries: int, top_k: int) -> list[Found]:
        try:
            reply = json.loads(body)
        except (ValueError, RecursionError) as error:
            start = body[:200].decode("utf-8", errors="replace")
            raise self._failure(f"the reply is not JSON: {start!r}", url, attempt) from error
        if not isinstance(reply, dict) or not isinstance(reply.get("result"), list):
            raise self._failure(f"the reply has no list 'result': {str(reply)[:200]}", url, attempt)
        result = reply["result"]
        if len(result) != num_queries:
            raise self._failure(f"the reply has {len(result)} result lists for {num_queries} queries", url, attempt)
        return [self._found(item, number, url, attempt, top_k) for number, item in enumerate(result)]

    def _found(self, item: Any, number: int, url: str, attempt: int, top_k: int) -> Found:
        """The result of one query, which may be its error."""
        if isinstance(item, dict) and isinstance(item.get("error"), str):
            return self._failure(item["error"], url, attempt)
        if not isinstance(item, list):
            raise self._failure(f"result {number} is no list but {type(item).__name__}", url, attempt)
        try:
            return [_passage(document) for document in item[:top_k]]
        except ValueError as error:
            raise self._failure(str(error), url, attempt) from error

    def _failure(self, problem: str, url: str, attempt: int) -> RetrieverError:
        tries = f"{attempt} {'try' if attempt == 1 else 'tries'}"
        others = f" by each of {len(self.urls)} servers" if len(self.urls) > 1 else ""
        return RetrieverError(f"retriever at {url} failed after {tries}{others}: {problem}")


def _check(config: HttpConfig) -> list[str]:
    """The complete addresses, if all settings are in range."""
    urls = [config.url] if isinstance(config.url, str) else config.url
    if not isinstance(urls, Sequence) or not urls:
        raise ConfigurationError(f"http url must be an address or a list of addresses, got {config.url!r}.")
    if not (config.timeout_s > 0 and config.max_retries >= 0 and config.backoff_s >= 0 and config.skip_s >= 0):
        raise ConfigurationError(
            "http needs timeout_s > 0 and max_retries, backoff_s and skip_s >= 0, got "
            f"timeout_s={config.timeout_s}, max_retries={config.max_retries}, backoff_s={config.backoff_s}, "
            f"skip_s={config.skip_s}."
        )
    if config.max_batch < 1:
        raise ConfigurationError(f"http needs max_batch >= 1, got {config.max_batch}.")
    return list(dict.fromkeys(_complete(url) for url in urls))


def _complete(given: Any) -> str:
    import httpx

    try:
        url = httpx.URL(given)
    except (httpx.InvalidURL, TypeError) as error:
        raise ConfigurationError(f"http url {given!r} is invalid: {error}.") from error
    if url.scheme not in ("http", "https") or not url.host or (url.port or 80) > 65535:
        raise ConfigurationError(f"http url must look like http://host:8000/retrieve, got {given!r}.")
    return str(url.copy_with(path="/retrieve")) if url.path in ("", "/") else str(given)


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
