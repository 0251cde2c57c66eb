"""The OpenAPI document: FastAPI's, with what it cannot know: events, errors in OpenAI's envelope, API keys."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from paceline.api.answers import Answer, ChatCompletionChunk, Completion
from paceline.api.answers_responses import ResponseEvent

DESCRIPTION = """OpenAI's API for text, with sessions beside it.

With `stream: true` an answer is a stream of Server-Sent Events. Every error is an `Error`; its `param` names the field.
"""

TAGS = {
    "OpenAI": "What OpenAI's clients call.",
    "Sessions": "Conversations that are stored here, so that no client resends what was said.",
    "Tokens": "Text to tokens and back.",
    "Operation": "Health, status and metrics.",
}

DONE = "[DONE]"

_PREFIXES = {"/v1/sessions": "Sessions", "/v1/replicas": "Operation", "/v1/nodes": "Operation", "/v1/": "OpenAI"}
_TOKENS = ("/tokenize", "/detokenize")

_EVENTS: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatCompletionChunk,
    "/v1/sessions/{session_id}/turns": ChatCompletionChunk,
    "/v1/completions": Completion,
    "/v1/responses": ResponseEvent,
}
"""What is in an event of a stream, by path."""

_STATUSES = {
    "400": "The request is wrong; `param` names the field.",
    "404": "No such model, session, response or node.",
    "409": "The session exists already, or has a turn under way; the node cannot be drained.",
    "413": "The body is too large.",
    "429": "Too much is waiting already; `Retry-After` says when to come back.",
    "500": "Something failed here.",
    "503": "No replica can take the request.",
    "504": "It took longer than it may.",
}


class ErrorBody(Answer):
    message: str
    type: str
    param: str | None
    code: str


class Error(Answer):
    """OpenAI's envelope."""

    error: ErrorBody


_SENT: tuple[type[BaseModel], ...] = (Error, *dict.fromkeys(_EVENTS.values()))


def describe(app: FastAPI) -> None:
    """Have the application describe itself by this document. It is made once, when it is asked for."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = _document(app)
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _document(app: FastAPI) -> dict[str, Any]:
    found = get_openapi(title=app.title, version=app.version, description=DESCRIPTION, routes=app.routes)
    found["tags"] = [{"name": name, "description": text} for name, text in TAGS.items()]
    schemas = found["components"]["schemas"]
    for unused in ("HTTPValidationError", "ValidationError"):
        schemas.pop(unused, None)
    _, more = models_json_schema(
        [(model, "serialization") for model in _SENT], ref_template="#/components/schemas/{model}"
    )
    for name, schema in more["$defs"].items():
        schemas.setdefault(name, schema)
    found["components"]["schemas"] = dict(sorted(schemas.items()))
    for path, methods in found["paths"].items():
        for operation in methods.values():
            _complete(path, operation)
    return found


def _complete(path: str, operation: dict[str, Any]) -> None:
    """The tag, the errors, and the events of a stream."""
    named = next((tag for prefix, tag in _PREFIXES.items() if path.startswith(prefix)), "Operation")
    operation["tags"] = ["Tokens" if path in _TOKENS else named]
    answers = operation["responses"]
    answers.pop("422", None)
    takes_input = "requestBody" in operation or "parameters" in operation
    for status, text in _STATUSES.items():
        if takes_input or int(status) >= 500:
            schema = {"schema": {"$ref": "#/components/schemas/Error"}}
            answers[status] = {"description": text, "content": {"application/json": schema}}
    answers["200"]["description"] = "The answer."
    if path in _EVENTS and "requestBody" in operation:
        answers["200"]["content"]["text/event-stream"] = {"schema": _event_schema(_EVENTS[path])}


def _event_schema(data: type[BaseModel]) -> dict[str, Any]:
    """Of one Server-Sent Event: JSON of this kind or an error, or the mark of the end, which is no JSON."""
    options = [{"$ref": f"#/components/schemas/{name}"} for name in (data.__name__, Error.__name__)]
    told = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": options}}
    properties = {"event": {"type": "string"}, "data": {"anyOf": [{"const": DONE}, told]}}
    return {"type": "object", "required": ["data"], "properties": properties}
