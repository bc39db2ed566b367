"""Refusals and failures, always in the shape of OpenAI's API.

https://platform.openai.com/docs/guides/error-codes
"""

import itertools
import logging
import re
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from fastapi.requests import Request
from fastapi.responses import Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from mlx_gpt.errors import shown

CLIENT_CLOSED = 499  # nginx's status for a client that disconnected before its answer
TOO_MANY_ERRORS = "too_many_errors"  # the type of the error that requests.py puts in place of a long list
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}

log = logging.getLogger("mlx_gpt")


class ErrorDetails(BaseModel):
    """Why a request has no answer."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """The body of every refusal and every failure."""

    error: ErrorDetails


REFUSALS: dict[int | str, str] = {
    400: "The request cannot be carried out; the message says why.",
    401: "The API key is missing or wrong.",
    403: "Pages of this site may not use the server.",
    404: "There is no such model.",
    408: "The body arrived too slowly.",
    413: "The body is too large.",
    415: "The body is not sent as application/json.",
    421: "The request names another host.",
    429: "The queue is full; try again after `Retry-After` seconds.",
    "default": "Any other refusal or failure.",
}
RESPONSES: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": description} for status, description in REFUSALS.items()
}


class APIError(HTTPException):
    """A refusal or failure.

    Args:
        message: one sentence that says what to do.
        param: the parameter that is wrong.
        code: a word that programs can compare.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def json(self) -> str:
        """Return the body of the response."""
        kind = KINDS.get(self.status_code, "server_error" if self.status_code >= 500 else "invalid_request_error")
        details = ErrorDetails(message=self.detail, type=kind, param=self.param, code=self.code)
        return ErrorResponse(error=details).model_dump_json()

    def response(self) -> Response:
        """Return the response that reports it."""
        return Response(self.json(), self.status_code, self.headers, "application/json")


def refusal(errors: Sequence[dict[str, Any]]) -> APIError:
    """Return one sentence for the errors that pydantic found in a body."""
    first = errors[0]
    location = first["loc"][1:]  # without "body"
    if first["type"] == TOO_MANY_ERRORS:
        return APIError(400, "The body has errors in many places: /openapi.json lists the fields and their types.")
    if not location:
        return APIError(400, "The body must be a JSON object.")
    name = shown(location[0])
    if len(location) == 1 and first["type"] in ("none_required", "extra_forbidden", "literal_error"):
        return APIError(400, f"`{name}` is not supported by this server: leave it out.", name)
    # A field that may have several types has an error for each. An error about a value means that the type was right.
    errors = [error for error in errors if error["loc"][1] == location[0]]
    meant = [error for error in errors if not error["type"].endswith("_type")] or errors
    place = _place(meant[0])
    meant = [error for error in meant if _place(error) == place]
    if len(meant) > 1:
        return APIError(400, f"`{place}` has the wrong type: /openapi.json lists the types that it may have.", name)
    if meant[0]["type"] == "missing":
        return APIError(400, f"`{place}` is missing.", name)
    return APIError(400, f"`{place}`: {shown(meant[0]['msg'], 200)}.", name)


def _place(error: dict[str, Any]) -> str:
    """Return where in the body an error is, such as `messages.0.role`, without the names of types at the end."""
    is_key = re.compile(r"(?!str$)\w+").fullmatch
    return shown(".".join(itertools.takewhile(is_key, map(str, error["loc"][1:]))))


async def _http(request: Request, error: HTTPException) -> Response:
    if not isinstance(error, APIError):
        headers = dict(error.headers or {})
        message = {
            404: "There is nothing at this path: the API is under /v1, and /openapi.json describes it.",
            405: f"This path needs {headers.get('Allow', 'another method')}.",
        }.get(error.status_code, error.detail)
        error = APIError(error.status_code, message, headers=headers)
    return error.response()


async def _invalid(request: Request, error: RequestValidationError) -> Response:
    return refusal(error.errors()).response()


async def _disconnected(request: Request, error: Exception) -> Response:
    return Response(status_code=CLIENT_CLOSED)  # only the log and the metrics see it


async def _unexpected(request: Request, error: Exception) -> Response:
    log.error("Unexpected error", exc_info=error)
    return APIError(500, "An unexpected error occurred; the server's log has the details.").response()


HANDLERS: dict[int | type[Exception], Callable[[Request, Any], Coroutine[Any, Any, Response]]] = {
    HTTPException: _http,
    RequestValidationError: _invalid,
    ConnectionError: _disconnected,
    Exception: _unexpected,
}
