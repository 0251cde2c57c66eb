"""A request's JSON, read so that no body costs the others more than a moment.

What a body is made of is counted before it is parsed, since parsing holds the interpreter; long ones are counted and
parsed in a thread. Refused by name: what is no UTF-8, no JSON by the letter (NaN, Infinity), a name twice in one
object, numbers of thousands of digits, too much nesting, too many objects, fields, values or messages.
"""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from paceline.api.middleware import limits_of
from paceline.api.prompts import check_count
from paceline.config import LimitSettings
from paceline.errors import InvalidRequest

INLINE_BYTES = 64 << 10
"""Longer bodies are parsed in a thread: the event loop also carries everybody's streams."""
_STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?|[\[\]{}:]', re.DOTALL)
"""Whole strings, which are skipped, and what stands outside of them."""
SHOWN_CHARS = 60


class CheckedRequest(Request):
    """Parses its JSON once, by `loads`."""

    async def json(self) -> Any:
        if not hasattr(self, "_json"):
            body, limits = await self.body(), limits_of(self.scope)
            inline = len(body) <= INLINE_BYTES
            self._json = loads(body, limits) if inline else await asyncio.to_thread(loads, body, limits)
        return self._json


class CheckedRoute(APIRoute):
    """The class of every route that takes a body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handler = super().get_route_handler()

        async def checked(request: Request) -> Response:
            request = CheckedRequest(request.scope, request.receive)
            try:
                # Here, and not where FastAPI does it: that makes one error of all of them.
                if self.body_field is not None and _is_json(request) and await request.body():
                    await request.json()
            except ClientDisconnect:
                return Response(status_code=400)  # that nobody reads
            return await handler(request)

        return checked


def loads(body: bytes, limits: LimitSettings) -> Any:
    """The value of a body. Raises InvalidRequest."""
    _check_structure(body, limits)
    try:
        text = body.decode()
    except UnicodeDecodeError as error:
        _refuse(f"not UTF-8 at byte {error.start}")
    try:
        value = json.loads(text, parse_constant=_constant, parse_float=_float, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        _refuse(f"not valid JSON at character {error.pos}: {error.msg}")
    except RecursionError:
        _refuse("too much nesting")
    except ValueError:  # of Python's own bound on digits
        _refuse("an integer has too many digits")
    messages = value.get("messages") if isinstance(value, dict) else None
    if isinstance(messages, list):
        check_count(len(messages), limits.max_messages)
    return value


def _check_structure(body: bytes, limits: LimitSettings) -> None:
    """Raise InvalidRequest if there is too much in it. Most bodies are told by counting bytes, strings and all."""
    if body.count(b",") > limits.max_json_values:
        _refuse(f"more than {limits.max_json_values} values (limits.max_json_values), by its commas")
    opened = body.count(b"{") + body.count(b"[")
    if opened <= limits.max_json_depth and body.count(b":") <= limits.max_json_fields:
        return
    depth = containers = fields = 0
    for found in _STRUCTURE.finditer(body):
        match found[0]:
            case b"{" | b"[":
                depth, containers = depth + 1, containers + 1
            case b"}" | b"]":
                depth -= 1
            case b":":
                fields += 1
            case _:
                continue
        if depth > limits.max_json_depth:
            _refuse(f"more than {limits.max_json_depth} objects and lists in each other (limits.max_json_depth)")
        if containers > limits.max_json_containers:
            _refuse(f"more than {limits.max_json_containers} objects and lists (limits.max_json_containers)")
        if fields > limits.max_json_fields:
            _refuse(f"more than {limits.max_json_fields} fields (limits.max_json_fields)")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Servers disagree on which of two fields of one name counts, so neither does."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                _refuse(f"the field {name[:SHOWN_CHARS]!r} is there twice")
            seen.add(name)
    return found


def _float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        _refuse(f"{text[:SHOWN_CHARS]} is no finite number")
    return value


def _constant(name: str) -> NoReturn:
    _refuse(f"{name} is no number in JSON")


def _refuse(reason: str) -> NoReturn:
    raise InvalidRequest(f"body: {reason}")


def _is_json(request: Request) -> bool:
    """As FastAPI sees it."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
