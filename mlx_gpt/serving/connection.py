"""Connections to clients: uvicorn's HTTP/1.1, with limits for clients that are slow or greedy.

uvicorn itself waits for a request's head for any length of time, and keeps an answer that nobody reads. When a request
arrives before the last one is answered, it stops reading, so it does not notice when the client disconnects.
"""

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any

from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

IDLE_SECONDS = 20.0  # to send a request's head, and to read the rest of an answer
MAX_BYTES_AHEAD = 2**20  # of requests that arrive before earlier ones are answered


class Connection(asyncio.Protocol):
    """A connection that is aborted when no request begins for `IDLE_SECONDS`.

    It stands between the socket and uvicorn's protocol. It uses only asyncio's interfaces and the arguments that
    uvicorn gives to the class named by `http=`, and nothing inside uvicorn's protocol. A request finds its connection
    in `scope["state"]["connection"]`.
    """

    def __init__(self, *, app_state: dict[str, Any], **arguments: Any) -> None:
        self._http = H11Protocol(app_state={**app_state, "connection": self}, **arguments)
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None  # None once the connection is lost
        self._timer: asyncio.TimerHandle | None = None
        self._answering = 0  # requests; briefly 2, if one ends after the next has begun
        self._paused = False
        self._held = bytearray()  # bytes that came while uvicorn had paused reading

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has connected."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._start_timer()
        self._http.connection_made(_Transport(self, transport))  # type: ignore[arg-type]

    def data_received(self, data: bytes) -> None:
        """Bytes have arrived."""
        self._held += data
        if self._paused and len(self._held) > MAX_BYTES_AHEAD:
            self.abort()
        self._pass_on()

    def eof_received(self) -> None:
        """The client sends no more."""
        self._http.eof_received()

    def pause_writing(self) -> None:
        """The client reads more slowly than the server writes."""
        self._http.pause_writing()

    def resume_writing(self) -> None:
        """The client has caught up."""
        self._http.resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        """The connection is closed."""
        self._transport = None
        self._stop_timer()
        self._http.connection_lost(exc)

    def pause_reading(self) -> None:
        """uvicorn wants no more bytes. The socket is still read, since only reading shows a disconnect."""
        self._paused = True

    def resume_reading(self) -> None:
        """uvicorn wants bytes again."""
        self._paused = False
        if self._held:
            self._loop.call_soon(self._pass_on)  # not from inside uvicorn's own handling of a request

    def abort(self) -> None:
        """Close the connection without sending what is left."""
        if self._transport:
            self._transport.abort()

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """While a request is being answered, the idle limit does not apply."""
        self._answering += 1
        self._stop_timer()
        try:
            yield
        finally:
            self._answering -= 1
            if not self._answering and self._transport:
                self._start_timer()

    def _pass_on(self) -> None:
        if self._held and not self._paused and self._transport and not self._transport.is_closing():
            data, self._held = bytes(self._held), bytearray()
            self._http.data_received(data)

    def _start_timer(self) -> None:
        self._timer = self._loop.call_later(IDLE_SECONDS, self.abort)

    def _stop_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None


class _Transport:
    """The transport as uvicorn sees it: pausing goes to the connection, everything else to asyncio's transport."""

    def __init__(self, connection: Connection, transport: asyncio.Transport) -> None:
        self.pause_reading, self.resume_reading = connection.pause_reading, connection.resume_reading
        self._transport = transport

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)


def without_idle_limit(app: ASGIApp) -> ASGIApp:
    """Return the application with answers that may take longer than `IDLE_SECONDS`."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        with scope["state"]["connection"].answering():
            await app(scope, receive, send)

    return wrapped
