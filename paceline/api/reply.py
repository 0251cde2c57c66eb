"""The HTTP response of one generation: opens the stream, decides the status, sends the answer whole or in events.

All of it happens in one task, which is cancelled when the client goes away, and with it the work of the replica.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import Coroutine, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from paceline.api.batch import Batch, open_all
from paceline.api.deadline import Patience
from paceline.api.failures import public_error
from paceline.api.gateway import Gateway, Prepared
from paceline.api.middleware import limits_of, origin_of
from paceline.api.stream import Stream
from paceline.api.tally import Tally
from paceline.api.wording import Wording
from paceline.errors import InvalidRequest
from paceline.telemetry.requests import named

logger = logging.getLogger(__name__)

TIMEOUT_HEADER = "x-request-timeout"
"""Seconds; a request has no more time than the server gives it anyway."""
SEND_GRACE_S = 5.0
"""How long past the request's deadline a client may take to read what is being sent."""


class ClientGone(Exception):
    """The client no longer reads; there is nobody to report anything to."""


class Reply(Response):
    """Runs a request when it is sent. An error before the first frame is raised, so that it gets a status."""

    def __init__(self, gateway: Gateway, prepared: Sequence[Prepared], wording: Wording, *, stream: bool) -> None:
        super().__init__()
        self._gateway = gateway
        self._prepared = prepared
        self._generation = prepared[0].request
        self._wording = wording
        self._streaming = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await while_connected(receive, self._run(scope, send))
        except ClientGone:
            logger.info("%s: the client went away", self._generation.request_id, extra=named(self._generation))

    async def _run(self, scope: Scope, send: Send) -> None:
        timeout_s, origin = _timeout_s(scope), origin_of(scope)
        prepared = [replace(each, timeout_s=timeout_s, origin=origin) for each in self._prepared]
        async with await open_all(self._gateway, prepared) as stream:
            tally = self._wording.tally([each.request for each in prepared], stream.accepted)
            channel = _Channel(send, stream.deadline + SEND_GRACE_S, limits_of(scope).slow_client_timeout_s)
            if self._streaming:
                with closing(channel):
                    await channel.start(self._head(stream, "text/event-stream; charset=utf-8"))
                    await self._events(channel, stream, tally)
                return
            async for delta in stream:
                tally.add(delta)
        body = self._wording.whole(tally).json_bytes()
        headers = self._head(stream, "application/json")
        headers["content-length"] = str(len(body))
        with closing(channel):
            await channel.start(headers)
            await channel.put(body, more=False)

    async def _events(self, channel: _Channel, stream: Stream | Batch, tally: Tally) -> None:
        """Server-Sent Events: one a delta. An error on the way is an event too, and the last one."""
        wording = self._wording
        try:
            for opening in wording.openings(tally):
                await channel.put(wording.event(tally, opening))
            async for delta in stream:
                tally.add(delta)
                event = wording.text_event(tally, delta)
                if event is None:
                    event = b"".join(wording.event(tally, chunk) for chunk in wording.chunks(tally, delta))
                if event:
                    await channel.put(event)
            for closing in wording.closings(tally):
                await channel.put(wording.event(tally, closing))
            if wording.done:
                await channel.put(wording.done)
        except ClientGone:
            raise
        except Exception as error:
            await channel.put(wording.failure(tally, public_error(error)))
        await channel.put(b"", more=False)

    def _head(self, stream: Stream | Batch, media_type: str) -> MutableHeaders:
        headers = MutableHeaders({"content-type": media_type, "x-paceline-replica": stream.accepted.replica_id})
        if stream.accepted.route:
            headers["x-paceline-route"] = stream.accepted.route
        if self._streaming:
            headers["cache-control"] = "no-cache"
            headers["x-accel-buffering"] = "no"  # a reverse proxy passes each event on at once
        if (synthetic := self._gateway.synthetic_acceptance) is not None:
            headers["x-paceline-synthetic-acceptance"] = f"{synthetic:g}"
        if self._generation.session_id is not None:
            # Raw, because a session id may be any printable text and Starlette writes headers in Latin-1.
            headers.raw.append((b"x-session-id", self._generation.session_id.encode()))
        return headers


class _Channel:
    """ASGI's `send`, with a deadline, and one for each message: a client that is gone or does not read raises
    ClientGone.

    What is sent waits here while the connection is full, and nothing is taken from the replica meanwhile.
    """

    def __init__(self, send: Send, deadline: float, within_s: float) -> None:
        self._send = send
        self._deadline = deadline
        self._within_s = within_s
        self._time = asyncio.get_running_loop().time
        self._patience = Patience()

    async def start(self, headers: MutableHeaders) -> None:
        await self._put({"type": "http.response.start", "status": 200, "headers": headers.raw})

    async def put(self, body: bytes, *, more: bool = True) -> None:
        await self._put({"type": "http.response.body", "body": body, "more_body": more})

    def close(self) -> None:
        self._patience.close()

    async def _put(self, message: Message) -> None:
        due = min(self._deadline, self._time() + self._within_s)
        try:
            await self._patience.wait(self._send(message), due, ClientGone)
        except OSError as error:
            raise ClientGone from error


def _timeout_s(scope: Scope) -> float | None:
    """The client's own deadline. Raises InvalidRequest."""
    given = Headers(scope=scope).get(TIMEOUT_HEADER)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequest(f"{TIMEOUT_HEADER}: must be seconds, more than 0", param=TIMEOUT_HEADER)
    return seconds


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run `work` to its end, or cancel it and raise ClientGone if the client disconnects first.

    When this returns or raises, `work` has ended and released what it held.
    """
    task = asyncio.create_task(work)
    watcher = asyncio.create_task(_disconnected(receive))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        await task
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
