"""The guard in front of the application: it limits who may send requests, how large, and for how long.

It is ASGI middleware (https://asgi.readthedocs.io/en/latest/specs/www.html), so that it can refuse a body that is
still arriving, and end a stream that is still being sent.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import platform
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_gpt.errors import shown
from mlx_gpt.serving import page
from mlx_gpt.serving.errors import CLIENT_CLOSED, APIError
from mlx_gpt.serving.metrics import Metrics

MAX_BODY = 2**20  # bytes: many times the longest context
READ_SECONDS = 20.0  # for a whole body
WRITE_SECONDS = 20.0  # for each part of an answer
OPEN = ("/", "/health")  # need no key, since they reveal nothing about a model

log = logging.getLogger("mlx_gpt")


class Guard:
    """Refuses forbidden requests, enforces limits, and logs one line per request.

    Args:
        hosts: names of this server besides its addresses and `localhost`. A request for any other name may come from
            a page whose own name was made to point here (DNS rebinding).
        origins: other sites whose pages may send requests.
        api_key: required everywhere except for the page and /health; "" for no key.
    """

    def __init__(
        self,
        app: ASGIApp,
        metrics: Metrics,
        hosts: Collection[str] = (),
        origins: Collection[str] = (),
        api_key: str = "",
    ) -> None:
        self._app, self._metrics = app, metrics
        self._hosts = {"localhost", platform.node().lower(), *(host.lower() for host in hosts)}
        self._origins = set(origins)
        self._key = hashlib.sha256(api_key.encode(errors="surrogateescape")).digest() if api_key else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        started, status, method = time.monotonic(), 0, scope["method"]

        async def guarded_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers.setdefault("Cache-Control", "no-store")
            try:
                async with asyncio.timeout(WRITE_SECONDS):
                    await send(message)
            except TimeoutError:  # the client does not read; the application will find that it has disconnected
                scope["state"]["connection"].abort()

        if method == "HEAD":  # FastAPI's routes answer GET only; uvicorn leaves out the body of this answer
            scope = {**scope, "method": "GET"}
        try:
            try:
                self._check(scope)
                receive = await _whole_body(scope, receive)
            except APIError as error:
                await error.response()(scope, receive, guarded_send)
            else:
                await self._app(scope, receive, guarded_send)
        except ConnectionError:
            status = status or CLIENT_CLOSED
        except asyncio.CancelledError:
            log.info("The grace period is over: an unfinished answer was cut off")
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, str(status)).inc()
            seconds, usage = time.monotonic() - started, scope["state"].get("usage", "")
            log.info("%s %s %s %.3f s%s", shown(method), shown(scope["path"]), status, seconds, usage)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_ours(host):
            message = f"This server does not know the host name {shown(host)!r}: add it with --allow-host."
            raise APIError(421, message, code="unknown_host")
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and origin not in (f"http://{host}", f"https://{host}"):
            message = f"Pages of {shown(origin)} may not use this server: allow them with --allow-origin."
            raise APIError(403, message, code="unknown_origin")
        if self._key and scope["path"] not in OPEN and not scope["path"].startswith(page.PATH):
            scheme, _, key = headers.get("authorization", "").partition(" ")
            digest = hashlib.sha256(key.strip().encode("latin-1")).digest()
            if scheme.lower() != "bearer" or not hmac.compare_digest(digest, self._key):
                message = "Send the server's key in the header Authorization: Bearer KEY."
                raise APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def _is_ours(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        try:
            ipaddress.ip_address(name)
            return True
        except ValueError:
            return name in self._hosts


async def _whole_body(scope: Scope, receive: Receive) -> Receive:
    """Read the body, and return a `receive` that gives it in one message.

    Raises:
        APIError: the body is too large, or arrives too slowly.
        ConnectionError: the client disconnected.
    """
    close = {"Connection": "close"}  # the rest of the body is not read, so no other request can follow it
    too_large = APIError(
        413, f"The body is larger than {MAX_BODY:,} bytes: shorten it.", code="too_large", headers=close
    )
    length = Headers(scope=scope).get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > MAX_BODY:
        raise too_large
    chunks, size, more = [], 0, True
    try:
        async with asyncio.timeout(READ_SECONDS):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ConnectionError
                chunks.append(message.get("body", b""))
                size, more = size + len(chunks[-1]), message.get("more_body", False)
                if size > MAX_BODY:
                    raise too_large
    except TimeoutError:
        slow = f"The body took longer than {READ_SECONDS:.0f} seconds: send it faster."
        raise APIError(408, slow, code="timeout", headers=close) from None
    whole: list[Message] = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]

    async def receive_whole() -> Message:
        return whole.pop() if whole else await receive()

    return receive_whole
