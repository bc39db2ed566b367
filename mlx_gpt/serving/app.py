"""The application: its paths, and the functions that answer them."""

import asyncio
import importlib.metadata
import logging
import time
from collections.abc import Callable, Coroutine
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI
from fastapi.middleware.cors import CORSMiddleware
from fastapi.requests import Request
from fastapi.responses import HTMLResponse, PlainTextResponse, Response
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from pydantic_core import from_json
from starlette.types import ASGIApp

from mlx_gpt.config import ServeConfig
from mlx_gpt.errors import shown
from mlx_gpt.serving import page
from mlx_gpt.serving.access import Guard
from mlx_gpt.serving.answers import Answer, ChatAnswer, CompletionAnswer
from mlx_gpt.serving.bodies import ChatRequest, CompletionRequest
from mlx_gpt.serving.curves import Curves, load_curves
from mlx_gpt.serving.errors import HANDLERS, RESPONSES, APIError
from mlx_gpt.serving.metrics import Metrics
from mlx_gpt.serving.models import ServedModel
from mlx_gpt.serving.parsing import ParsedRequest, parse_chat, parse_completion
from mlx_gpt.serving.responses import ChatCompletion, Completion
from mlx_gpt.serving.streaming import EventStream, Generation
from mlx_gpt.serving.worker import BusyError, EngineError, Worker

ENGINE_ENDED = "The engine has stopped; the server's log says why: restart the server."
STREAM: dict[str, Any] = {"content": {"text/event-stream": {}}}  # the other form of an answer

log = logging.getLogger("mlx_gpt")


class Health(BaseModel):
    """The server can answer."""

    status: Literal["ok"] = "ok"


class ModelCard(BaseModel):
    """A model as OpenAI's API describes it, with the facts that the page shows."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "mlx-gpt"
    context: int
    max_tokens: int
    parameters: int
    chat: bool
    special_tokens: list[str]


class ModelList(BaseModel):
    """The models of the server."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Service:
    """The state and the functions that the paths share."""

    def __init__(self, worker: Worker, metrics: Metrics, config: ServeConfig) -> None:
        self.worker, self.metrics, self._config = worker, metrics, config
        self.models, self._started = worker.models, int(time.time())

    def find(self, name: str | None) -> ServedModel:
        """Return the model with this name; None means the first one.

        Raises:
            APIError: there is no model of that name; status 404.
        """
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            message = f"There is no model of that name: this server has {', '.join(self.models)}."
            raise APIError(404, message, "model", "model_not_found")
        return self.models[name]

    def card(self, model: ServedModel) -> ModelCard:
        """Return the description of a model."""
        return ModelCard(
            id=model.name,
            created=self._started,
            context=model.context,
            max_tokens=self._config.max_tokens,
            parameters=model.n_params,
            chat=model.template is not None,
            special_tokens=model.tokenizer.special_names(),
        )

    async def answer(
        self,
        request: Request,
        body: CompletionRequest | ChatRequest,
        parse: Callable[..., ParsedRequest],
        kind: Callable[[ParsedRequest], Answer],
    ) -> Any:
        """Generate the texts that a body asks for.

        Raises:
            APIError: the body cannot be carried out, the queue is full, or the engine failed.
            ConnectionError: the client disconnected.
        """
        model = self.find(body.model)
        # In a thread, since encoding a long text takes a while.
        parsed = await asyncio.to_thread(parse, body, model, self._config.max_batch, self._config.max_tokens)
        if self._config.log_prompts:
            log.info("prompts: %r", [model.tokenizer.decode(asked.prompt) for asked in parsed.requests])
        try:
            job = self.worker.submit(model, parsed.requests)
        except BusyError as error:
            retry = {"Retry-After": str(error.retry_after)}
            raise APIError(429, str(error), code="queue_full", headers=retry) from None
        except EngineError:
            raise APIError(503, ENGINE_ENDED, code="engine_ended") from None
        answer = kind(parsed)
        self.metrics.prompts.inc(answer.prompt_tokens)
        generation = Generation(self.worker, self.metrics, request, job, answer)
        return EventStream(generation) if parsed.stream else await generation.whole()


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


Shared = Annotated[Service, Depends(_service)]


class JSONRequest(Request):
    """A request whose body is JSON by the standard: Python's own parser also accepts NaN and halves of characters."""

    async def json(self) -> Any:
        """Return the parsed body."""
        try:
            return from_json(await self.body(), allow_inf_nan=False)
        except ValueError as error:
            message = f"The body is not valid JSON: {shown(error, 200)}."
            raise APIError(400, message, code="invalid_json") from None


class JSONRoute(APIRoute):
    """A route that takes JSON sent as application/json, and nothing else.

    A browser asks for permission before it sends this type to another site, but would send a form or plain text at
    once.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Return the function that answers a request."""
        handler = super().get_route_handler()

        async def json_handler(request: Request) -> Response:
            content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
            if content_type != "application/json":
                raise APIError(415, "Send the body as Content-Type: application/json.", code="content_type")
            return await handler(JSONRequest(request.scope, request.receive))

        return json_handler


open_to_all, get, post = APIRouter(), APIRouter(), APIRouter(route_class=JSONRoute)


@open_to_all.get("/", include_in_schema=False)
async def show_page() -> HTMLResponse:
    """The page for people."""
    headers = {"Content-Security-Policy": page.POLICY, "Referrer-Policy": "no-referrer"}
    return HTMLResponse(page.FILES[page.INDEX][0], headers=headers)


@open_to_all.get(page.PATH + "{name}", include_in_schema=False)
async def show_file(name: str) -> Response:
    """A file that the page loads."""
    if name not in page.FILES or name == page.INDEX:  # only `show_page` sends this one, with its policy
        raise APIError(404, "The page has no such file.")
    content, kind = page.FILES[name]
    return Response(content, media_type=kind)


@open_to_all.get("/health")
async def health(service: Shared) -> Health:
    """Whether the server can answer."""
    if not service.worker.alive:
        raise APIError(503, ENGINE_ENDED, code="engine_ended")
    return Health()


@get.get("/metrics", response_class=PlainTextResponse)
async def metrics(service: Shared) -> PlainTextResponse:
    """Metrics for Prometheus."""
    return PlainTextResponse(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


@get.get("/v1/models")
async def list_models(service: Shared) -> ModelList:
    """The models of the server."""
    return ModelList(data=[service.card(model) for model in service.models.values()])


@get.get("/v1/models/{model}")
async def retrieve_model(model: str, service: Shared) -> ModelCard:
    """One of the models."""
    return service.card(service.find(model))


@get.get("/v1/models/{model}/curves")
async def curves(model: str, service: Shared) -> Curves:
    """The losses of the run that trained a model."""
    return await asyncio.to_thread(load_curves, service.find(model).folder)


@post.post("/v1/completions", response_model=Completion, response_model_exclude_unset=True, responses={200: STREAM})
async def complete(body: CompletionRequest, request: Request, service: Shared) -> Any:
    """Continue a text."""
    return await service.answer(request, body, parse_completion, CompletionAnswer)


@post.post(
    "/v1/chat/completions", response_model=ChatCompletion, response_model_exclude_unset=True, responses={200: STREAM}
)
async def chat(body: ChatRequest, request: Request, service: Shared) -> Any:
    """Answer in a conversation."""
    return await service.answer(request, body, parse_chat, ChatAnswer)


class Application(FastAPI):
    """The paths above, and their description at /openapi.json."""

    def __init__(self, service: Service, protected: bool) -> None:
        super().__init__(
            title="mlx-gpt",
            version=importlib.metadata.version("mlx-gpt"),
            docs_url=None,  # these pages would load scripts from another host
            redoc_url=None,
            responses=RESPONSES,
            exception_handlers=HANDLERS,
        )
        self.state.service = service
        # The guard checks the key. This only describes it.
        key = [Depends(HTTPBearer(auto_error=False))] if protected else []
        self.include_router(open_to_all)
        self.include_router(get, dependencies=key)
        self.include_router(post, dependencies=key)

    def openapi(self) -> dict[str, Any]:
        """The description, with the names of the models that each path takes."""
        document = super().openapi()
        models = self.state.service.models.values()
        for body, names in (
            ("CompletionRequest", [model.name for model in models]),
            ("ChatRequest", [model.name for model in models if model.template]),
        ):
            document["components"]["schemas"][body]["properties"]["model"]["enum"] = [*names, None]
        return document


def make_app(worker: Worker, metrics: Metrics, config: ServeConfig) -> ASGIApp:
    """Return the application behind its guard."""
    metrics.slots.set(worker.max_batch * max(1, len(worker.models)))
    origins = config.allow_origin
    app: ASGIApp = Application(Service(worker, metrics, config), protected=bool(config.api_key))
    app = Guard(app, metrics, [config.host, *config.allow_host], origins, config.api_key)
    # This is outside the guard, so that pages of these sites can read its refusals as well.
    return CORSMiddleware(app, origins, allow_methods=["GET", "POST"], allow_headers=["*"]) if origins else app
