"""The HTTP retriever against a real server on this machine that misbehaves on request."""

from __future__ import annotations

import copy
import http.server
import json
import pickle
import re
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from agentic_rag_env.errors import ConfigurationError, RetrieverError
from agentic_rag_env.http_client import ClientConfig, HttpClient, proxy_for
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.base import Retriever
from agentic_rag_env.retrievers.http import HttpConfig, HttpRetriever
from agentic_rag_env.types import Passage


def scored(identifier: str, contents: str, score: float) -> dict[str, Any]:
    return {"document": {"id": identifier, "contents": contents}, "score": score}


class Service:
    """A server whose next replies are scripted: a status and a body each; the last one is repeated."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, bytes]] = []
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.clients: set[Any] = set()
        self.headers: dict[str, str] = {}
        self.delay_s = 0.0
        self.piece_delay_s = 0.0
        self.stop = threading.Event()
        service = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                service.requests.append((self.path, json.loads(body)))
                service.clients.add(self.client_address)
                status, reply = service.replies.pop(0) if len(service.replies) > 1 else service.replies[0]
                service.stop.wait(service.delay_s)
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(reply)))
                    for name, value in service.headers.items():
                        self.send_header(name, value)
                    self.end_headers()
                    pieces = [reply] if not service.piece_delay_s else [reply[i : i + 1] for i in range(len(reply))]
                    for piece in pieces:
                        self.wfile.write(piece)
                        self.wfile.flush()
                        service.stop.wait(service.piece_delay_s)
                except OSError:  # the client has given up
                    self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/retrieve"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, result: Any, status: int = 200) -> None:
        self.replies.append((status, json.dumps({"result": result}).encode()))


@pytest.fixture
def service() -> Iterator[Service]:
    service = Service()
    yield service
    service.stop.set()
    service.server.shutdown()
    service.server.server_close()


def retriever(service: Service, **settings: Any) -> HttpRetriever:
    return HttpRetriever(HttpConfig(service.url, **{"timeout_s": 5.0, "backoff_s": 0.001, **settings}))


def test_request_and_reply_follow_the_protocol(service: Service) -> None:
    service.answer([[scored("a", '"A"\nalpha', 2.5), scored("b", '"B"\nbeta', 1)], []])
    found = retriever(service).search(["first", "second"], 3)
    payload = {"queries": ["first", "second"], "topk": 3, "return_scores": True, "return_errors": True}
    assert service.requests == [("/retrieve", payload)]
    assert found == [[Passage("a", '"A"\nalpha', 2.5), Passage("b", '"B"\nbeta', 1.0)], []]


def test_registered_and_built_without_a_corpus(service: Service) -> None:
    built = RETRIEVERS.build({"name": "http", "url": service.url}, corpus=None)
    assert isinstance(built, HttpRetriever)
    assert isinstance(built, Retriever)


def test_url_without_a_path_gets_the_usual_one() -> None:
    assert HttpRetriever(HttpConfig("http://localhost:8000")).urls == ["http://localhost:8000/retrieve"]
    assert HttpRetriever(HttpConfig("http://localhost:8000/")).urls == ["http://localhost:8000/retrieve"]
    assert HttpRetriever(HttpConfig("https://host/api/search")).urls == ["https://host/api/search"]


def test_no_queries_no_request(service: Service) -> None:
    assert retriever(service).search([], 3) == []
    assert service.requests == []


def test_bare_documents_of_a_service_without_scores(service: Service) -> None:
    service.answer([[{"id": "a", "contents": "x"}, {"id": 7, "contents": "y"}]])
    assert retriever(service).search(["q"], 3) == [[Passage("a", "x", 0.0), Passage("7", "y", 0.0)]]


def test_documents_without_id_get_one_from_their_contents(service: Service) -> None:
    service.answer([[{"document": {"contents": "x"}, "score": 2}, {"document": {"contents": "y"}, "score": 1}]])
    first, second = retriever(service).search(["q"], 3)[0]
    again = retriever(service).search(["q"], 3)[0][0]
    assert first.id == again.id != second.id


def test_more_passages_than_asked_for_are_cut(service: Service) -> None:
    service.answer([[scored("a", "x", 2), scored("b", "y", 1)]])
    assert [passage.id for passage in retriever(service).search(["q"], 1)[0]] == ["a"]


def test_connection_is_kept_open(service: Service) -> None:
    service.answer([[]])
    client = retriever(service)
    for _ in range(3):
        client.search(["q"], 1)
    assert len(service.clients) == 1
    client.close()
    client.search(["q"], 1)
    assert len(service.clients) == 2


def test_hostile_queries_arrive_as_valid_text(service: Service) -> None:
    service.answer([[], [], [], []])
    queries = ["a\ud800b", "\x00\x1b\u2028", "日本\U0001f600", "x" * 100_000]
    assert retriever(service).search(queries, 1) == [[], [], [], []]
    assert service.requests[0][1]["queries"] == ["a?b", *queries[1:3], "x" * 10_000]


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda item: pickle.loads(pickle.dumps(item))])
def test_a_copy_opens_its_own_connection(service: Service, copier: Any) -> None:
    service.answer([[scored("a", "x", 1)]])
    original = retriever(service)
    original.search(["q"], 1)
    assert copier(original).search(["q"], 1) == original.search(["q"], 1)
    assert len(service.clients) == 2


def test_server_error_is_repeated(service: Service) -> None:
    service.replies += [(500, b"out of memory"), (503, b"busy")]
    service.answer([[scored("a", "x", 1)]])
    assert retriever(service, max_retries=2).search(["q"], 1) == [[Passage("a", "x", 1.0)]]
    assert len(service.requests) == 3


def test_server_error_without_end(service: Service) -> None:
    service.replies.append((500, b"out of memory"))
    with pytest.raises(RetrieverError) as caught:
        retriever(service, max_retries=2).search(["q"], 1)
    assert str(caught.value) == f"retriever at {service.url} failed after 3 tries: status 500: out of memory"
    assert len(service.requests) == 3


def test_one_query_per_request(service: Service) -> None:
    service.answer([[scored("a", "x", 1)]])
    client = retriever(service, one_query_per_request=True)
    assert client.search(["first", "second"], 3) == [[Passage("a", "x", 1.0)]] * 2
    bodies = sorted((body for _, body in service.requests), key=lambda body: body["query"])
    common = {"topk": 3, "return_scores": True, "return_errors": True}
    assert bodies == [{"query": "first", **common}, {"query": "second", **common}]


def test_a_server_of_the_other_kind_is_told_of(service: Service) -> None:
    service.replies.append((422, b'{"detail": [{"loc": ["body", "query"], "type": "missing"}]}'))
    with pytest.raises(RetrieverError, match="set one_query_per_request=true"):
        retriever(service).search(["q"], 3)


def test_client_error_is_not_repeated(service: Service) -> None:
    service.replies.append((422, b"topk must be below 10"))
    with pytest.raises(RetrieverError, match="failed after 1 try: status 422: topk must be below 10"):
        retriever(service).search(["q"], 11)
    assert len(service.requests) == 1


@pytest.mark.parametrize("status", [408, 429])
def test_a_busy_or_impatient_server_is_asked_again(service: Service, status: int) -> None:
    service.replies.append((status, b"later"))
    service.answer([[scored("a", "x", 1)]])
    assert retriever(service, max_retries=1).search(["q"], 1) == [[Passage("a", "x", 1.0)]]


@pytest.mark.parametrize(
    ("asked", "least", "most"),
    [("7", 7.0, 10.5), ("86400", 60.0, 90.0), ("-5", 0.0, 0.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 0.0, 0.0)],
)
def test_a_server_may_say_when_to_come_back(
    service: Service, monkeypatch: pytest.MonkeyPatch, asked: str, least: float, most: float
) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("agentic_rag_env.http_client.time.sleep", pauses.append)
    service.headers["Retry-After"] = asked
    service.replies.append((429, b"later"))
    service.answer([[scored("a", "x", 1)]])
    assert retriever(service, max_retries=1, backoff_s=0.0).search(["q"], 1) == [[Passage("a", "x", 1.0)]]
    assert len(pauses) == 1
    assert least <= pauses[0] <= most


class Echo(Service):
    """A server that finds each query's own text, and takes so many queries at once."""

    def __init__(self, most: int = 1000, fingerprint: Any = None, too_large: str | None = None) -> None:
        super().__init__()
        self.most, self.too_large = most, too_large
        self.server.RequestHandlerClass = self.handler(fingerprint)

    def handler(self, fingerprint: Any) -> Any:
        service = self

        class Handler(self.server.RequestHandlerClass):  # type: ignore[name-defined, misc]
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                service.requests.append((self.path, body))
                found = [[scored(query, query, 1.0)] for query in body["queries"]]
                fits = len(found) <= service.most and service.too_large not in body["queries"]
                self.reply(200 if fits else 413, {"result": found} if fits else {"detail": "too large"})

            def do_GET(self) -> None:
                self.reply(200, {"status": "ok"} | ({"fingerprint": fingerprint} if fingerprint else {}))

            def reply(self, status: int, content: Any) -> None:
                self.send_response(status)
                reply = json.dumps(content).encode()
                self.send_header("Content-Length", str(len(reply)))
                self.end_headers()
                self.wfile.write(reply)

        return Handler

    def __enter__(self) -> Echo:
        return self

    def __exit__(self, *args: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def sizes(self) -> list[int]:
        return [len(body["queries"]) for _, body in self.requests]


QUERIES = [f"q{number}" for number in range(10)]
ANSWERS = [[Passage(query, query, 1.0)] for query in QUERIES]


def test_long_batches_are_split() -> None:
    with Echo() as echo:
        assert retriever(echo, max_batch=4).search(QUERIES, 1) == ANSWERS
        assert echo.sizes() == [4, 4, 2]


def test_what_the_server_finds_too_large_is_halved() -> None:
    with Echo(most=3) as echo:
        assert retriever(echo).search(QUERIES, 1) == ANSWERS
        assert echo.sizes() == [10, 5, 2, 3, 5, 2, 3]


def test_one_query_too_large_is_an_error_of_its_own() -> None:
    with Echo(too_large="q3") as echo:
        found = retriever(echo).search(QUERIES, 1)
    assert isinstance(found[3], RetrieverError)
    assert re.search(r"failed after 1 try: status 413: .*too large", str(found[3]))
    assert found[:3] + found[4:] == ANSWERS[:3] + ANSWERS[4:]


def test_servers_take_turns() -> None:
    with Echo() as first, Echo() as second:
        client = HttpRetriever(HttpConfig([first.url, second.url]))
        for query, answer in zip(QUERIES, ANSWERS, strict=True):
            assert client.search([query], 1) == [answer]
        assert (len(first.requests), len(second.requests)) == (5, 5)


@pytest.mark.parametrize("status", [500, 401, 404])
def test_a_server_that_fails_or_refuses_is_stood_in_for_and_skipped(service: Service, status: int) -> None:
    service.replies.append((status, b"no"))
    with Echo() as echo:
        client = HttpRetriever(HttpConfig([service.url, echo.url], backoff_s=30.0))  # a pause would be noticed
        assert [client.search([query], 1) for query in QUERIES] == [[answer] for answer in ANSWERS]
    assert len(service.requests) == 1


@pytest.mark.parametrize("status", [400, 422])
def test_a_request_at_fault_is_sent_to_one_server(service: Service, status: int) -> None:
    service.replies.append((status, b"no"))
    with Echo() as echo:
        with pytest.raises(RetrieverError, match=f"after 1 try: status {status}: no"):
            HttpRetriever(HttpConfig([service.url, echo.url])).search(["q"], 1)
        assert not echo.requests


def test_what_all_servers_refuse_is_not_repeated(service: Service) -> None:
    service.replies.append((404, b"nothing here"))
    with pytest.raises(RetrieverError, match="failed after 1 try: status 404: nothing here"):
        HttpRetriever(HttpConfig([service.url, service.url + "2"], backoff_s=30.0)).search(["q"], 1)
    assert len(service.requests) == 2


def test_many_requests_at_once_do_not_wait_for_connections() -> None:
    """The server replies to none before all have come, which 100 connections, httpx's own limit, would never bring."""
    together = threading.Barrier(110)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            together.wait(timeout=20)
            self.send_response(200)
            self.send_header("Content-Length", "2")
            self.end_headers()
            self.wfile.write(b"{}")

        def log_message(self, *_: Any) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads, request_queue_size = True, 128

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        client = HttpClient([f"http://127.0.0.1:{server.server_port}/"], ClientConfig(timeout_s=10.0, max_retries=0))
        with ThreadPoolExecutor(110) as pool:
            assert {reply.body for reply in pool.map(client.post, [{}] * 110)} == {b"{}"}
        server.shutdown()


def test_a_server_is_asked_again_once_its_time_has_passed(service: Service) -> None:
    service.replies.append((500, b"broken"))
    with Echo() as echo:
        client = HttpRetriever(HttpConfig([service.url, echo.url], skip_s=0.0))
        for query in QUERIES:
            client.search([query], 1)
    assert len(service.requests) == 5


def test_all_servers_dead(service: Service) -> None:
    service.replies.append((500, b"broken"))
    client = HttpRetriever(HttpConfig([service.url, service.url + "2"], max_retries=1, backoff_s=0.001))
    with pytest.raises(RetrieverError) as caught:
        client.search(["q"], 1)
    assert "failed after 2 tries: status 500: broken" in str(caught.value)
    assert sorted(path for path, _ in service.requests) == ["/retrieve", "/retrieve", "/retrieve2", "/retrieve2"]


def test_fingerprint_is_that_of_the_servers() -> None:
    with Echo(fingerprint="wiki") as first, Echo(fingerprint="wiki") as second, Echo(fingerprint="news") as third:
        assert HttpRetriever(HttpConfig([first.url, second.url])).fingerprint == "wiki"
        with pytest.raises(ConfigurationError, match=r"do not search the same: .* has 'wiki', .* has 'news'"):
            _ = HttpRetriever(HttpConfig([first.url, third.url])).fingerprint


@pytest.mark.parametrize("told", ["", 5, ["wiki"]])
def test_a_server_without_fingerprint(told: Any) -> None:
    with Echo(fingerprint=told) as echo, pytest.raises(ConfigurationError, match="fingerprint=<name>"):
        _ = retriever(echo).fingerprint


def test_a_server_that_cannot_be_asked_for_its_fingerprint() -> None:
    with pytest.raises(RetrieverError, match="failed after 1 try: ConnectError"):
        _ = HttpRetriever(HttpConfig(f"http://127.0.0.1:{free_port()}")).fingerprint


@pytest.mark.parametrize("url", [[], 5, None, ["http://host", ""], ["http://host", 5]])
def test_impossible_lists_of_addresses(url: Any) -> None:
    with pytest.raises(ConfigurationError, match="http url"):
        HttpRetriever(HttpConfig(url))


def test_redirect_is_an_error(service: Service) -> None:
    service.replies.append((307, b""))
    with pytest.raises(RetrieverError, match="status 307"):
        retriever(service).search(["q"], 1)


def test_pauses_double_and_vary_by_seed(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    service.replies.append((500, b""))
    pauses: list[float] = []
    monkeypatch.setattr("agentic_rag_env.http_client.time.sleep", pauses.append)

    def pauses_of(seed: int) -> list[float]:
        pauses.clear()
        with pytest.raises(RetrieverError):
            retriever(service, max_retries=3, backoff_s=0.5, seed=seed).search(["q"], 1)
        return list(pauses)

    first = pauses_of(1)
    assert first == pauses_of(1) != pauses_of(2)
    assert (
        [0.5 <= first[0] <= 0.75, 1.0 <= first[1] <= 1.5, 2.0 <= first[2] <= 3.0]
        == [True] * 3
        == [pause not in (0.5, 1.0, 2.0) for pause in first]
    )


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_connection_refused() -> None:
    port = free_port()
    client = HttpRetriever(HttpConfig(f"http://127.0.0.1:{port}/retrieve", max_retries=1, backoff_s=0.001))
    with pytest.raises(
        RetrieverError, match=rf"127\.0\.0\.1:{port}/retrieve failed after 2 tries: ConnectError"
    ) as error:
        client.search(["q"], 1)
    assert "Is the service running" in str(error.value)


def test_silent_server_times_out_and_is_asked_again(service: Service) -> None:
    service.answer([[]])
    service.delay_s = 30.0
    start = time.monotonic()
    with pytest.raises(RetrieverError, match="failed after 2 tries: ReadTimeout"):
        retriever(service, timeout_s=0.1, max_retries=1).search(["q"], 1)
    assert time.monotonic() - start < 5
    assert len(service.requests) == 2


def test_trickling_reply_times_out(service: Service) -> None:
    service.replies.append((200, b" " * 1000))
    service.piece_delay_s = 0.05
    start = time.monotonic()
    with pytest.raises(RetrieverError, match=r"ReadTimeout: the reply took longer than 0\.2 s"):
        retriever(service, timeout_s=0.2, max_retries=0).search(["q"], 1)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        (b"<html>gateway</html>", "the reply is not JSON: '<html>gateway</html>'"),
        (b"\xff\xfe", "the reply is not JSON"),
        (b"", "the reply is not JSON: ''"),
        (b"[]", "the reply has no list 'result'"),
        (b'{"results": []}', "the reply has no list 'result'"),
        (b'{"result": {}}', "the reply has no list 'result'"),
        (b'{"result": []}', "0 result lists for 1 queries"),
        (b'{"result": [[], []]}', "2 result lists for 1 queries"),
        (b'{"result": [null]}', "result 0 is no list but NoneType"),
        (b'{"result": [[null]]}', "no text 'contents': None"),
        (b'{"result": [["text"]]}', "no text 'contents': text"),
        (b'{"result": [[{"document": null, "score": 1}]]}', "no text 'contents'"),
        (b'{"result": [[{"document": {"id": "a"}, "score": 1}]]}', "no text 'contents'"),
        (b'{"result": [[{"document": {"id": "a", "contents": 5}, "score": 1}]]}', "no text 'contents'"),
        (b'{"result": [[{"document": {"id": [], "contents": "x"}, "score": 1}]]}', "id is no string"),
        (b'{"result": [[{"document": {"id": "a", "contents": "x"}, "score": "1"}]]}', "score is no finite number"),
        (b'{"result": [[{"document": {"id": "a", "contents": "x"}, "score": NaN}]]}', "score is no finite number"),
        (b'{"result": [[{"document": {"contents": "x"}, "score": 1%s}]]}' % (b"0" * 400), "score is no finite number"),
        (b'{"result": [[{"document": {"contents": "x"}, "score": 1e400}]]}', "score is no finite number"),
        (b'{"result": [[{"document": {"contents": "x"}, "score": 1%s}]]}' % (b"0" * 5000), "the reply is not JSON"),
        (b"[" * 100_000, "the reply is not JSON"),
    ],
)
def test_malformed_reply(service: Service, body: bytes, problem: str) -> None:
    service.replies.append((200, body))
    with pytest.raises(RetrieverError, match="failed after 1 try") as caught:
        retriever(service).search(["q"], 1)
    assert problem in str(caught.value)
    assert service.url in str(caught.value)
    assert len(service.requests) == 1


@pytest.mark.parametrize("url", ["localhost:8000", "ftp://host/", "http://", "", "http://host:99999/"])
def test_impossible_address(url: str) -> None:
    with pytest.raises(ConfigurationError, match="http url"):
        HttpRetriever(HttpConfig(url))


@pytest.mark.parametrize(
    "setting", [{"timeout_s": 0.0}, {"max_retries": -1}, {"backoff_s": -1.0}, {"skip_s": -1.0}, {"max_batch": 0}]
)
def test_impossible_patience(setting: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(setting))):
        HttpRetriever(HttpConfig("http://localhost", **setting))


def test_top_k_below_one(service: Service) -> None:
    with pytest.raises(ConfigurationError, match="top_k must be an integer of at least 1, got 0"):
        retriever(service).search(["q"], 0)


def test_a_bomb_is_not_read_to_its_end(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agentic_rag_env.http_client.MAX_REPLY_BYTES", 1000)
    service.replies.append((200, b" " * 100_000))
    with pytest.raises(RetrieverError, match="sends more than 1000 bytes"):
        retriever(service).search(["q"], 1)


# --- proxies ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.mark.parametrize(
    ("url", "setting", "variables", "proxy"),
    [
        ("http://wiki.example:8000/retrieve", "environment", {}, None),
        ("http://wiki.example:8000/retrieve", "environment", {"http_proxy": "http://p:3128"}, "http://p:3128"),
        ("http://wiki.example:8000/retrieve", "environment", {"HTTP_PROXY": "p:3128"}, "http://p:3128"),
        ("https://wiki.example/retrieve", "environment", {"http_proxy": "http://p:3128"}, None),
        ("https://wiki.example/retrieve", "environment", {"all_proxy": "socks5://p:1080"}, "socks5://p:1080"),
        ("http://wiki.example/retrieve", "environment", {"http_proxy": "p:1", "no_proxy": "example"}, None),
        ("http://wiki.example/retrieve", "environment", {"http_proxy": "p:1", "no_proxy": "other"}, "http://p:1"),
        ("http://wiki.example/retrieve", None, {"http_proxy": "http://p:3128"}, None),
        ("http://wiki.example/retrieve", "http://q:1", {"http_proxy": "http://p:3128"}, "http://q:1"),
        *(
            (f"http://{host}:8000/retrieve", setting, {"http_proxy": "http://p:3128", "all_proxy": "http://p:1"}, None)
            for host in (
                *("localhost", "localhost.", "gpu.localhost", "127.0.0.1", "127.1.2.3", "0.0.0.0"),
                *("[::1]", "[::]", "[::ffff:127.0.0.1]"),
            )
            for setting in ("environment", "http://q:1")
        ),
    ],
)
def test_which_proxy_is_asked(
    no_proxies: None,
    monkeypatch: pytest.MonkeyPatch,
    url: str,
    setting: str | None,
    variables: dict[str, str],
    proxy: str | None,
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert proxy_for(url, setting) == proxy


def test_a_proxy_from_the_environment_is_used_and_named(
    no_proxies: None, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scripted server plays the proxy, so the name of the service need not exist."""
    address = service.url.removeprefix("http://").removesuffix("/retrieve")
    monkeypatch.setenv("http_proxy", f"http://user:secret@{address}")
    service.answer([[scored("a", "x", 1)]])
    client = HttpRetriever(HttpConfig("http://wiki.invalid:8000", max_retries=0))
    assert client.search(["q"], 1) == [[Passage("a", "x", 1.0)]]
    assert service.requests[0][0] == "http://wiki.invalid:8000/retrieve"
    service.replies[:] = [(502, b"no such host")]
    with pytest.raises(RetrieverError) as caught:
        client.search(["q"], 1)
    assert str(caught.value) == (
        f"retriever at http://wiki.invalid:8000/retrieve (through the proxy http://{address}; proxy=null asks without) "
        "failed after 1 try: status 502: no such host"
    )


def test_this_machine_is_asked_directly(no_proxies: None, service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    service.answer([[]])
    assert retriever(service, max_retries=0).search(["q"], 1) == [[]]


@pytest.mark.parametrize(
    ("proxy", "said"),
    [
        ("socks5://proxy.invalid:1080", r"the proxy socks5://proxy\.invalid:1080, which needs .*'httpx\[socks\]'"),
        ("gopher://proxy.invalid", "cannot be asked through the proxy gopher://proxy.invalid"),
        ("http://proxy:port", "cannot be asked through the proxy http://proxy:port"),
    ],
)
def test_a_proxy_that_cannot_be_used(no_proxies: None, monkeypatch: pytest.MonkeyPatch, proxy: str, said: str) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    for settings in ({"proxy": proxy}, {}):
        monkeypatch.setenv("all_proxy", proxy)
        with pytest.raises(RetrieverError, match=said):
            HttpRetriever(HttpConfig("http://wiki.invalid", **settings)).search(["q"], 1)
