"""What every HTTP request passes on its way in and out: an id, a last resort for errors, bounds on its size.

Plain ASGI: Starlette's BaseHTTPMiddleware would stand between a disconnecting client and the stream.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from uuid import uuid4

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.api.failures import error_response, http_error_response
from paceline.config import LimitSettings
from paceline.errors import EngineError
from paceline.telemetry.requests import Origin
from paceline.telemetry.tracing import TRACEPARENT, checked

logger = logging.getLogger(__name__)

LIMITS = "paceline.limits"
"""In an ASGI scope: LimitSettings, for whoever answers."""
ARRIVED = "paceline.arrived"
"""In an ASGI scope: when the request came, in nanoseconds since 1970."""
KEEP_WORKING_HEADER = "x-request-disconnect-disabled"
"""By it Ray Serve's proxy would not tell when a client goes away, and its work would go on for nobody."""
REQUEST_ID_HEADER = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=-]{1,128}")


class RequestId:
    """Names every response: the client's `x-request-id` if it is one, a fresh one otherwise."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get(REQUEST_ID_HEADER, "")
        request_id = checked_request_id(given) or f"req-{uuid4().hex}"

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[REQUEST_ID_HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_named)


class LastResort:
    """Turns an exception nobody expected into a 500 that says nothing; the log has the traceback."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = False

        async def watch(message: Message) -> None:
            nonlocal started
            started = started or message["type"] == "http.response.start"
            await send(message)

        try:
            await self._app(scope, receive, watch)
        except Exception:
            if started or scope["type"] != "http":
                raise
            logger.exception("unexpected error in %s %s", scope["method"], scope["path"])
            await error_response(EngineError("internal error"))(scope, receive, send)


class HeadLimit:
    """Refuses what is too much before a body is read: 414 for the URL, 431 for headers. Says what the limits are."""

    def __init__(self, app: ASGIApp, limits: LimitSettings) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[LIMITS], scope[ARRIVED] = self._limits, time.time_ns()
        if (refusal := self._refusal(scope)) is not None:
            await http_error_response(refusal)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _refusal(self, scope: Scope) -> HTTPException | None:
        limits, headers = self._limits, scope["headers"]
        url = len(scope.get("raw_path") or scope["path"].encode()) + len(scope["query_string"])
        if url > limits.max_url_bytes:
            return _closing(414, f"the URL is longer than {limits.max_url_bytes} bytes")
        if len(headers) > limits.max_headers:
            return _closing(431, f"more than {limits.max_headers} headers")
        if Headers(scope=scope).get(KEEP_WORKING_HEADER) == "?1":
            return HTTPException(400, f"{KEEP_WORKING_HEADER}: not taken here: work ends when its client goes away")
        if sum(len(name) + len(value) for name, value in headers) > limits.max_header_bytes:
            return _closing(431, f"the headers are larger than {limits.max_header_bytes} bytes")
        return None


class BodyLimit:
    """Refuses a request body that is too large with 413, announced or not, and one that takes too long with 408."""

    def __init__(self, app: ASGIApp, limits: LimitSettings) -> None:
        self._app = app
        self._limit = limits.max_body_bytes
        self._within_s = limits.body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        received, whole = 0, False
        deadline = asyncio.get_running_loop().time() + self._within_s

        async def receive_counted() -> Message:
            nonlocal received, whole
            if whole:
                return await receive()  # whether the client is still there
            try:
                async with asyncio.timeout_at(deadline):
                    message = await receive()
            except TimeoutError:
                raise _closing(408, f"the request body did not arrive within {self._within_s:g} s") from None
            received += len(message.get("body", b""))
            whole = not message.get("more_body", False)
            if received > self._limit:
                raise self._too_large()
            return message

        # Longer numbers than that are too large, and no Python integers.
        if announced.isdigit() and (len(announced) > 20 or int(announced) > self._limit):
            await http_error_response(self._too_large())(scope, receive, send)
            return
        await self._app(scope, receive_counted, send)

    def _too_large(self) -> HTTPException:
        """FastAPI lets this through while it reads a body, to the handler that writes the envelope."""
        return _closing(413, f"the request body is larger than {self._limit} bytes")


def limits_of(scope: Scope) -> LimitSettings:
    """What HeadLimit found to hold; the defaults where it is not installed."""
    limits: LimitSettings = scope.get(LIMITS) or LimitSettings()
    return limits


def origin_of(scope: Scope) -> Origin:
    """What the client sent along for traces and logs. A traceparent or an id that is none counts as not sent."""
    headers = Headers(scope=scope)
    request_id = checked_request_id(headers.get(REQUEST_ID_HEADER, ""))
    return Origin(checked(headers.get(TRACEPARENT)), request_id, scope.get(ARRIVED))


def checked_request_id(given: str) -> str:
    """A client's id of its request, or "" if it is none that can stand in a header or a log."""
    return given if _REQUEST_ID.fullmatch(given) else ""


def _closing(status: int, reason: str) -> HTTPException:
    """The rest of the request is not read, so the connection has no next one."""
    return HTTPException(status, reason, headers={"connection": "close"})
