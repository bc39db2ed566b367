"""The paths of the server."""

import asyncio
import contextlib
import itertools
import json
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_gpt.config import ServeConfig
from mlx_gpt.serving import api, curves, openapi, page
from mlx_gpt.serving.access import Guard
from mlx_gpt.serving.api import Answer, APIError, Asked
from mlx_gpt.serving.metrics import Metrics
from mlx_gpt.serving.worker import BusyError, EngineError, Job, Served, Worker

DEAD = "The thread that computes has ended; the log says why: start the server again."
FAILED = "The model failed at this request; the log says why."

log = logging.getLogger("mlx_gpt")


class Paths:
    """What the server answers."""

    def __init__(self, worker: Worker, metrics: Metrics, config: ServeConfig) -> None:
        self._worker, self._metrics = worker, metrics
        self._most_tokens, self._log_prompts = config.max_tokens, config.log_prompts
        self._started = int(time.time())

    def routes(self) -> list[Route]:
        """The paths, and what answers them."""
        return [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.metrics),
            Route("/openapi.json", self.openapi),
            Route("/v1/models", self.models),
            Route("/v1/models/{model}", self.model),
            Route("/v1/models/{model}/curves", self.curves),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]

    async def page(self, request: Request) -> Response:
        """The page for people."""
        return HTMLResponse(
            page.HTML, headers={"Content-Security-Policy": page.POLICY, "Referrer-Policy": "no-referrer"}
        )

    async def health(self, request: Request) -> Response:
        """Whether the server can answer."""
        if not self._worker.alive:
            raise APIError(503, DEAD, code="engine_ended")
        return JSONResponse({"status": "ok"})

    async def metrics(self, request: Request) -> Response:
        """Prometheus' view."""
        return Response(self._metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def openapi(self, request: Request) -> Response:
        """The API's description."""
        return JSONResponse(openapi.document(self._worker.models.values()))

    async def models(self, request: Request) -> Response:
        """The models that can be asked."""
        return JSONResponse({"object": "list", "data": [self._described(one) for one in self._worker.models.values()]})

    async def model(self, request: Request) -> Response:
        """One of them."""
        return JSONResponse(self._described(self._find(request.path_params["model"])))

    async def curves(self, request: Request) -> Response:
        """The losses of the run that made a model."""
        served = self._find(request.path_params["model"])
        return JSONResponse(await asyncio.to_thread(curves.of, served.folder))

    async def completions(self, request: Request) -> Response:
        """Go on from a text."""
        body = await _parsed(request, api.CompletionRequest)
        served = self._find(body.model)
        return await self._answer(request, await self._understood(api.completion, body, served))

    async def chat(self, request: Request) -> Response:
        """Answer in a conversation."""
        body = await _parsed(request, api.ChatRequest)
        served = self._find(body.model)
        return await self._answer(request, await self._understood(api.chat, body, served))

    async def _understood(self, reader: Callable[..., Asked], body: api.Sampling, served: Served) -> Asked:
        """What a body asks for; in a thread, since a long text takes a while to encode."""
        return await asyncio.to_thread(reader, body, served, self._worker.max_batch, self._most_tokens)

    def _find(self, name: str | None) -> Served:
        models = self._worker.models
        if name is None:
            return next(iter(models.values()))
        if name not in models:
            known = ", ".join(models)
            raise APIError(404, f"There is no model of that name here, only {known}.", "model", "model_not_found")
        return models[name]

    def _described(self, served: Served) -> dict[str, Any]:
        return {
            "id": served.name,
            "object": "model",
            "created": self._started,
            "owned_by": "mlx-gpt",
            "context": served.n_positions,
            "parameters": served.n_params,
            "chat": served.template is not None,
            "special_tokens": served.tokenizer.special_names(),
        }

    async def _answer(self, request: Request, asked: Asked) -> Response:
        if self._log_prompts:
            log.info("prompts: %r", [asked.served.tokenizer.decode(one.prompt) for one in asked.requests])
        try:
            job = self._worker.submit(asked.served, asked.requests)
        except BusyError as error:
            busy = APIError(429, str(error), code="queue_full")
            busy.headers["Retry-After"] = str(error.retry_after)
            raise busy from None
        except EngineError:
            raise APIError(503, DEAD, code="engine_ended") from None
        answer = Answer(asked)
        self._metrics.prompts.inc(answer.prompt_tokens)
        watched = _Watched(self, request, job, answer)
        if asked.stream:
            return _EventStream(watched)
        with contextlib.closing(watched):
            try:
                await _unless_gone(request.receive, watched.all_of_it())
            except EngineError:
                raise APIError(500, FAILED, code="engine_failed") from None
        return JSONResponse(answer.whole())

    def done(self, request: Request, job: Job, answer: Answer, first: float | None, end: float) -> None:
        """A job has ended, or its client has gone: free its places, and note how it went."""
        self._worker.finish(job)
        tokens = answer.completion_tokens
        request.scope["told"] = f" {answer.prompt_tokens} + {tokens} tokens{'' if not job.left else ', cut off'}"
        if first is not None:
            self._metrics.first_token.observe(first - job.began)
            self._metrics.latency.observe(end - job.began)
            if tokens > 1 and end > first:
                self._metrics.speed.observe((tokens - 1) / (end - first))


class _Watched:
    """A job and its answer: notes when the first token comes, and ends the job when it is closed."""

    def __init__(self, paths: Paths, request: Request, job: Job, answer: Answer) -> None:
        self._paths, self._request, self._job, self._answer = paths, request, job, answer
        self._first: float | None = None

    async def chunks(self) -> AsyncIterator[dict[str, Any]]:
        """The chunks of the answer as they are made.

        Raises:
            EngineError: the model failed.
        """
        for chunk in self._answer.first():
            yield chunk
        async for number, piece in self._job.pieces():
            self._first = self._first or time.monotonic()
            for chunk in self._answer.add(number, piece):
                yield chunk
        for chunk in self._answer.last():
            yield chunk

    async def all_of_it(self) -> None:
        """Wait for all of them. Errors as above."""
        async for _ in self.chunks():
            pass

    def close(self) -> None:
        """The job is over."""
        self._paths.done(self._request, self._job, self._answer, self._first, time.monotonic())


class _EventStream(Response):
    """Sends an answer as it is made, as server-sent events (https://html.spec.whatwg.org/#server-sent-events)."""

    media_type = "text/event-stream"

    def __init__(self, watched: _Watched) -> None:
        self._watched = watched
        super().__init__(headers={"X-Accel-Buffering": "no"})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it, unless the client goes."""
        with contextlib.closing(self._watched), contextlib.suppress(ConnectionError):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await _unless_gone(receive, self._send_all(send))

    async def _send_all(self, send: Send) -> None:
        try:
            async for chunk in self._watched.chunks():
                await self._send(send, json.dumps(chunk, separators=(",", ":")))
            await self._send(send, "[DONE]")
        except EngineError:
            await self._send(send, json.dumps(APIError(500, FAILED, code="engine_failed").body()))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send(self, send: Send, event: str) -> None:
        await send({"type": "http.response.body", "body": f"data: {event}\n\n".encode(), "more_body": True})


async def _unless_gone(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do some work, but only as long as the client is there.

    Raises:
        ConnectionError: it has gone.
    """

    async def hang_up() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    working, gone = asyncio.ensure_future(work), asyncio.ensure_future(hang_up())
    try:
        await asyncio.wait([working, gone], return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ConnectionError
        working.result()
    finally:
        working.cancel()
        gone.cancel()


def make(worker: Worker, metrics: Metrics, config: ServeConfig) -> ASGIApp:
    """The application, guarded."""
    metrics.places.set(worker.max_batch * max(1, len(worker.models)))

    handlers: dict[Any, Callable[[Request, Exception], Response]] = {
        ConnectionError: _gone,
        APIError: _refused,
        HTTPException: _not_there,
        Exception: _unforeseen,
    }
    app: ASGIApp = Starlette(routes=Paths(worker, metrics, config).routes(), exception_handlers=handlers)
    origins = config.allow_origin
    app = Guard(app, metrics, [config.host, *config.allow_host], origins, config.api_key)
    # Outside, so that the pages of these sites can read a refusal, too.
    return CORSMiddleware(app, origins, allow_methods=["GET", "POST"], allow_headers=["*"]) if origins else app


async def _parsed(request: Request, kind: type[api.Sampling]) -> Any:
    """The body. A page of another site could send any other content type without asking beforehand."""
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != "application/json":
        raise APIError(415, "Send the body as Content-Type: application/json.", code="content_type")
    return api.parse(kind, await request.body())


def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return JSONResponse(error.body(), error.status, error.headers)


def _gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)  # nobody reads it but the log


def _not_there(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = {
        404: "There is nothing here: the API is under /v1, and described in /openapi.json.",
        405: f"This path wants {(error.headers or {}).get('Allow', 'another method')}.",
    }.get(error.status_code, error.detail)
    return JSONResponse(APIError(error.status_code, message).body(), error.status_code, error.headers)


def _unforeseen(request: Request, error: Exception) -> Response:
    log.error("Something unforeseen went wrong", exc_info=error)
    return JSONResponse(APIError(500, "Something unforeseen went wrong; the log says what.").body(), 500)


def names_of(folders: Sequence[Path]) -> list[str]:
    """Under which name each model is served: that of its run, with a number where that is taken."""
    names: list[str] = []
    for folder in folders:
        place = folder.resolve()
        name = place.parent.name if place.name in ("best", "final") else place.name
        free = (f"{name}-{i}" if i > 1 else name for i in itertools.count(1))
        names.append(next(one for one in free if one not in names))
    return names
