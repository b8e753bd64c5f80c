"""The coalescing server against a plain one, and the batched vector environment against environments that ask singly.

`pytest benchmarks/test_server.py -s` searches 20,000 passages with a flat, exact index; if HTTP costs more than
the search, there is little to gain. RETRIEVAL_PASSAGES=1000000 uses a million. RETRIEVAL_FOLDER=<folder> keeps the
index for the next time (test_retrieval.py uses it too). SERVER_SECONDS=<s> is how long each server is under load.
Latencies mean little on a busy machine.
"""
# ruff: noqa: F811

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_retrieval import NUM_PASSAGES, folder, questions, spec_of, store  # noqa: F401

from agentic_rag_env.corpus import CorpusStore
from agentic_rag_env.datasets.base import QuestionSet
from agentic_rag_env.env import AgenticRAGEnv
from agentic_rag_env.retrievers.http import HttpConfig, HttpRetriever
from agentic_rag_env.retrievers.serving.service import ServerConfig
from agentic_rag_env.types import Question
from agentic_rag_env.vector import AgenticRAGVectorEnv

NUM_CLIENTS, NUM_ENVS, TOP_K = 256, 64, 3
#: Process of each running server, by its port.
PROCESSES: dict[int, int] = {}
SECONDS = float(os.environ.get("SERVER_SECONDS", 5))
#: A server as most are written: each request is a search in one of the framework's threads.
PLAIN = """
import json, sys
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from agentic_rag_env.corpus import CorpusStore
from agentic_rag_env.registry import RETRIEVERS
from agentic_rag_env.retrievers.serving.cli import listen_at
from agentic_rag_env.retrievers.serving.service import ServerConfig

retriever = RETRIEVERS.build(json.loads(sys.argv[1]), corpus=CorpusStore(sys.argv[2]))

async def retrieve(request: Request):
    given = await request.json()
    found = await run_in_threadpool(retriever.search, given["queries"], given["topk"])
    return JSONResponse({"result": [
        [{"document": {"id": p.id, "contents": p.contents}, "score": p.score} for p in passages] for passages in found
    ]})

app = Starlette(routes=[Route("/retrieve", retrieve, methods=["POST"])])
listener = listen_at(ServerConfig(port=0))
listener.listen(2048)
print("http://127.0.0.1:%d/retrieve" % listener.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False)).run(sockets=[listener])
"""


@contextlib.contextmanager
def server(kind: str, spec: dict[str, Any], corpus: Path) -> Iterator[int]:
    """Start a server process and yield its port."""
    if kind == "plain":
        command = ["-c", PLAIN, json.dumps(spec), str(corpus)]
    else:
        settings = [f"{key}={value}" for key, value in spec.items() if key != "name"]
        module = "agentic_rag_env.retrievers.serving.cli"
        command = ["-m", module, spec["name"], *settings, "--corpus", str(corpus), "--port", "0"]
    root = Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert process.stdout
        found = re.search(r":(\d+)/retrieve", process.stdout.readline())
        assert found, "the server did not start"
        PROCESSES[int(found[1])] = process.pid
        yield int(found[1])
    finally:
        process.terminate()
        process.communicate()


def cpu_seconds(port: int) -> float:
    """The processor time that a server has taken so far [s]."""
    fields = Path(f"/proc/{PROCESSES[port]}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def load(port: int, texts: list[str], num_clients: int, seconds: float) -> tuple[float, np.ndarray]:
    """Run clients side by side; each asks one query after another on its own connection.

    Returns:
        Queries per second, and the sorted latencies [ms].
    """
    latencies: list[float] = []
    connections = [await asyncio.open_connection("127.0.0.1", port) for _ in range(num_clients)]
    start = time.perf_counter()

    async def client(number: int) -> None:
        reader, writer = connections[number]
        turn = 0
        while time.perf_counter() < start + seconds:
            query = f"{texts[(number + turn) % len(texts)]} {number} {turn}"
            body = json.dumps({"queries": [query], "topk": TOP_K, "return_scores": True}).encode()
            asked, turn = time.perf_counter(), turn + 1
            writer.write(b"POST /retrieve HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            writer.write(b"Content-Length: %d\r\n\r\n" % len(body) + body)
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 200 "), head
            await reader.readexactly(int(re.search(rb"content-length: (\d+)", head)[1]))  # type: ignore[index]
            latencies.append(1000 * (time.perf_counter() - asked))
        writer.close()

    await asyncio.gather(*map(client, range(num_clients)))
    return len(latencies) / (time.perf_counter() - start), np.sort(latencies)


@pytest.fixture(scope="module")
def spec(folder: Path, store: CorpusStore) -> dict[str, Any]:
    return spec_of("flat", folder, store)


@pytest.fixture(scope="module")
def texts(questions: list[Question]) -> list[str]:
    return [question.text for question in questions]


def test_many_clients_at_once(spec: dict[str, Any], store: CorpusStore, texts: list[str]) -> None:
    """Queries per second of processor time decide.

    The plain server searches in 40 threads. On a machine that others use as well, it so gets a larger share of the
    cores, and answers more queries in a second of the clock although each costs more.
    """
    rates, per_cpu = {}, {}
    for kind in ("plain", "coalescing"):
        with server(kind, spec, store.path) as port:
            asyncio.run(load(port, texts, 8, 0.5))
            before, start = cpu_seconds(port), time.perf_counter()
            rates[kind], latencies = asyncio.run(load(port, texts, NUM_CLIENTS, SECONDS))
            per_cpu[kind] = len(latencies) / (cpu_seconds(port) - before)
            share = (cpu_seconds(port) - before) / (time.perf_counter() - start)
        p50, p99 = np.percentile(latencies, [50, 99])
        print(f"\n{NUM_PASSAGES} passages, {NUM_CLIENTS} clients, {kind}: {rates[kind]:.1f} queries/s, ", end="")
        print(f"{per_cpu[kind]:.1f} per CPU second, {share:.2f} cores, p50 {p50:.0f} ms, p99 {p99:.0f} ms")
    ratio = per_cpu["coalescing"] / per_cpu["plain"]
    print(f"ratio {rates['coalescing'] / rates['plain']:.1f}, per CPU second {ratio:.1f}")
    assert ratio >= (10 if NUM_PASSAGES >= 1_000_000 else 1)


def test_a_lone_client(spec: dict[str, Any], store: CorpusStore, texts: list[str]) -> None:
    latencies: dict[str, list[float]] = {"plain": [], "coalescing": []}
    with server("plain", spec, store.path) as plain, server("coalescing", spec, store.path) as coalescing:
        ports = {"plain": plain, "coalescing": coalescing}
        for part in range(21):  # in turn, so that other load on the machine meets both; the first round warms up
            for kind, port in ports.items():
                _, taken = asyncio.run(load(port, texts, 1, SECONDS / 20))
                latencies[kind] += taken.tolist() if part else []
    medians = {}
    for kind, all_taken in latencies.items():
        medians[kind], p99 = np.percentile(all_taken, [50, 99])
        print(f"\n{NUM_PASSAGES} passages, lone client, {kind}: p50 {medians[kind]:.2f} ms, p99 {p99:.2f} ms")
    deadline_ms = ServerConfig.max_wait_ms
    print(f"difference {medians['coalescing'] - medians['plain']:.2f} ms, deadline {deadline_ms} ms")
    assert medians["coalescing"] <= medians["plain"] + deadline_ms + 1


def ask_every_100_ms(port: int, texts: list[str], num_requests: int = 300) -> np.ndarray:
    """Return the latencies [ms] of a client that asks one usual query every 100 ms."""
    client, latencies = http.client.HTTPConnection("127.0.0.1", port), []
    due = time.perf_counter()
    for number in range(num_requests):
        due += 0.1
        time.sleep(max(0.0, due - time.perf_counter()))
        asked = time.perf_counter()
        retrieve(client, [texts[number % len(texts)]])
        latencies.append(1000 * (time.perf_counter() - asked))
    return np.array(latencies)


def retrieve(client: http.client.HTTPConnection, queries: list[str]) -> None:
    client.request("POST", "/retrieve", json.dumps({"queries": queries, "topk": TOP_K, "return_scores": True}))
    response = client.getresponse()
    assert response.status == 200, response.read()
    response.read()


def test_long_queries_do_not_hold_the_others_up(folder: Path, store: CorpusStore, texts: list[str]) -> None:
    """A second client sends 40 queries of 2,800 words in a request, again and again."""
    rng = np.random.default_rng(0)
    words = sorted({word for text in texts for word in text.lower().split() if len(word) <= 3})
    long_queries = [" ".join(rng.choice(words, 2800))[: ServerConfig.max_query_chars] for _ in range(40)]
    alone, beside = [], []
    with server("coalescing", spec_of("bm25", folder, store), store.path) as port:
        ask_every_100_ms(port, texts, 20)
        for _ in range(3):
            alone.append(np.percentile(ask_every_100_ms(port, texts), 99))
            stop, num_sent = threading.Event(), 0

            def send() -> None:
                nonlocal num_sent
                client = http.client.HTTPConnection("127.0.0.1", port)
                while not stop.is_set():  # noqa: B023
                    retrieve(client, long_queries)
                    num_sent += 1

            sender = threading.Thread(target=send)
            sender.start()
            beside.append(np.percentile(ask_every_100_ms(port, texts), 99))
            stop.set()
            sender.join()
            print(f"\n{NUM_PASSAGES} passages, p99 alone {alone[-1]:.0f} ms, beside ", end="")
            print(f"{num_sent} requests of 40 long queries {beside[-1]:.0f} ms")
    assert np.median(beside) <= max(50, 3 * np.median(alone))


def play_together(dataset: QuestionSet, retriever: HttpRetriever) -> int:
    """Play two searches and an answer in every row; return the number of episodes."""
    envs = AgenticRAGVectorEnv(NUM_ENVS, dataset=dataset, retriever=retriever, autoreset_mode="Disabled")
    envs.reset(seed=0)
    for turn in range(2):
        envs.step([f"<search> {dataset[row % len(dataset)].text} {turn} </search>" for row in range(NUM_ENVS)])
    *_, infos = envs.step(["<answer> nobody </answer>"] * NUM_ENVS)
    assert list(infos["num_searches"]) == [2] * NUM_ENVS
    return NUM_ENVS


def play_singly(dataset: QuestionSet, retriever: HttpRetriever) -> int:
    """Play the same, one environment after the other; return the number of episodes."""
    for row in range(NUM_ENVS):
        env = AgenticRAGEnv(dataset, retriever)
        env.reset(seed=row)
        for turn in range(2):
            env.step(f"<search> {dataset[row % len(dataset)].text} {turn} </search>")
        *_, info = env.step("<answer> nobody </answer>")
        assert info["num_searches"] == 2
    return NUM_ENVS


def test_environments(spec: dict[str, Any], store: CorpusStore, questions: list[Question]) -> None:
    dataset, rates = QuestionSet("questions", tuple(questions), None), {}
    with server("coalescing", spec, store.path) as port:
        retriever = HttpRetriever(HttpConfig(f"http://127.0.0.1:{port}", timeout_s=60.0))
        for play in (play_together, play_singly):
            play(dataset, retriever)
            start, num_episodes = time.perf_counter(), 0
            while time.perf_counter() < start + SECONDS:
                num_episodes += play(dataset, retriever)
            rates[play] = num_episodes / (time.perf_counter() - start)
    ratio = rates[play_together] / rates[play_singly]
    print(
        f"\n{NUM_PASSAGES} passages, {NUM_ENVS} environments: {rates[play_together]:.1f} episodes/s together, ", end=""
    )
    print(f"{rates[play_singly]:.1f} singly, ratio {ratio:.1f}")
    assert ratio >= (10 if NUM_PASSAGES >= 1_000_000 else 1)
