"""Search through a retrieval service that speaks the protocol of Search-R1."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from agentic_rag_env.errors import ConfigurationError, RetrieverError, required_library
from agentic_rag_env.http_client import ClientConfig, HttpClient, Reply, ServiceError
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import checked_queries, encodable
from agentic_rag_env.settings import COUNT, at_least, check_settings
from agentic_rag_env.types import Found, Passage

_TOO_LARGE, _OTHER_FIELDS = 413, 422
#: Number of requests under way at once to a service that takes one query in each.
_NUM_PARALLEL = 8


@dataclass
class HttpConfig(ClientConfig):
    """Where the service is and how it is asked.

    Attributes:
        url: Address of the service, such as `http://127.0.0.1:8000/retrieve`; without a path, `/retrieve` is added. A
            list of addresses names servers with the same contents, which take turns and stand in for each other.
        max_batch: Most queries of one request; longer batches are split. A request that the server finds too large
            (status 413) is halved as well, down to the query that is too large by itself.
        skip_s: Time for which a server that failed is asked only if all others fail too [seconds].
        seed: Seed of the pauses; None: another one for every client.
        one_query_per_request: Whether to send each query by itself, as `{"query": "..."}`, for services that take no
            list of `queries`. Several requests are under way at once; if one fails, only its query has failed.
    """

    url: Any
    max_batch: int = 512
    skip_s: float = 30.0
    seed: int | None = None
    one_query_per_request: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_settings(self, at_least(0), "skip_s")
        check_settings(self, COUNT, "max_batch")


@RETRIEVERS.register("http", HttpConfig)
class HttpRetriever:
    """Asks a service: `POST /retrieve` with all queries at once, over connections that stay open.

    The passages of a reply are taken to be best first, since a service may score by similarity or by distance.

    Args:
        config: Where the service is and how it is asked.
        corpus: Ignored; the service has its own.

    Raises:
        ConfigurationError: A setting is out of range, or the library `httpx` is missing.

    Attributes:
        urls: The complete addresses.
    """

    scores_by = "service"

    def __init__(self, config: HttpConfig, corpus: Sequence[Passage] | None = None) -> None:
        self.config = config
        self.urls = _addresses(config)
        self._client = HttpClient(self.urls, config, skip_s=config.skip_s, seed=config.seed)

    def __reduce__(self) -> tuple[Any, ...]:
        # Open connections cannot be copied. A copy of the object opens its own, in this process or another.
        return HttpRetriever, (self.config,)

    def search(self, queries: Sequence[str], top_k: int) -> list[Found]:
        """See `Retriever.search`. An empty list of queries sends nothing."""
        texts = checked_queries(queries, top_k)
        if self.config.one_query_per_request:
            with ThreadPoolExecutor(_NUM_PARALLEL) as pool:
                return list(pool.map(lambda text: self._search_one(text, top_k), texts))
        found: list[Found] = []
        for start in range(0, len(texts), self.config.max_batch):
            found += self._search(texts[start : start + self.config.max_batch], top_k)
        return found

    @property
    def fingerprint(self) -> str:
        """See `base.fingerprint_of`; the servers tell it at `/health`.

        Raises:
            ConfigurationError: A server does not tell its fingerprint, or two fingerprints differ.
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
        self._client.close()

    def _search(self, queries: list[str], top_k: int) -> list[Found]:
        try:
            return self._ask({"queries": queries}, len(queries), top_k)
        except ServiceError as error:
            if error.status == _OTHER_FIELDS:
                raise _retriever_error(error, " If it takes one query each, set one_query_per_request=true.") from error
            if error.status != _TOO_LARGE:
                raise _retriever_error(error) from error
            if len(queries) == 1:
                return [_retriever_error(error)]
            middle = len(queries) // 2
            return self._search(queries[:middle], top_k) + self._search(queries[middle:], top_k)

    def _search_one(self, query: str, top_k: int) -> Found:
        try:
            return self._ask({"query": query}, 1, top_k)[0]
        except ServiceError as error:
            return _retriever_error(error)

    def _ask(self, asked: Mapping[str, Any], num_queries: int, top_k: int) -> list[Found]:
        # With this field, agentic-rag-serve replies to a query that fails with its error; others don't know the field.
        reply = self._client.post({**asked, "topk": top_k, "return_scores": True, "return_errors": True})
        return _read_reply(reply, num_queries, top_k)

    def _ask_fingerprint(self, url: str) -> str:
        told: Any = None
        try:
            told = self._client.get(url, "health").json()
        except ServiceError as error:
            if error.status is None:  # it did not answer at all
                raise _retriever_error(error) from error
        fingerprint = told.get("fingerprint") if isinstance(told, dict) else None
        if not isinstance(fingerprint, str):
            raise ConfigurationError(
                f"the service at {url} does not tell what it searches; name it yourself with fingerprint=<name>, "
                "another one for every change of its corpus, index or settings."
            )
        return fingerprint


def _read_reply(reply: Reply, num_queries: int, top_k: int) -> list[Found]:
    """The results in a reply, one for each query.

    Raises:
        ServiceError: The reply has another form.
    """
    content = reply.json()
    if not isinstance(content, dict) or not isinstance(content.get("result"), list):
        raise reply.error(f"the reply has no list 'result': {str(content)[:200]}")
    result = content["result"]
    if len(result) != num_queries:
        raise reply.error(f"the reply has {len(result)} result lists for {num_queries} queries")
    return [_found(reply, item, number, top_k) for number, item in enumerate(result)]


def _found(reply: Reply, item: Any, number: int, top_k: int) -> Found:
    """The result of one query: passages, or the error of that query."""
    if isinstance(item, dict) and isinstance(item.get("error"), str):
        return _retriever_error(reply.error(item["error"]))
    if not isinstance(item, list):
        raise reply.error(f"result {number} is no list but {type(item).__name__}")
    try:
        return [_passage(document) for document in item[:top_k]]
    except ValueError as error:
        raise reply.error(str(error)) from error


def _retriever_error(error: ServiceError, hint: str = "") -> RetrieverError:
    return RetrieverError(f"retriever at {error}{hint}")


def _addresses(config: HttpConfig) -> list[str]:
    """The complete addresses."""
    urls = [config.url] if isinstance(config.url, str) else config.url
    if not isinstance(urls, Sequence) or not urls:
        raise ConfigurationError(f"http url must be an address or a list of addresses, got {config.url!r}.")
    return list(dict.fromkeys(_complete(url) for url in urls))


def _complete(given: Any) -> str:
    with required_library("retriever 'http' needs the library httpx: pip install httpx."):
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
        ValueError: The item has neither form.
    """
    is_scored = isinstance(item, dict) and "document" in item
    document, score = (item.get("document"), item.get("score")) if is_scored else (item, None)
    contents = document.get("contents") if isinstance(document, dict) else None
    if not isinstance(contents, str):
        raise ValueError(f"a document has no text 'contents': {str(item)[:200]}")
    identifier = document.get("id")
    if identifier is None:
        identifier = hashlib.blake2b(encodable(contents).encode(), digest_size=8).hexdigest()
    if isinstance(identifier, bool) or not isinstance(identifier, (str, int)):
        raise ValueError(f"a document's id is no string: {str(item)[:200]}")
    return Passage(str(identifier), encodable(contents), _score(score))


def _score(given: Any) -> float:
    if given is None:
        return 0.0
    is_number = isinstance(given, (int, float)) and not isinstance(given, bool)
    if not is_number or not abs(given) <= sys.float_info.max:  # nor is it NaN, or an integer beyond every float
        raise ValueError(f"a document's score is no finite number: {str(given)[:200]}")
    return float(given)
