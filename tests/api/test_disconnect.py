"""A client that goes away takes the work of its request with it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.types import Message

from paceline.api import create_app, reply
from paceline.types import Frame
from tests.api.scripted import CHAT, HELLO, Hang, ScriptedTargets, gateway

PATIENCE_S = 20.0


class Connection:
    """One ASGI request by hand: sends the body, then goes away when `leave` is set."""

    def __init__(self, body: dict[str, Any], *, reads: bool = True) -> None:
        self.leave = asyncio.Event()
        self.sent: list[Message] = []
        self._body: bytes | None = json.dumps(body).encode()
        self._reads = reads

    async def receive(self) -> Message:
        if self._body is not None:
            body, self._body = self._body, None
            return {"type": "http.request", "body": body, "more_body": False}
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if not self._reads:
            await asyncio.Event().wait()
        self.sent.append(message)

    async def run(self, targets: ScriptedTargets, timeout_s: float = 30.0) -> None:
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},  # where Starlette's own responses do not listen
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/chat/completions",
            "raw_path": b"/v1/chat/completions",
            "query_string": b"",
            "root_path": "",
            "headers": [(b"content-type", b"application/json")],
            "server": ("paceline", 80),
            "client": ("client", 1),
        }
        app = create_app(gateway(targets, timeout_s=timeout_s))
        await asyncio.wait_for(app(scope, self.receive, self.send), PATIENCE_S)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("script", [[Hang()], [*HELLO[:2], Hang()]], ids=["before the first frame", "between frames"])
async def test_a_disconnect_cancels_the_work(stream: bool, script: Sequence[Frame | Hang]) -> None:
    targets = ScriptedTargets(script)
    connection = Connection({**CHAT, "stream": stream})
    request = asyncio.create_task(connection.run(targets))
    await targets.hanging.wait()
    assert targets.ended == []
    connection.leave.set()
    await request
    assert targets.ended == ["cancelled"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_server_that_stops_cancels_the_work(stream: bool) -> None:
    targets = ScriptedTargets([*HELLO[:2], Hang()])
    request = asyncio.create_task(Connection({**CHAT, "stream": stream}).run(targets))
    await targets.hanging.wait()
    request.cancel()
    with pytest.raises(asyncio.CancelledError):
        await request
    assert targets.ended == ["cancelled"]


async def test_a_client_that_does_not_read_loses_its_stream_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reply, "SEND_GRACE_S", 0.0)
    targets = ScriptedTargets()
    await Connection({**CHAT, "stream": True}, reads=False).run(targets, timeout_s=0.02)
    assert targets.ended == ["closed"]


async def test_a_broken_connection_ends_the_request_quietly() -> None:
    class Broken(Connection):
        async def send(self, message: Message) -> None:
            if message["type"] == "http.response.body":
                raise ConnectionResetError
            await super().send(message)

    targets = ScriptedTargets()
    connection = Broken({**CHAT, "stream": True})
    await connection.run(targets)
    assert targets.ended == ["closed"]
    assert [message["type"] for message in connection.sent] == ["http.response.start"]
