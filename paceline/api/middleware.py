"""What every HTTP request passes on its way in and out: an id, a last resort for errors, a bound on its size.

Plain ASGI: Starlette's BaseHTTPMiddleware would stand between a disconnecting client and the stream.
"""

from __future__ import annotations

import logging
import re
from uuid import uuid4

from fastapi import HTTPException
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from paceline.api.failures import error_response, http_error_response
from paceline.errors import EngineError

logger = logging.getLogger(__name__)

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
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req-{uuid4().hex}"

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


class BodyLimit:
    """Refuses a request body of more than `limit` bytes with 413, announced or not."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self._app = app
        self._limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = Headers(scope=scope).get("content-length", "0")
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise self._too_large()
            return message

        if announced.isdigit() and int(announced) > self._limit:
            await http_error_response(self._too_large())(scope, receive, send)
            return
        await self._app(scope, receive_counted, send)

    def _too_large(self) -> HTTPException:
        """FastAPI lets this through while it reads a body, to the handler that writes the envelope."""
        return HTTPException(413, f"the request body is larger than {self._limit} bytes")
