"""Serves a retriever over HTTP, in the protocol of Search-R1.

agentic-rag-serve bm25 --corpus corpus.jsonl
agentic-rag-serve dense index=e5_index --port 8001
agentic-rag-serve cached retriever.name=bm25 retriever.k1=1.2 path=cache.sqlite --corpus corpus.jsonl
agentic-rag-serve bm25 --dataset tiny

POST /retrieve  {"queries": ["..."], "topk": 3, "return_scores": true}; with "return_errors": true a query that fails
                has {"error": "..."} for its result, and the others theirs; otherwise the request fails;
                or {"query": "...", "topk": 3, "return_scores": true}, as skyrl-gym asks: a list of one
GET  /health    whether it answers, and the fingerprint of what it searches
GET  /metrics   counts and times for Prometheus
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import signal
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from agentic_rag_env.corpus import open_corpus
from agentic_rag_env.errors import ConfigurationError, required_library
from agentic_rag_env.registry import DATASETS
from agentic_rag_env.retrievers.base import Retriever, build_wrapped, fingerprint_of, prepare
from agentic_rag_env.retrievers.serving.app import make_app, patient_protocol
from agentic_rag_env.retrievers.serving.metrics import MISSING
from agentic_rag_env.retrievers.serving.service import ServerConfig, Service
from agentic_rag_env.terminal import add_settings, command_parser, run_command
from agentic_rag_env.types import Passage


def make_server(retriever: Retriever, config: ServerConfig, fingerprint: str | None = None) -> Any:
    """A server, to be run on a socket: `make_server(...).run(sockets=[listen_at(config)])`.

    It answers until SIGTERM or SIGINT, or until its `should_exit` is set, and then still answers what has arrived.

    Args:
        retriever: Where to search.
        config: The limits.
        fingerprint: Fingerprint of the retriever, for `/health`; None if it has none.

    Raises:
        ConfigurationError: A library is missing.
    """
    with required_library(MISSING):
        import uvicorn
    settings = uvicorn.Config(
        make_app(Service(retriever, config, fingerprint), config.timeout_s),
        http=patient_protocol(config.timeout_s),
        ws="none",
        lifespan="on",
        log_level="warning",
        access_log=False,
        server_header=False,
        # Longer than clients keep idle connections, so that none sends a request down one that is being closed.
        timeout_keep_alive=75,
        timeout_graceful_shutdown=math.ceil(config.timeout_s),
    )
    return uvicorn.Server(settings)


def listen_at(config: ServerConfig) -> socket.socket:
    """A socket bound to the address; clients are refused until a server runs on it.

    Raises:
        ConfigurationError: The address is taken, not this machine's, or not permitted.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    # asyncio sends small replies at once (TCP_NODELAY) only where the socket says that it is one of TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
    except OSError as error:
        listener.close()
        raise _cannot_listen(config, error) from error
    return listener


def _cannot_listen(config: ServerConfig, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"cannot listen on {config.host}, port {config.port}: {error.strerror}; choose another host or port."
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until stopped.

    Args:
        arguments: Arguments of the command line; None: those of the process.

    Returns:
        Exit status: 0 after SIGTERM or Ctrl-C, 2 where a setting can't work.
    """
    with contextlib.suppress(KeyboardInterrupt):
        return run_command(lambda: _serve(vars(_parser().parse_intermixed_args(arguments))))
    return 0


def _serve(options: Mapping[str, Any]) -> None:
    # uvicorn raises the signals that stopped it once more when it is done.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    # Read by torch and FAISS when they load. By default their threads spin while they wait for each other, and where
    # other processes share the cores, each waits for the others' time slices: a batch then takes several times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The thread that searches gives way sooner than after 5 ms to the one that speaks HTTP.
    sys.setswitchinterval(0.0005)
    config = ServerConfig(**{field.name: options[field.name] for field in fields(ServerConfig)})
    spec = _spec(options["retriever"], options["settings"])
    with listen_at(config) as listener:  # before anything slow is loaded
        corpus = _corpus(options["corpus"], options["dataset"])
        retriever = build_wrapped("agentic-rag-serve", spec, corpus)
        prepare(retriever)  # or the first large batch would wait for it
        try:
            fingerprint = fingerprint_of(retriever, spec, corpus)
        except ConfigurationError:
            fingerprint = None
        _allow_many_connections()
        server = make_server(retriever, config, fingerprint)
        try:
            listener.listen(server.config.backlog)  # from now on clients wait instead of being refused
        except OSError as error:  # another server was bound to the port, too, and listened first
            raise _cannot_listen(config, error) from error
        host, port = listener.getsockname()[:2]
        place = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        print(f"Serving {spec['name']} at http://{place}/retrieve; Ctrl-C ends it.", flush=True)
        server.run(sockets=[listener])


def _allow_many_connections() -> None:
    """Use as many open files as the system allows; the usual 1024 are fewer than clients may come."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _corpus(path: str | None, dataset: Any) -> Sequence[Passage] | None:
    if path is not None:
        return open_corpus(path)
    return None if dataset is None else DATASETS.build(dataset).corpus


def _spec(name: str, settings: Sequence[str]) -> dict[str, Any]:
    """A name and `key=value` settings as a mapping. Dots lead into nested mappings; values are JSON, or else text."""
    spec: dict[str, Any] = {"name": name}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if not equals:
            raise ConfigurationError(f"a setting of the retriever looks like key=value, got {setting!r}.")
        *path, last = key.split(".")
        place = spec
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ConfigurationError(
                    f"{setting!r} is inside of {part}={place!r}; give that as {part}.name={place}."
                )
        place[last] = _value(text)
    return spec


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("agentic-rag-serve", __doc__)
    parser.add_argument("retriever", help="registered name: bm25, dense, cached, ...")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="settings of the retriever")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--corpus", metavar="FILE", help="passages to search, unless the retriever has an index with its own"
    )
    source.add_argument(
        "--dataset", type=_value, help="search the corpus of a dataset: a name, or a JSON object with 'name'"
    )
    add_settings(parser, ServerConfig)
    return parser


if __name__ == "__main__":
    sys.exit(main())
