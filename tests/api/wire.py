"""The HTTP application behind a real server on a real socket, in the test's own event loop; and what talks to it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import uvicorn
from fastapi import FastAPI

from paceline.api import ClusterStatus, SessionInfo, Targets
from paceline.engine.engine import Engine
from paceline.engine.loop import EngineLoop
from paceline.errors import PacelineError
from paceline.sessions.handoff import Outcome
from paceline.telemetry.generation import Generation
from paceline.telemetry.tracing import NoTracer, Tracer
from paceline.types import Accepted, Delta, Failure, Frame, Request

HOST = "127.0.0.1"
PATIENCE_S = 60.0


class EngineTargets(Targets):
    """One engine in its thread, as a target replica has it."""

    def __init__(self, engine: Engine, tracer: Tracer | None = None) -> None:
        self.engine = engine
        self._tracer = tracer or NoTracer()
        self.loop = EngineLoop(engine)
        self.open: set[str] = set()
        self.steps = 0
        self.steps_to_free: list[int] = []
        """Of each request that was given up: the steps between that and its end in the engine."""
        step = engine.step

        def counted() -> dict[str, Delta]:
            self.steps += 1
            return step()

        engine.step = counted  # type: ignore[method-assign]

    async def generate(self, request: Request) -> AsyncIterator[Frame]:
        request = replace(request, params=request.params.with_seed())
        frames: asyncio.Queue[Delta | Failure] = asyncio.Queue()
        events = asyncio.get_running_loop()
        left = 1
        self.open.add(request.request_id)
        generation = Generation.begin(self._tracer, request, "target-1")
        sink = generation.hearing(lambda frame: events.call_soon_threadsafe(frames.put_nowait, frame))
        try:
            await asyncio.wrap_future(self.loop.submit(generation.request, sink))
            assert request.params.seed is not None
            yield Accepted("target-1", request.params.seed, len(request.token_ids))
            while left:
                frame = await frames.get()
                left -= isinstance(frame, Failure) or frame.finished
                yield frame
        except PacelineError as error:
            left = 0
            generation.note(Failure.of(error))
            yield Failure.of(error)
        finally:
            generation.__exit__(None, None, None)
            self.open.discard(request.request_id)
            if left:
                before = self.steps
                ended = self.loop.abort(request.request_id)
                ended.add_done_callback(lambda _: self.steps_to_free.append(self.steps - before))

    async def idle(self) -> None:
        """Wait until nothing is open here and the engine has no work; then its accounts must close."""
        async with asyncio.timeout(PATIENCE_S):
            while self.open or await asyncio.wrap_future(self.loop.call(lambda: self.engine.has_work)):  # noqa: ASYNC110
                await asyncio.sleep(0.005)
        await asyncio.wrap_future(self.loop.call(self.engine.check))

    async def sessions(self) -> list[SessionInfo]:
        held = await asyncio.wrap_future(self.loop.call(self.engine.sessions))
        return [SessionInfo(each.session_id, "target-1", each.tokens, each.running) for each in held]

    async def close_session(self, session_id: str) -> bool:
        return await asyncio.wrap_future(self.loop.call(lambda: self.engine.drop_session(session_id)))

    async def hand_off(
        self, replica: str, sessions: Sequence[str] | None, count: int, to: str | None = None
    ) -> Outcome | None:
        return None

    async def abort(self, request_id: str) -> bool:
        return await asyncio.wrap_future(self.loop.end(request_id))

    async def status(self) -> ClusterStatus:
        return ClusterStatus()


@asynccontextmanager
async def served(app: FastAPI, *, send_buffer: int | None = None) -> AsyncIterator[int]:
    """Its port. `send_buffer` is the size, in bytes, of what the kernel takes for one connection."""
    listening = socket.create_server((HOST, 0))
    if send_buffer is not None:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
    # As Ray Serve has it: no lifespan, and no log of its own.
    config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[method-assign,assignment]
    running = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        while not server.started:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        await running
        listening.close()


def head(method: str, path: str, headers: Mapping[str, str] | None = None) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"host: {HOST}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode()


def post(path: str, body: bytes | Mapping[str, Any], headers: Mapping[str, str] | None = None) -> bytes:
    """A whole request with a body of JSON."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    kinds = {"content-type": "application/json", "content-length": str(len(data))}
    return head("POST", path, kinds | dict(headers or {})) + data


async def talk(port: int, *parts: bytes) -> tuple[int, bytes]:
    """Send the parts, as far as the server takes them; its status and everything behind the status line, up to the
    end of the response's body or of the connection."""
    reader, writer = await asyncio.open_connection(HOST, port)

    async def say() -> None:
        with contextlib.suppress(ConnectionError):
            for part in parts:
                writer.write(part)
                await writer.drain()

    saying = asyncio.create_task(say())
    try:
        async with asyncio.timeout(PATIENCE_S):
            top = await reader.readuntil(b"\r\n\r\n")
            length = next((line for line in top.lower().split(b"\r\n") if line.startswith(b"content-length:")), b":0")
            body = await reader.readexactly(int(length.partition(b":")[2]))
        return int(top.split(b" ", 2)[1]), top + body
    finally:
        saying.cancel()
        await asyncio.gather(saying, return_exceptions=True)
        writer.transport.abort()
