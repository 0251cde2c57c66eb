"""Errors as a client sees them: OpenAI's envelope, its HTTP status, and nothing of the inside.

{"error": {"message": …, "type": …, "param": …, "code": …}}
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from paceline.api.prompts import shown
from paceline.errors import EngineError, InvalidRequest, PacelineError, Unauthorized

logger = logging.getLogger(__name__)

MAX_SHOWN_ERRORS = 5
MAX_FIELD_CHARS = 100

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error", 504: "timeout_error"}
_HTTP_CODES = {
    404: "not_found",
    405: "method_not_allowed",
    408: "body_timeout",
    413: "request_too_large",
    414: "url_too_long",
    431: "headers_too_large",
}


class JSONBytes(Response):
    """A JSON body that is serialized already."""

    media_type = "application/json"


def public_error(error: Exception) -> PacelineError:
    """The error itself if it was raised on purpose; otherwise one that says nothing, and a traceback in the log."""
    if isinstance(error, PacelineError):
        return error
    logger.error("unexpected error", exc_info=error)
    return EngineError("internal error")


def envelope(message: str, status: int, *, code: str, param: str | None = None) -> bytes:
    """OpenAI's error object as JSON. ASCII, because the text may quote half a surrogate pair."""
    kind = _TYPES.get(status) or ("server_error" if status >= 500 else "invalid_request_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


def envelope_of(error: PacelineError) -> bytes:
    return envelope(error.message, error.http_status, code=error.code, param=error.param)


def error_response(error: PacelineError) -> Response:
    headers = {} if error.retry_after is None else {"retry-after": str(max(1, math.ceil(error.retry_after)))}
    if isinstance(error, Unauthorized):
        headers["www-authenticate"] = "Bearer"
    return JSONBytes(envelope_of(error), status_code=error.http_status, headers=headers)


def http_error_response(error: HTTPException) -> Response:
    """A status of HTTP's own (404, 405, 413) in the envelope."""
    code = _HTTP_CODES.get(error.status_code, "invalid_request_error")
    body = envelope(error.detail, error.status_code, code=code)
    return JSONBytes(body, status_code=error.status_code, headers=error.headers)


def invalid_request(errors: Sequence[Mapping[str, Any]]) -> InvalidRequest:
    """pydantic's findings as one error. `param` is the first field, dotted: `messages.0.role`."""
    parts = []
    fields = []
    for found in errors:
        field = _field(found)
        fields.append(field)
        parts.append(f"{field or 'body'}: {_reason(found)}")
    if len(parts) > MAX_SHOWN_ERRORS:
        parts[MAX_SHOWN_ERRORS:] = [f"and {len(parts) - MAX_SHOWN_ERRORS} more"]
    return InvalidRequest("; ".join(parts), param=fields[0] if fields else None)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of the application in OpenAI's envelope."""

    async def paceline_error(_: Request, error: PacelineError) -> Response:
        return error_response(error)

    async def validation_error(_: Request, error: RequestValidationError) -> Response:
        return error_response(invalid_request(error.errors()))

    async def http_error(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404:
            error = HTTPException(404, f"no such route: {request.method} {shown(request.url.path)}")
        return http_error_response(error)

    # Starlette types a handler as one of any Exception.
    app.add_exception_handler(PacelineError, paceline_error)  # type: ignore[arg-type]
    app.add_exception_handler(RequestValidationError, validation_error)  # type: ignore[arg-type]
    app.add_exception_handler(HTTPException, http_error)  # type: ignore[arg-type]


def _field(found: Mapping[str, Any]) -> str | None:
    where = found["loc"][1:]  # without "body"
    if found["type"] == "json_invalid" or not where:
        return None
    name = ".".join(str(part) for part in where)
    return name if len(name) <= MAX_FIELD_CHARS else name[:MAX_FIELD_CHARS] + "…"


def _reason(found: Mapping[str, Any]) -> str:
    match found["type"]:
        case "json_invalid":
            return f"not valid JSON at character {found['loc'][-1]}: {found['ctx']['error']}"
        case "model_attributes_type":
            return "must be a JSON object, sent with content-type application/json"
        case "extra_forbidden":
            return "unknown field"
        case "missing":
            return "required"
        case _:
            return str(found["msg"])
