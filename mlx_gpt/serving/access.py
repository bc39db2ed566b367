"""What stands before the application: who may ask, how much, and for how long.

Written as ASGI middleware (https://asgi.readthedocs.io/en/latest/specs/www.html), so that a body is refused while it
comes, and a stream is cut while it goes.
"""

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import platform
import time
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mlx_gpt.errors import shown
from mlx_gpt.serving.api import APIError
from mlx_gpt.serving.metrics import Metrics

MOST_BODY = 2**20  # bytes: many times the longest context
READ_SECONDS = 20.0  # for a whole body
WRITE_SECONDS = 20.0  # for any part of an answer
OPEN = ("/", "/health")  # without a key: they tell nothing of a model

log = logging.getLogger("mlx_gpt")


class Guard:
    """Refuses what is not allowed, with a sentence in OpenAI's shape, and writes a line per request.

    Args:
        hosts: names of this server besides its addresses and `localhost`. Any other would be a page that had its name
            point here (DNS rebinding).
        origins: of other sites whose pages may ask.
        api_key: that all but the page and /health want; empty for none.
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
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 0

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["X-Content-Type-Options"] = "nosniff"
                headers.setdefault("Cache-Control", "no-store")
            try:
                async with asyncio.timeout(WRITE_SECONDS):
                    await send(message)
            except TimeoutError:  # one who doesn't read; the application will find that he has gone
                scope["extensions"]["mlx_gpt.connection"]["abort"]()

        try:
            try:
                self._check(scope)
                await self._app(scope, await _body(scope, receive), sending)
            except APIError as error:
                if status:
                    raise
                await refuse(error, sending)
        except ConnectionError:
            status = status or 499  # nginx's number for a client that has gone
        except asyncio.CancelledError:
            log.info("The grace is over: an answer is cut off")
        finally:
            known = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(known, str(status)).inc()
            seconds = time.monotonic() - began
            path = shown(scope["path"])
            log.info("%s %s %s %.3f s%s", shown(scope["method"]), path, status, seconds, scope.get("told", ""))

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_ours(host):
            raise APIError(
                421,
                f"This server is not called {shown(host)!r}: add it with --allow-host if it is.",
                code="unknown_host",
            )
        origin = headers.get("origin")
        if origin is not None and origin not in self._origins and origin not in (f"http://{host}", f"https://{host}"):
            message = f"Pages of {shown(origin)} may not ask this server: if they may, start it with --allow-origin."
            raise APIError(403, message, code="unknown_origin")
        if self._key and scope["path"] not in OPEN:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            given = hashlib.sha256(key.strip().encode("latin-1")).digest()
            if scheme.lower() != "bearer" or not hmac.compare_digest(given, self._key):
                error = APIError(401, "Give the server's key: Authorization: Bearer KEY.", code="invalid_api_key")
                error.headers["WWW-Authenticate"] = "Bearer"
                raise error

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


async def _body(scope: Scope, receive: Receive) -> Receive:
    """`receive` for an application that finds the whole body there.

    Raises:
        APIError: it is too large, or takes too long.
    """
    length = Headers(scope=scope).get("content-length", "0")
    too_large = APIError(413, f"The body is larger than {MOST_BODY:,} bytes: shorten it.", code="too_large")
    too_large.headers["Connection"] = "close"
    if not length.isdecimal() or int(length[:20]) > MOST_BODY:
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
                if size > MOST_BODY:
                    raise too_large
    except TimeoutError:
        slow = APIError(408, f"The body took longer than {READ_SECONDS:.0f} seconds: send it faster.", code="timeout")
        slow.headers["Connection"] = "close"
        raise slow from None
    whole: list[Message] = [{"type": "http.request", "body": b"".join(chunks), "more_body": False}]

    async def receiving() -> Message:
        return whole.pop() if whole else await receive()

    return receiving


async def refuse(error: APIError, send: Send) -> None:
    """Answer with an error."""
    headers = {"content-type": "application/json", **error.headers}
    raw = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    body = json.dumps(error.body()).encode()
    raw.append((b"content-length", str(len(body)).encode()))
    await send({"type": "http.response.start", "status": error.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
