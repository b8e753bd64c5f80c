"""The server under fire: a real one, on a free port, with clients that speak HTTP by hand."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import gc
import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentic_rag_env.corpus import CorpusStore, open_corpus
from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.retrievers.bm25 import BM25Config, BM25Retriever
from agentic_rag_env.retrievers.cached import CachedConfig, CachedRetriever
from agentic_rag_env.retrievers.http import HttpConfig, HttpRetriever
from agentic_rag_env.retrievers.serving.batcher import Batcher
from agentic_rag_env.retrievers.serving.cli import listen_at, main, make_server
from agentic_rag_env.retrievers.serving.service import ServerConfig
from agentic_rag_env.types import Found, Passage

pytest.importorskip("starlette")


class Echo:
    """Finds passages made of the query; waits, fails and miscounts on request, and notes every batch."""

    def __init__(self) -> None:
        self.batches: list[tuple[list[str], int]] = []
        self.open = threading.Event()
        self.open.set()

    def search(self, queries: Sequence[str], top_k: int) -> list[Found]:
        self.batches.append((list(queries), top_k))
        assert self.open.wait(20)
        if "down" in queries:
            raise RetrieverError("the index is gone")
        if "poison" in queries:
            raise ZeroDivisionError("a secret of the machine")
        if "miscounted" in queries:
            return []
        return [self.result(query, top_k) for query in queries]

    def result(self, query: str, top_k: int) -> Found:
        if query == "bad":
            return RetrieverError("this query alone")
        size = 1_000_000 if query == "huge" else 1
        score = float("nan") if query == "nan" else 1 / 3
        return [Passage(f"{query}-{rank}", f'"T"\n{query} é' * size, score / rank) for rank in range(1, top_k + 1)]

    def sizes(self) -> list[int]:
        return [len(queries) for queries, _ in self.batches]


class Running:
    """A server in a thread."""

    def __init__(self, retriever: Any, **settings: Any) -> None:
        config = ServerConfig(**{"port": 0, "timeout_s": 10.0, **settings})
        listener = listen_at(config)
        self.port = listener.getsockname()[1]
        self.server = make_server(retriever, config, "the fingerprint")
        self.thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self.thread.start()
        until(lambda: self.server.started)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(20)
        assert not self.thread.is_alive()

    def is_idle(self) -> bool:
        state = self.server.server_state
        return not state.connections and not state.tasks

    def post(self, content: Any) -> tuple[int, Any]:
        status, _, reply = asyncio.run(exchange(self.port, request_of(content)))
        return status, json.loads(reply)

    def get(self, path: str) -> tuple[int, str]:
        status, _, reply = asyncio.run(exchange(self.port, f"GET {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()))
        return status, reply.decode()

    def health(self) -> dict[str, Any]:
        return json.loads(self.get("/health")[1])


@contextlib.contextmanager
def running(retriever: Any, **settings: Any) -> Iterator[Running]:
    server = Running(retriever, **settings)
    try:
        yield server
    finally:
        if isinstance(retriever, Echo):
            retriever.open.set()
        server.stop()


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def request_of(content: Any) -> bytes:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return f"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


async def read_reply(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in head[1:])}
    return int(head[0].split()[1]), headers, await reader.readexactly(int(headers["content-length"]))


async def exchange(port: int, request: bytes) -> tuple[int, dict[str, str], bytes]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request)
        await writer.drain()
        return await read_reply(reader)
    finally:
        writer.close()


def query(*texts: str, **fields: Any) -> dict[str, Any]:
    return {"queries": list(texts), **fields}


def expected(text: str, top_k: int = 3, scores: bool = False) -> list[Any]:
    documents = [{"id": f"{text}-{rank}", "contents": f'"T"\n{text} é'} for rank in range(1, top_k + 1)]
    if not scores:
        return documents
    return [{"document": document, "score": 1 / 3 / rank} for rank, document in enumerate(documents, 1)]


@pytest.fixture(scope="module")
def echo_server() -> Iterator[Running]:
    with running(Echo(), max_batch=64, max_query_chars=50, max_top_k=10, max_body_bytes=100_000) as server:
        yield server


# --- the protocol ----------------------------------------------------------------------------------------------------


def test_with_scores(echo_server: Running) -> None:
    reply = {"result": [expected("a", 2, scores=True), expected("b", 2, scores=True)]}
    assert echo_server.post(query("a", "b", topk=2, return_scores=True)) == (200, reply)


@pytest.mark.parametrize("scores", [{}, {"return_scores": False}])
def test_without_scores(echo_server: Running, scores: dict[str, bool]) -> None:
    reply = {"result": [expected("a", 2), expected("b", 2)]}
    assert echo_server.post(query("a", "b", topk=2, **scores)) == (200, reply)
    assert echo_server.post(query("a", topk=2, **scores)) == (200, {"result": [expected("a", 2)]})


def test_one_query_by_itself(echo_server: Running) -> None:
    """As skyrl-gym 0.4.0 asks."""
    content = {"query": "a", "topk": 2, "return_scores": True}
    assert echo_server.post(content) == (200, {"result": [expected("a", 2, scores=True)]})
    assert echo_server.post({"query": "a"}) == (200, {"result": [expected("a", 3)]})


def test_our_client_can_ask_for_one_query_at_a_time(echo_server: Running) -> None:
    url = f"http://127.0.0.1:{echo_server.port}"
    client = HttpRetriever(HttpConfig(url, one_query_per_request=True, max_retries=0))
    many_at_once = HttpRetriever(HttpConfig(url))
    texts = [f"q{number}" for number in range(20)]
    assert client.search(texts, 2) == many_at_once.search(texts, 2)
    good, bad = client.search(["a", "bad"], 1)
    assert [passage.id for passage in good] == ["a-1"]
    assert "this query alone" in str(bad)
    (down,) = client.search(["down"], 1)
    assert "status 503" in str(down)
    client.close()
    many_at_once.close()


@pytest.mark.parametrize("top_k", [{}, {"topk": None}, {"topk": 0}])
def test_top_k_by_default(echo_server: Running, top_k: dict[str, Any]) -> None:
    assert echo_server.post(query("a", **top_k)) == (200, {"result": [expected("a", 3)]})


def test_no_queries_and_unknown_fields(echo_server: Running) -> None:
    assert echo_server.post(query()) == (200, {"result": []})
    assert echo_server.post(query("a", model="x")) == (200, {"result": [expected("a")]})


def test_our_client_finds_what_the_retriever_finds(world: QuestionSet) -> None:
    plain = BM25Retriever(BM25Config(), world.corpus)
    queries = ["Paris capital", "", "xyzzy", "lone \ud800 Seine", "Berlin", "Seine", "Berlin"]
    with running(plain, max_batch=4) as server:
        client = HttpRetriever(HttpConfig(f"http://127.0.0.1:{server.port}", max_batch=4))
        assert client.search(queries, 2) == plain.search(queries, 2)
        assert client.fingerprint == "the fingerprint"
        client.close()


def test_a_service_can_be_cached_and_replayed(tmp_path: Path) -> None:
    with running(Echo()) as server:
        service = {"name": "http", "url": f"http://127.0.0.1:{server.port}"}
        online = CachedRetriever(CachedConfig(service, str(tmp_path / "c"))).search(["a", "b"], 2)
    config = CachedConfig(service, str(tmp_path / "c"), offline=True, fingerprint="the fingerprint")
    assert CachedRetriever(config).search(["a", "b"], 2) == online


# --- what cannot be answered -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b'{"queries": [', b"[" * 50_000, b'{"topk": 1' + b"0" * 5000])
def test_malformed_json(echo_server: Running, body: bytes) -> None:
    assert echo_server.post(body) == (400, {"detail": "The body is not valid JSON."})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ([], "must be an object with 'queries', got list"),
        ({}, "'queries' must be a list of strings, got null"),
        ({"query": ["a"]}, "'query' must be a string, got list"),
        ({"query": None}, "'query' must be a string, got null"),
        ({"query": "a", "queries": ["a"]}, "both 'query' and 'queries'"),
        ({"query": "b" * 51}, "may have 50 characters; item 0 has 51"),
        ({"queries": "a"}, "'queries' must be a list of strings, got str"),
        ({"queries": ["a", 5]}, "item 1 is int"),
        ({"queries": [None]}, "item 0 is null"),
        ({"queries": ["a"] * 65}, "at most 64 queries, got 65"),
        ({"queries": ["a", "b" * 51]}, "may have 50 characters; item 1 has 51"),
        ({"queries": ["a"], "topk": "3"}, "'topk' must be an integer or null, got str"),
        ({"queries": ["a"], "topk": True}, "'topk' must be an integer or null, got bool"),
        ({"queries": ["a"], "topk": 2.0}, "'topk' must be an integer or null, got float"),
        ({"queries": ["a"], "topk": 11}, "'topk' must be in [1, 10]"),
        ({"queries": ["a"], "topk": -1}, "'topk' must be in [1, 10]"),
        ({"queries": ["a"], "return_scores": 1}, "'return_scores' must be true or false, got int"),
        ({"queries": ["a"], "return_scores": None}, "'return_scores' must be true or false, got null"),
    ],
)
def test_wrong_types_and_limits(echo_server: Running, content: Any, problem: str) -> None:
    status, reply = echo_server.post(content)
    assert status == 422
    assert problem in reply["detail"]


def test_other_places(echo_server: Running) -> None:
    assert echo_server.get("/retrieve")[0] == 405
    assert echo_server.get("/other")[0] == 404


def test_no_http_at_all(echo_server: Running) -> None:
    status = asyncio.run(exchange_raw(echo_server.port, b"\x16\x03\x01 hello\r\n\r\n")).split()[1]
    assert status == b"400"
    until(echo_server.is_idle)


async def exchange_raw(port: int, request: bytes) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    reply = await reader.read()
    writer.close()
    return reply


@pytest.mark.parametrize("chunked", [False, True])
def test_ten_megabytes(echo_server: Running, chunked: bool) -> None:
    megabyte = b"x" * 1_000_000
    length, start, end = "Content-Length: 10000000", b"", b""
    if chunked:
        length, start, end = "Transfer-Encoding: chunked", b"F4240\r\n", b"\r\n"

    async def send() -> list[int]:
        """All of it, and only then listen; the connection must still be good for the next request."""
        reader, writer = await asyncio.open_connection("127.0.0.1", echo_server.port)
        writer.write(f"POST /retrieve HTTP/1.1\r\nHost: x\r\n{length}\r\n\r\n".encode())
        for _ in range(10):
            writer.write(start + megabyte + end)
            await writer.drain()
        writer.write(b"0\r\n\r\n" if chunked else b"")
        first, _, reply = await read_reply(reader)
        assert json.loads(reply)["detail"] == "The body may have 100000 bytes; send fewer queries at once."
        writer.write(request_of(query("a")))
        second, _, _ = await read_reply(reader)
        writer.close()
        return [first, second]

    assert asyncio.run(send()) == [413, 200]
    until(echo_server.is_idle)


# --- clients that are slow or leave ----------------------------------------------------------------------------------


def test_slow_clients_are_cut_off() -> None:
    with running(Echo(), timeout_s=0.5) as server:
        head = b"POST /retrieve HTTP/1.1\r\nHost: x\r\n"
        for silent in (b"", b"POST", head):
            assert asyncio.run(exchange_raw(server.port, silent)) == b""
        reply = asyncio.run(exchange_raw(server.port, head + b'Content-Length: 100\r\n\r\n{"queries'))
        assert reply.startswith(b"HTTP/1.1 408 ")
        assert b"did not arrive within 0.5 s" in reply
        # Slow at the second request of a connection, and with a body that was refused already.
        assert asyncio.run(exchange_raw(server.port, request_of(query("a")) + head)).startswith(b"HTTP/1.1 200 ")
        refused = asyncio.run(exchange_raw(server.port, head + b"Content-Length: 10000000\r\n\r\nabc"))
        assert refused.startswith(b"HTTP/1.1 413 ")
        until(server.is_idle)
        until(lambda: server.post(query("a"))[0] == 200)  # a busy machine may need several


def test_a_reply_that_nobody_takes_is_dropped() -> None:
    with running(Echo(), timeout_s=0.3) as server:
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            client.connect(("127.0.0.1", server.port))
            client.sendall(request_of(query("huge", topk=3)))
            until(lambda: not server.is_idle())
            until(server.is_idle)
        assert server.post(query("a"))[0] == 200


def test_clients_that_leave() -> None:
    echo = Echo()
    with running(echo) as server:
        echo.open.clear()
        whole = request_of(query("a"))
        for request in (b"", whole[:20], whole[:-5], whole, whole):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(request)
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(whole)
            until(lambda: bool(echo.batches))
        until(lambda: not server.server.server_state.connections)
        echo.open.set()
        until(server.is_idle)
        assert server.post(query("b")) == (200, {"result": [expected("b")]})
        assert server.health()["waiting"] == 0


def test_a_search_that_nobody_waits_for_is_dropped() -> None:
    echo = Echo()
    with running(echo) as server, searching(server, echo):
        for request in (query("b"), query("c" * 500, "d" * 500)):
            with socket.create_connection(("127.0.0.1", server.port)) as client:
                client.sendall(request_of(request))
                until(lambda: server.health()["waiting"] > 0)
            until(lambda: server.health()["waiting"] == 0)
    assert [queries for queries, _ in echo.batches] == [["first"]]


def test_of_a_request_whose_client_leaves_the_rest_is_dropped() -> None:
    echo = Echo()
    with running(echo) as server:
        echo.open.clear()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(request_of(query("c" * 500, "d" * 500, "e" * 500)))
            until(lambda: bool(echo.batches))
            assert server.health()["waiting"] == 2
        until(lambda: server.health()["waiting"] == 0)
        echo.open.set()
        assert server.post(query("a"))[0] == 200
    assert [queries for queries, _ in echo.batches] == [["c" * 500], ["a"]]


def test_of_a_search_that_takes_too_long_the_rest_is_dropped() -> None:
    echo = Echo()
    with running(echo, timeout_s=0.3) as server:
        echo.open.clear()
        assert server.post(query("c" * 500, "d" * 500))[0] == 503
        echo.open.set()
        until(lambda: server.post(query("a"))[0] == 200)
    assert [queries for queries, _ in echo.batches if queries != ["a"]] == [["c" * 500]]


@pytest.mark.parametrize(("path", "status"), [("/retrieve", b"413"), ("/elsewhere", b"404"), ("/health", b"405")])
@pytest.mark.parametrize("chunked", [False, True])
def test_who_sends_everything_before_listening_learns_why_it_is_refused(
    echo_server: Running, path: str, status: bytes, chunked: bool
) -> None:
    """With `Connection: close`, which would reset the connection while bytes are unread."""
    length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 8000000"
    with socket.create_connection(("127.0.0.1", echo_server.port)) as client:
        client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{length}\r\n\r\n".encode())
        for _ in range(8):
            client.sendall(b"F4240\r\n" * chunked + b"x" * 1_000_000 + b"\r\n" * chunked)
        client.sendall(b"0\r\n\r\n" * chunked)
        reply = b"".join(iter(lambda: client.recv(65536), b""))
    assert reply.split()[1] == status
    until(echo_server.is_idle)


# --- many at once ----------------------------------------------------------------------------------------------------


async def crowd(port: int, num_clients: int, num_requests: int) -> None:
    """Clients that all connect before the first one asks; each must get its own answers."""
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(num_clients)]

    async def client(number: int) -> None:
        reader, writer = connections[number]
        for turn in range(num_requests):
            text = f"client {number} turn {turn}"
            writer.write(request_of(query(text, topk=1 + number % 2, return_scores=True)))
            status, _, reply = await read_reply(reader)
            assert status == 200
            assert json.loads(reply) == {"result": [expected(text, 1 + number % 2, scores=True)]}
        writer.close()

    await asyncio.gather(*map(client, range(num_clients)))


def num_open_files() -> int:
    gc.collect()  # what earlier tests have left behind is not to be closed between two counts
    return len(list(Path("/proc/self/fd").iterdir()))


def check_crowd(num_clients: int) -> None:
    echo = Echo()
    with running(echo, timeout_s=60.0) as server:
        server.post(query("warm up"))
        until(server.is_idle)
        open_files = num_open_files()
        asyncio.run(crowd(server.port, num_clients, num_requests=3))
        until(server.is_idle)
        assert num_open_files() <= open_files  # what other tests left open may be closed meanwhile
    assert sum(echo.sizes()) == 3 * num_clients + 1
    assert len(echo.batches) < num_clients


def test_two_hundred_clients() -> None:
    check_crowd(200)


@pytest.mark.nightly
def test_a_thousand_clients() -> None:
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    try:
        check_crowd(1000)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@contextlib.contextmanager
def asking(server: Running, contents: Sequence[Any]) -> Iterator[list[Any]]:
    """Clients that have sent their requests; the list holds the replies afterwards."""
    replies: list[Any] = [None] * len(contents)

    def ask(place: int) -> None:
        replies[place] = server.post(contents[place])

    threads = [threading.Thread(target=ask, args=(place,)) for place in range(len(contents))]
    for thread in threads:
        thread.start()
    yield replies
    for thread in threads:
        thread.join(20)


@contextlib.contextmanager
def searching(server: Running, echo: Echo) -> Iterator[None]:
    """While inside, one search is going on that does not end."""
    echo.batches.clear()
    echo.open.clear()
    with asking(server, [query("first")]) as replies:
        try:
            until(lambda: bool(echo.batches))
            yield
        finally:
            echo.open.set()
    assert replies == [(200, {"result": [expected("first")]})]


def test_what_waits_is_searched_together() -> None:
    echo = Echo()
    contents = [query(f"q{number}", topk=2) for number in range(20)] + [
        query("x", "y", "x", topk=2),
        query("q3", topk=2),
    ]
    with running(echo) as server, searching(server, echo), asking(server, contents) as replies:
        until(lambda: server.health()["waiting"] == 23)
        echo.open.set()
    assert echo.sizes() == [1, 22]
    for content, reply in zip(contents, replies, strict=True):
        assert reply == (200, {"result": [expected(text, 2) for text in content["queries"]]})


def test_batches_are_bounded_and_have_one_top_k() -> None:
    echo = Echo()
    contents = [query(f"a{number}", topk=2) for number in range(20)] + [
        query(f"b{number}", topk=1) for number in range(3)
    ]
    with running(echo, max_batch=8) as server, searching(server, echo), asking(server, contents) as replies:
        until(lambda: server.health()["waiting"] == 23)
        echo.open.set()
    assert sorted(echo.sizes()) == [1, 3, 4, 8, 8]
    assert all(len({"a" in text for text in texts}) == 1 for texts, _ in echo.batches[1:])
    assert [status for status, _ in replies] == [200] * 23


def test_a_full_batch_does_not_wait() -> None:
    echo = Echo()
    contents = [query("a"), query("b", "c"), query("d")]
    with running(echo, max_batch=4, max_wait_ms=3_600_000) as server, asking(server, contents) as replies:
        pass
    assert [status for status, _ in replies] == [200] * 3
    assert echo.sizes() == [4]


def test_a_lone_client_waits_once_and_no_longer_than_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    wait_for = asyncio.wait_for

    async def noted(awaitable: Any, timeout: float | None) -> Any:
        waits.append(timeout or 0.0)
        return await wait_for(awaitable, timeout)

    monkeypatch.setattr("agentic_rag_env.retrievers.serving.batcher.asyncio.wait_for", noted)
    with running(Echo(), max_wait_ms=5.0) as server:
        for text in "abc":
            assert server.post(query(text))[0] == 200
        (wait,) = waits
        assert 0 < wait <= 0.005


async def order_of_batches(*requests: tuple[list[str], int], max_batch: int = 256) -> list[tuple[list[str], int]]:
    """In which batches requests are searched that all wait while something else is searched."""
    echo = Echo()
    batcher = Batcher(echo, max_batch=max_batch, max_wait_s=0.0, max_waiting=10_000, observe_batch=lambda *_: None)
    running = asyncio.create_task(batcher.run())
    echo.open.clear()
    first = asyncio.create_task(batcher.search(["first"], 1))
    while not echo.batches:
        await asyncio.sleep(0.001)
    searches = [asyncio.create_task(batcher.search(queries, top_k)) for queries, top_k in requests]
    await asyncio.sleep(0.01)
    assert batcher.num_waiting == sum(len(set(queries)) for queries, _ in requests)
    echo.open.set()
    await first
    for (queries, top_k), search in zip(requests, searches, strict=True):
        assert await search == [echo.result(query, top_k) for query in queries]
    assert batcher.num_waiting == 0
    running.cancel()
    return echo.batches[1:]


def test_long_queries_are_searched_alone_and_take_turns_with_the_others() -> None:
    one, two, three = ("x" * 401, "y" * 5000, "z" * 10_000)
    short = "s" * 400
    batches = asyncio.run(order_of_batches(([one, "a", two, one], 1), ([three], 1), (["b"], 2), ([short, "c"], 3)))
    # The request with `one` and `two` begins with its short query.
    assert batches == [([three], 1), (["a"], 1), ([one], 1), (["b"], 2), ([two], 1), ([short, "c"], 3)]


def test_clients_with_many_long_queries_take_turns() -> None:
    mine, yours = [f"{n}" * 500 for n in range(3)], [f"{n}" * 500 for n in range(3, 6)]
    batches = asyncio.run(order_of_batches((mine, 1), (yours, 1)))
    assert [query[0] for (query,), _ in batches] == ["0", "3", "1", "4", "2", "5"]


def test_batches_are_bounded_in_characters() -> None:
    """32,768 of them: 109 queries of 300."""
    mine, yours = [f"{n:0300}" for n in range(200)], [f"{n:0300}" for n in range(200, 220)]
    batches = asyncio.run(order_of_batches((mine, 1), (yours, 1)))
    assert [len(queries) for queries, _ in batches] == [109, 20, 91]


def test_too_many_wait() -> None:
    echo = Echo()
    contents = [query("a", "b", "c", "d"), query("e", "f", "g", "h")]
    settings = {"max_batch": 4, "max_waiting": 8}
    with running(echo, **settings) as server, searching(server, echo), asking(server, contents) as replies:
        until(lambda: server.health()["waiting"] == 8)
        status, headers, reply = asyncio.run(exchange(server.port, request_of(query("i"))))
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(reply) == {"detail": "8 queries are waiting already; try again later."}
        echo.open.set()
    assert [status for status, _ in replies] == [200, 200]


def test_replies_are_sent_at_once() -> None:
    with running(Echo()) as server, socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(request_of(query("a")))
        assert client.recv(10) == b"HTTP/1.1 2"
        (connection,) = server.server.server_state.connections
        accepted = connection.transport.get_extra_info("socket")
        assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# --- failures --------------------------------------------------------------------------------------------------------


def test_a_failed_search_is_no_empty_result(echo_server: Running) -> None:
    assert echo_server.post(query("down")) == (503, {"detail": "The search failed: the index is gone"})
    assert echo_server.post(query("a", "bad")) == (503, {"detail": "The search failed: this query alone"})


def test_a_failed_query_is_a_result_of_its_own_on_request(echo_server: Running) -> None:
    status, reply = echo_server.post(query("a", "bad", "b" * 51, "c", topk=1, return_errors=True))
    too_long = {"error": "A query may have 50 characters; item 2 has 51."}
    assert status == 200
    assert reply["result"] == [expected("a", 1), {"error": "this query alone"}, too_long, expected("c", 1)]


def test_one_bad_query_ends_its_own_episode_through_http_too(echo_server: Running) -> None:
    client = HttpRetriever(HttpConfig(f"http://127.0.0.1:{echo_server.port}", max_retries=0))
    good, bad, too_long = client.search(["a", "bad", "b" * 51], 1)
    assert [passage.id for passage in good] == ["a-1"]
    for error, said in ((bad, "this query alone"), (too_long, "may have 50 characters")):
        assert isinstance(error, RetrieverError)
        assert said in str(error)


@pytest.mark.parametrize("text", ["poison", "miscounted", "nan"])
def test_nothing_leaks_from_an_unexpected_error(echo_server: Running, text: str) -> None:
    reply = {"detail": "The search failed; the log of the server says why."}
    assert echo_server.post(query(text, return_scores=True)) == (500, reply)


def test_one_bad_query_does_not_cost_the_others_their_answers() -> None:
    echo = Echo()
    texts = ["a", "poison", "b", "bad", "c"]
    contents = [query(text) for text in texts]
    with running(echo) as server, searching(server, echo), asking(server, contents) as replies:
        until(lambda: server.health()["waiting"] == 5)
        echo.open.set()
    assert [status for status, _ in replies] == [200, 500, 200, 503, 200]
    assert [replies[place][1]["result"] for place in (0, 2, 4)] == [[expected(texts[place])] for place in (0, 2, 4)]


def test_a_search_that_hangs() -> None:
    echo = Echo()
    with running(echo, timeout_s=0.2) as server:
        echo.open.clear()
        assert server.post(query("a")) == (503, {"detail": "The search took longer than 0.2 s."})
        until(lambda: server.get("/health")[0] == 503)
        assert server.health()["status"] == "the search hangs"
        echo.open.set()
        until(lambda: server.get("/health")[0] == 200)
        assert server.post(query("b"))[0] == 200


# --- health and metrics ----------------------------------------------------------------------------------------------


def test_health(echo_server: Running) -> None:
    assert echo_server.health() == {
        "status": "ok",
        "retriever": "Echo",
        "fingerprint": "the fingerprint",
        "waiting": 0,
    }


def test_metrics() -> None:
    retriever = CachedRetriever(CachedConfig(Echo(), fingerprint="echo"))
    with running(retriever) as server:
        server.post(query("a", "b"))
        server.post(query("a", "c", "d"))
        server.post(query("down"))
        server.post(b"{")
        status, text = server.get("/metrics")
    assert status == 200
    values = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    counts = {
        'requests_total{status="200"}': 2,
        'requests_total{status="400"}': 1,
        'requests_total{status="503"}': 1,
        "errors_total": 1,
        "queries_total": 6,
        "batches_total": 3,
        "waiting_queries": 0,
        'batch_queries_bucket{le="1.0"}': 1,
        'batch_queries_bucket{le="2.0"}': 2,
        'batch_queries_bucket{le="4.0"}': 3,
        'batch_queries_bucket{le="+Inf"}': 3,
        "batch_queries_sum": 6,
        "batch_queries_count": 3,
        "search_seconds_count": 3,
        "request_seconds_count": 4,
        'request_seconds_bucket{le="+Inf"}': 4,
        "cache_hits_total": 1,
        "cache_misses_total": 5,
    }
    assert {name: float(values[f"agentic_rag_{name}"]) for name in counts} == counts
    described = set(re.findall(r"^# TYPE agentic_rag_(\w+) (?:counter|gauge|histogram)$", text, re.MULTILINE))
    families = {re.sub(r"(_bucket|_sum|_count)?(\{.*)?$", "", name) for name in values}
    assert {name.removeprefix("agentic_rag_") for name in families} == described


# --- the program -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def program(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """The server as a process, and its port."""
    command = [sys.executable, "-m", "agentic_rag_env.retrievers.serving.cli", *arguments, "--port", "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout
        line = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/retrieve", line)
        assert found, f"{line}{process.stderr and process.stderr.read()}"
        yield process, int(found[1])
    finally:
        process.kill()
        process.communicate()


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = process.communicate(timeout=20)
    return process.returncode, errors


async def health(port: int) -> dict[str, Any]:
    return json.loads((await exchange(port, b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"))[2])


def test_a_request_that_has_arrived_is_answered_before_the_end() -> None:
    slow = ["faulty", "retriever=bm25", "slow_fraction=1", "delay_s=0.7", "--dataset", "tiny", "--max-batch", "64"]

    async def work(process: subprocess.Popen[str], port: int) -> list[Any]:
        first = asyncio.create_task(exchange(port, request_of(query("the river"))))
        rest = []
        while not rest or (await health(port))["waiting"] < 63:
            if not rest and (await health(port))["waiting"] == 0:
                await asyncio.sleep(0.05)  # the first is being searched by now, or goes with the others
                rest = [asyncio.create_task(exchange(port, request_of(query("the river")))) for _ in range(63)]
            if first.done():
                pytest.skip("this machine is too slow: the first search was over before the other clients had come")
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        replies = await asyncio.gather(first, *rest)
        with pytest.raises(OSError):  # noqa: PT011
            await exchange(port, request_of(query("too late")))
        return replies

    with program(*slow) as (process, port):
        replies = asyncio.run(work(process, port))
        assert finish(process) == (0, "")
    assert [status for status, _, _ in replies] == [200] * 64
    assert len({reply for _, _, reply in replies}) == 1


def test_stopped_under_load_no_reply_is_torn() -> None:
    outcomes = {"answered": 0, "refused": 0}
    torn: list[bytes] = []

    async def client(port: int, number: int) -> None:
        """Asks until it is refused; what it gets until then must be whole."""
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            while True:
                writer.write(request_of(query(f"who founded company {number}", return_scores=True)))
                try:
                    status, _, reply = await read_reply(reader)
                except asyncio.IncompleteReadError as error:
                    torn.append(error.partial)  # empty: closed before the request was read
                    break
                assert status in (200, 503)
                assert len(json.loads(reply)["result"]) == 1
                outcomes["answered"] += 1
        outcomes["refused"] += 1

    async def work(process: subprocess.Popen[str], port: int) -> None:
        clients = [asyncio.create_task(client(port, number)) for number in range(40)]
        while outcomes["answered"] < 200:
            await asyncio.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        await asyncio.gather(*clients)

    with program("bm25", "--dataset", "tiny") as (process, port):
        asyncio.run(work(process, port))
        assert finish(process) == (0, "")
    assert outcomes["answered"] >= 200
    assert outcomes["refused"] == 40
    assert set(torn) <= {b""}


def test_settings_from_the_command_line(tmp_path: Path) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"id": "a", "contents": "\\"A\\"\\nalpha beta"}\n{"id": "b", "contents": "\\"B\\"\\nbeta"}\n')
    arguments = ["cached", "retriever.name=bm25", "retriever.k1=1.5", f"path={tmp_path / 'cache'}"]
    with program(*arguments, "--corpus", str(corpus), "--top-k", "1") as (process, port):
        status, _, reply = asyncio.run(exchange(port, request_of(query("alpha"))))
        assert (status, json.loads(reply)) == (200, {"result": [[{"id": "a", "contents": '"A"\nalpha beta'}]]})
        assert asyncio.run(health(port))["fingerprint"]
        process.send_signal(signal.SIGINT)
        assert finish(process)[0] == 0
    assert (tmp_path / "cache").exists()


def test_a_corpus_is_opened_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], restored_signals: None
) -> None:
    opened: list[Any] = []

    def stop(wrapper: str, spec: Any, corpus: Any) -> Any:
        opened.append(corpus)
        raise ConfigurationError("far enough")

    monkeypatch.setattr("agentic_rag_env.retrievers.serving.cli.build_wrapped", stop)
    file = tmp_path / "corpus.jsonl"
    file.write_text('{"id": "a", "contents": "alpha"}\n')
    store = open_corpus(file).path
    for given in (file, store):
        assert main(["bm25", "--corpus", str(given), "--port", "0"]) == 2
        assert "far enough" in capsys.readouterr().err
    assert [type(corpus) for corpus in opened] == [CorpusStore] * 2
    assert [corpus.path for corpus in opened] == [store] * 2


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["bm52", "--dataset", "tiny"], "Did you mean 'bm25'?"),
        (["bm25"], "searches a corpus, but got none"),
        (["bm25", "k1", "--dataset", "tiny"], "looks like key=value, got 'k1'"),
        (["bm25", "k2=1", "--dataset", "tiny"], "no setting 'k2'"),
        (["cached", "retriever=bm25", "retriever.k1=2"], "give that as retriever.name=bm25"),
        (["bm25", "--corpus", "missing.jsonl"], "missing.jsonl"),
        (["bm25", "--dataset", "tiny", "--port", "70000"], "port must be in [0, 65535], got 70000"),
        (["bm25", "--dataset", "tiny", "--top-k", "0"], "top_k must be an integer of at least 1, got 0"),
        (["bm25", "--dataset", "tiny", "--host", "203.0.113.1"], "cannot listen on 203.0.113.1"),
    ],
)
def test_settings_that_cannot_work(
    arguments: list[str], problem: str, capsys: pytest.CaptureFixture[str], restored_signals: None
) -> None:
    assert main([*arguments] if "--port" in arguments else [*arguments, "--port", "0"]) == 2
    assert problem in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str], restored_signals: None) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["bm25", "--dataset", "tiny", "--port", str(port)]) == 2
    assert f"cannot listen on 127.0.0.1, port {port}" in capsys.readouterr().err


def test_a_port_that_another_server_takes_meanwhile(
    capsys: pytest.CaptureFixture[str], restored_signals: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are bound to it before one of them listens."""

    def listen(self: socket.socket, backlog: int) -> None:
        raise OSError(errno.EADDRINUSE, "Address already in use")

    monkeypatch.setattr(socket.socket, "listen", listen)
    assert main(["bm25", "--dataset", "tiny", "--port", "0"]) == 2
    assert "cannot listen on 127.0.0.1, port 0: Address already in use" in capsys.readouterr().err


@pytest.fixture
def restored_signals() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize(
    "setting",
    [
        {"top_k": 0},
        {"max_top_k": 2},
        {"max_batch": 0},
        {"max_waiting": 10},
        {"max_wait_ms": -1.0},
        {"timeout_s": 0.0},
        {"max_body_bytes": 0},
        {"port": -1},
    ],
)
def test_settings_out_of_range(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(setting))):
        ServerConfig(**setting)
