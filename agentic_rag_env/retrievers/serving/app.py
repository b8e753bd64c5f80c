"""The server's HTTP: its routes, and its limits for slow clients."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from agentic_rag_env.errors import required_library
from agentic_rag_env.retrievers.serving.metrics import MISSING
from agentic_rag_env.retrievers.serving.service import RequestError, Service


def make_app(service: Service, timeout_s: float) -> Any:
    """The ASGI application of a service.

    Args:
        service: Answers the requests.
        timeout_s: Longest wait for the rest of a request that has its reply already [seconds].

    Raises:
        ConfigurationError: The library `starlette` is missing.
    """
    with required_library(MISSING):
        from starlette.applications import Starlette
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import Response
        from starlette.routing import Route

    def json_response(status: int, body: bytes) -> Response:
        # The rest of a body that came too slowly is not waited for.
        headers = {"connection": "close"} if status == 408 else {"retry-after": "1"} if status == 503 else None
        return Response(body, status, headers, "application/json")

    async def body(request: Request) -> AsyncIterator[bytes]:
        try:
            async for chunk in request.stream():
                yield chunk
        except ClientDisconnect:
            raise RequestError(499, "The client has left.") from None

    async def retrieve(request: Request) -> Response:
        async def client_left() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass

        length = request.headers.get("content-length")
        return json_response(*await service.retrieve(body(request), length, client_left))

    async def health(request: Request) -> Response:
        return json_response(*service.health())

    async def metrics(request: Request) -> Response:
        content, media_type = service.metrics()
        return Response(content, headers={"content-type": media_type})

    routes = [
        Route("/retrieve", retrieve, methods=["POST"]),
        Route("/health", health, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
    ]
    return _ReadingToTheEnd(Starlette(routes=routes, lifespan=service.running), timeout_s)


class _ReadingToTheEnd:
    """Reads and drops the rest of a request before it is answered.

    Many clients listen only after they have sent everything. If a connection is closed while bytes of a request are
    unread, the system resets it. Then the client never sees why it was refused.

    Args:
        app: An ASGI application.
        timeout_s: Longest time from the beginning of a request until it is answered with its rest unread [seconds].
    """

    def __init__(self, app: Any, timeout_s: float) -> None:
        self._app = app
        self._timeout_s = timeout_s

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        deadline = asyncio.get_running_loop().time() + self._timeout_s
        unread = True

        async def noting_receive() -> Any:
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def send_afterwards(message: Any) -> None:
            if message["type"] == "http.response.start":
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout_at(deadline):
                        while unread:
                            await noting_receive()
            await send(message)

        await self._app(scope, noting_receive, send_afterwards)


def patient_protocol(timeout_s: float) -> type[asyncio.Protocol]:
    """The HTTP protocol of uvicorn with two more limits: for a request to arrive, and for a client to take a reply.

    uvicorn's own limits do not suffice. `timeout_keep_alive` begins after the first reply and ends with the first byte
    of the next request. Nothing bounds the wait for a client that takes no bytes. Without the two timers here, a client
    that sends one byte a minute, or reads none, holds a connection for ever.

    Args:
        timeout_s: Longest wait [seconds].
    """
    import h11
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class PatientProtocol(H11Protocol):
        _arriving: asyncio.TimerHandle | None = None
        _taking: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
            super().connection_made(transport)
            transport.set_write_buffer_limits(high=0)  # so that `pause_writing` tells of every byte not taken
            self._await_request()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            if self.conn.their_state is h11.DONE:
                self._arriving = _cancel(self._arriving)
            elif self._arriving is None:
                self._await_request()

        def on_response_complete(self) -> None:
            super().on_response_complete()
            if self.conn.trailing_data[0] and self._arriving is None:  # the next request has begun already
                self._await_request()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._taking = self.loop.call_later(timeout_s, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._taking = _cancel(self._taking)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._arriving, self._taking = _cancel(self._arriving), _cancel(self._taking)

        def _await_request(self) -> None:
            self._arriving = self.loop.call_later(timeout_s, self._give_up)

        def _give_up(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.abort()
            else:  # the service sees to this body itself; what it leaves unread is for the next call
                self._await_request()

    return PatientProtocol


def _cancel(timer: asyncio.TimerHandle | None) -> asyncio.TimerHandle | None:
    """Stop a timer, if there is one, and return None in its place."""
    if timer is not None:
        timer.cancel()
    return None
