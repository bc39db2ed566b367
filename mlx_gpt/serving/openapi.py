"""The API's description for programs (https://spec.openapis.org/oas/v3.1.0)."""

import importlib.metadata
from collections.abc import Iterable
from typing import Any

from pydantic.json_schema import models_json_schema

from mlx_gpt.serving.api import ChatRequest, CompletionRequest
from mlx_gpt.serving.worker import Served

REF = "#/components/schemas/{model}"
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
REFUSALS = {
    400: "The request can't be done; the message says why.",
    401: "The key is missing or wrong.",
    403: "The page that asks may not.",
    404: "There is no such model.",
    408: "The body took too long.",
    413: "The body is too large.",
    415: "The body is not sent as JSON.",
    421: "The server is not called that.",
    429: "The queue is full: try again after `Retry-After` seconds.",
}


def document(models: Iterable[Served]) -> dict[str, Any]:
    """The document of a server with these models."""
    _, schemas = models_json_schema([(CompletionRequest, "validation"), (ChatRequest, "validation")], ref_template=REF)
    models = list(models)
    chatty = [one.name for one in models if one.template]
    for kind, names in (("CompletionRequest", [one.name for one in models]), ("ChatRequest", chatty)):
        schemas["$defs"][kind]["properties"]["model"] |= {"enum": [*names, None]}
    name = [{"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}]
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlx-gpt", "version": importlib.metadata.version("mlx-gpt")},
        "paths": {
            "/health": {"get": _operation("Whether the server answers")},
            "/metrics": {"get": _operation("Prometheus' view", media="text/plain")},
            "/v1/models": {"get": _operation("The models that can be asked")},
            "/v1/models/{model}": {"get": _operation("One of them") | {"parameters": name}},
            "/v1/models/{model}/curves": {"get": _operation("The losses of its run") | {"parameters": name}},
            "/v1/completions": {"post": _operation("Go on from a text", "CompletionRequest")},
            "/v1/chat/completions": {"post": _operation("Answer in a conversation", "ChatRequest")},
        },
        "components": {
            "schemas": schemas.get("$defs", {}) | {"Error": ERROR},
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"key": []}],
    }


def _operation(summary: str, body: str = "", media: str = "application/json") -> dict[str, Any]:
    error = {"application/json": {"schema": {"$ref": REF.format(model="Error")}}}
    answers: dict[str, Any] = {
        str(status): {"description": meaning, "content": error} for status, meaning in REFUSALS.items()
    }
    kinds: dict[str, Any] = {media: {}} | ({"text/event-stream": {}} if body else {})
    answers["200"] = {"description": "The answer.", "content": kinds}
    operation: dict[str, Any] = {"summary": summary, "responses": answers}
    if body:
        content = {"application/json": {"schema": {"$ref": REF.format(model=body)}}}
        operation["requestBody"] = {"required": True, "content": content}
    return operation
