"""Sends answers to clients, whole or as a stream of events."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from mlx_gpt.serving.answers import Answer
from mlx_gpt.serving.errors import APIError
from mlx_gpt.serving.metrics import Metrics
from mlx_gpt.serving.worker import EngineError, Job, Worker

FAILED = "The model failed while answering; the server's log has the details."


class Generation:
    """The generation of one answer. It frees its slots when it is closed, whether or not it has finished."""

    def __init__(self, worker: Worker, metrics: Metrics, request: Request, job: Job, answer: Answer) -> None:
        self._worker, self._metrics, self._request, self._job, self._answer = worker, metrics, request, job, answer
        self._first_token: float | None = None

    async def whole(self) -> BaseModel:
        """Return the whole answer.

        Raises:
            APIError: the model failed.
            ConnectionError: the client disconnected.
        """
        with contextlib.closing(self):
            try:
                await unless_disconnected(self._request.receive, self._finish())
            except EngineError:
                raise APIError(500, FAILED, code="engine_failed") from None
        return self._answer.whole()

    async def chunks(self) -> AsyncIterator[BaseModel]:
        """Yield the chunks of the answer while it is generated.

        Raises:
            EngineError: the model failed.
        """
        for chunk in self._answer.opening():
            yield chunk
        async for number, piece in self._job.pieces():
            self._first_token = self._first_token or time.monotonic()
            if added := self._answer.add(number, piece):
                yield added
        for chunk in self._answer.closing():
            yield chunk

    def close(self) -> None:
        """Free the slots, and record how the generation went."""
        self._worker.finish(self._job)
        tokens, end = self._answer.completion_tokens, time.monotonic()
        usage = f" {self._answer.prompt_tokens} + {tokens} tokens"
        self._request.state.usage = f"{usage}, cut off" if self._job.unfinished else usage
        if self._first_token is not None:
            self._metrics.first_token.observe(self._first_token - self._job.started)
            self._metrics.latency.observe(end - self._job.started)
            if tokens > 1 and end > self._first_token:
                self._metrics.speed.observe((tokens - 1) / (end - self._first_token))

    async def _finish(self) -> None:
        async for _ in self.chunks():
            pass


class EventStream(Response):
    """Sends an answer while it is generated, as server-sent events (https://html.spec.whatwg.org/#server-sent-events)."""

    media_type = "text/event-stream"

    def __init__(self, generation: Generation) -> None:
        self._generation = generation
        super().__init__(headers={"X-Accel-Buffering": "no"})  # which keeps nginx from collecting the events
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events until the answer ends or the client disconnects."""
        with contextlib.closing(self._generation), contextlib.suppress(ConnectionError):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_disconnected(receive, self._send_events(send))

    async def _send_events(self, send: Send) -> None:
        async def event(data: str) -> None:
            await send({"type": "http.response.body", "body": f"data: {data}\n\n".encode(), "more_body": True})

        try:
            async for chunk in self._generation.chunks():
                await event(chunk.model_dump_json(exclude_unset=True))
            await event("[DONE]")
        except EngineError:
            await event(APIError(500, FAILED, code="engine_failed").json())
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def unless_disconnected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do `work`, but cancel it when the client disconnects.

    Raises:
        ConnectionError: the client disconnected.
    """

    async def disconnect() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, disconnected = asyncio.ensure_future(work), asyncio.ensure_future(disconnect())
    try:
        await asyncio.wait([working, disconnected], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ConnectionError
        working.result()
    finally:
        working.cancel()
        disconnected.cancel()
