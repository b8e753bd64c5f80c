"""Asks HTTP services. It is the one place that decides on time limits, repeated requests and proxies."""

from __future__ import annotations

import ipaddress
import json
import os
import random
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from agentic_rag_env.errors import required_library
from agentic_rag_env.settings import Allowed, above, at_least, check_settings, or_none

#: Most bytes of a reply, decompressed; a service that sends more is broken or means harm.
MAX_REPLY_BYTES = 2**28
#: Statuses below 500 that another try may change: the request was too slow, or there were too many requests.
_PASSING_STATUSES = (408, 429)
#: Statuses that refuse this one request: an equal server would reply the same, and others may be answered.
REFUSALS = (400, 413, 422)
#: Characters of a reply that an error holds.
_SHOWN = 200
#: Longest pause that a server may ask for with the header `Retry-After` [seconds]; an overload takes about this long.
MAX_ASKED_PAUSE_S = 60.0
#: With this setting, the variables `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy` decide on the proxy.
ENVIRONMENT = "environment"
#: An address shows by its `://` that it is one, so that a stranger's saved settings cannot hide it.
_PROXY = Allowed(
    f"an address such as http://proxy:3128, or {ENVIRONMENT}", lambda value: value == ENVIRONMENT or "://" in value
)


class ServiceError(Exception):
    """A service gave no usable answer; the message says where, after how many tries and why.

    Args:
        message: What happened.
        status: Status of the last reply; None where there was none.
        is_final: Whether another try would have the same outcome.
        pause_s: How long the server asks to wait before another try [seconds].
        said: What the server said, where the status is no 200.
    """

    def __init__(
        self, message: str, status: int | None = None, is_final: bool = True, pause_s: float = 0.0, said: str = ""
    ) -> None:
        super().__init__(message)
        self.status, self.is_final, self.pause_s, self.said = status, is_final, pause_s, said


class Reply(NamedTuple):
    """A reply of a service with status 200.

    Attributes:
        body: Body of the reply.
        asked: Which server answered and after how many tries, for errors.
    """

    body: bytes
    asked: str

    def json(self) -> Any:
        """The body as plain data.

        Raises:
            ServiceError: It is not JSON.
        """
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError) as error:
            start = self.body[:_SHOWN].decode("utf-8", errors="replace")
            raise self.error(f"the reply is not JSON: {start!r}") from error

    def error(self, problem: str) -> ServiceError:
        """The error for a reply that is of no use."""
        return ServiceError(f"{self.asked}: {problem}", 200)


@dataclass(kw_only=True)
class ClientConfig:
    """How a service is asked.

    Attributes:
        timeout_s: Longest wait for a connection, for the next piece of a reply, and for the whole reply [seconds].
        max_retries: How often a request is repeated where that may help; each time all servers are asked until one
            answers.
        backoff_s: Pause before the first repetition [seconds]. Each further pause is twice as long, or as long as the
            server asks for, up to a minute. Up to half is added by chance, so that many clients do not come back at
            once.
        proxy: `environment`: the variables `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy` decide. An address
            such as `http://proxy:3128`: that proxy is used. None: no proxy is used. Addresses of this machine are never
            asked through a proxy.
    """

    timeout_s: float = 10.0
    max_retries: int = 3
    backoff_s: float = 0.5
    proxy: str | None = ENVIRONMENT

    def __post_init__(self) -> None:
        check_settings(self, above(0), "timeout_s")
        check_settings(self, at_least(0), "max_retries", "backoff_s")
        check_settings(self, or_none(_PROXY, "no proxy"), "proxy")


class HttpClient:
    """Asks one service, or several equal ones, over connections that stay open.

    A request is asked again after a failed connection, a timeout, and the statuses 408, 429 and 500 or above. Halves of
    surrogate pairs, which no request can hold, are sent as `?`. Threads may share a client; a forked process opens
    connections of its own.

    Args:
        urls: One or more servers with the same contents, which take turns and stand in for each other.
        config: How they are asked.
        skip_s: Time for which a server that failed is asked only if all others fail too [seconds].
        seed: Seed of the pauses; None: another one for every client.
        headers: Headers sent with every request.

    Raises:
        ConfigurationError: The library `httpx` is missing.
    """

    def __init__(
        self,
        urls: Sequence[str],
        config: ClientConfig,
        *,
        skip_s: float = 30.0,
        seed: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        with required_library(f"asking {urls[0]} needs the library httpx: pip install httpx."):
            import httpx  # noqa: F401
        self.urls, self._config, self._skip_s = list(urls), config, skip_s
        self._proxies = {url: proxy_for(url, config.proxy) for url in self.urls}
        self._headers = dict(headers or {})
        self._skipped_until = dict.fromkeys(self.urls, 0.0)
        self._turn = 0
        self._chance = random.Random(seed)
        self._client: Any = None
        self._client_pid = 0
        self._lock = threading.Lock()

    def post(self, payload: Mapping[str, Any]) -> Reply:
        """Send JSON, and send it again where that may help.

        Raises:
            ServiceError: No server gave a reply of status 200.
        """
        attempt = 1
        while True:
            failures = []
            for url in self._servers():
                try:
                    reply = self._ask("POST", url, attempt, payload)
                    self._skipped_until[url] = 0.0
                    return reply
                except ServiceError as error:
                    if error.is_final and (error.status is None or error.status in REFUSALS):
                        raise
                    self._skipped_until[url] = time.monotonic() + self._skip_s
                    failures.append(error)
            failure = failures[-1]
            if attempt > self._config.max_retries or all(error.is_final for error in failures):
                raise failure
            backoff = self._config.backoff_s * 2 ** (attempt - 1)
            time.sleep(max(backoff, failure.pause_s) * (1 + self._chance.random() / 2))
            attempt += 1

    def get(self, url: str, path: str) -> Reply:
        """Ask one of the servers once for the content at a path beside its address.

        Raises:
            ServiceError: The server gave no reply of status 200.
        """
        return self._ask("GET", url, path=path)

    def close(self) -> None:
        """Close the open connections; the next request opens new ones."""
        with self._lock:
            if self._client is not None and self._client_pid == os.getpid():
                self._client.close()
            self._client = None

    def _servers(self) -> list[str]:
        """All servers in the order in which to ask them. They take turns; servers that failed lately come last."""
        now, first = time.monotonic(), self._turn
        self._turn = (first + 1) % len(self.urls)
        return sorted(self.urls[first:] + self.urls[:first], key=lambda url: max(self._skipped_until[url], now))

    def _ask(
        self, method: str, url: str, attempt: int = 1, payload: Mapping[str, Any] | None = None, path: str = ""
    ) -> Reply:
        import httpx

        asked = self._asked(url, attempt)
        deadline = time.monotonic() + self._config.timeout_s
        body = bytearray()
        try:
            with self._connected().stream(method, httpx.URL(url).join(path), **_sent(payload)) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    # httpx bounds the wait for each piece only: a reply that trickles would never time out.
                    if time.monotonic() > deadline:
                        raise httpx.ReadTimeout(f"the reply took longer than {self._config.timeout_s} s")
                    if len(body) > MAX_REPLY_BYTES:
                        raise ServiceError(f"{url} sends more than {MAX_REPLY_BYTES} bytes; ask for less at once.")
                status, asked_pause = response.status_code, response.headers.get("Retry-After", "")
        except httpx.RequestError as error:
            problem = f"{type(error).__name__}: {error}. Is the service running and reachable from here?"
            raise ServiceError(f"{asked}: {problem}", is_final=False) from error
        if status != 200:
            said = body.decode("utf-8", errors="replace")
            is_final = status < 500 and status not in _PASSING_STATUSES
            pause_s = min(float(asked_pause), MAX_ASKED_PAUSE_S) if asked_pause.isdecimal() else 0.0
            raise ServiceError(f"{asked}: status {status}: {said[:_SHOWN]}", status, is_final, pause_s, said)
        return Reply(bytes(body), asked)

    def _connected(self) -> Any:
        # A forked worker must not share a socket with its parent: replies would get mixed up.
        with self._lock:
            if self._client is None or self._client_pid != os.getpid():
                self._client, self._client_pid = self._connect(), os.getpid()
            return self._client

    def _connect(self) -> Any:
        import httpx

        # By default httpx opens 100 connections, and the wait for a free one would count as the server's time.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        mounts = {}
        for url, proxy in self._proxies.items():
            if proxy is not None:
                try:
                    mounts[str(httpx.URL(url).join("/")).rstrip("/")] = httpx.HTTPTransport(proxy=proxy, limits=limits)
                except ImportError as error:
                    raise ServiceError(
                        f"{url} is to be asked through the proxy {_shown(proxy)}, which needs a library: pip install "
                        "'httpx[socks]'; proxy=null asks without a proxy."
                    ) from error
                except (ValueError, httpx.InvalidURL) as error:
                    raise ServiceError(f"{url} cannot be asked through the proxy {_shown(proxy)}: {error}.") from error
        # Given a transport of ours, httpx itself reads no variable for proxies.
        return httpx.Client(
            timeout=self._config.timeout_s,
            headers=self._headers,
            transport=httpx.HTTPTransport(limits=limits),
            mounts=mounts,
        )

    def _asked(self, url: str, attempt: int) -> str:
        proxy = self._proxies[url]
        through = "" if proxy is None else f" (through the proxy {_shown(proxy)}; proxy=null asks without)"
        tries = f"{attempt} {'try' if attempt == 1 else 'tries'}"
        return f"{url}{through} failed after {tries}"


def proxy_for(url: str, proxy: str | None) -> str | None:
    """The proxy through which an address is asked; None: it is asked directly.

    Args:
        url: The address.
        proxy: See `ClientConfig`.
    """
    parts = urlsplit(url)
    if proxy is None or _is_loopback(parts.hostname or ""):
        return None
    if proxy == ENVIRONMENT:
        if proxy_bypass(parts.netloc.rpartition("@")[2]):
            return None
        proxies = getproxies()
        proxy = proxies.get(parts.scheme) or proxies.get("all")
    return proxy if proxy is None or "://" in proxy else f"http://{proxy}"


def _is_loopback(host: str) -> bool:
    host = host.rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    # A server that listens on 0.0.0.0 prints that address, and people copy it.
    return address.is_loopback or address.is_unspecified


def _sent(payload: Mapping[str, Any] | None) -> dict[str, Any]:
    """What httpx sends: JSON as UTF-8, or nothing."""
    if payload is None:
        return {}
    content = json.dumps(payload, ensure_ascii=False, allow_nan=False).encode("utf-8", errors="replace")
    return {"content": content, "headers": {"Content-Type": "application/json"}}


def _shown(proxy: str) -> str:
    """A proxy's address without the password that it may hold."""
    scheme, _, rest = proxy.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"
