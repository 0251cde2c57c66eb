"""What a hostile client may send over a real socket: refused by its name, and the service goes on."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator

import pytest
from fastapi.routing import APIRoute

from paceline.api import create_app
from paceline.api.body import CheckedRoute, loads
from paceline.config import LimitSettings
from paceline.errors import InvalidRequest
from paceline.types import Delta
from tests.api.scripted import ACCEPTED, CHAT, Hang, ScriptedTargets, gateway
from tests.api.wire import HOST, PATIENCE_S, head, post, served, talk

CHATS = "/v1/chat/completions"
LIMITS = LimitSettings()
HUGE = 100_000_000
SHORT_S = 0.2


@pytest.fixture
async def port() -> AsyncIterator[int]:
    async with served(create_app(gateway())) as found:
        yield found
        assert (await talk(found, post(CHATS, CHAT)))[0] == 200, "the service goes on"


def chat_of(messages: bytes) -> bytes:
    return b'{"messages": [' + messages + b"]}"


MILLION = b",".join([b'{"role":"user","content":"x"}'] * 250_000)  # what fits into the largest body, and more
BODIES = {
    "bytes that are no UTF-8": (chat_of(b'{"role": "user", "content": "\xff\xfe"}'), "body: not UTF-8 at byte"),
    "half a surrogate pair": (
        chat_of(b'{"role": "user", "content": "\\ud800"}'),
        "messages.0.content: not valid Unicode",
    ),
    "a million messages": (chat_of(b",".join([b"{}"] * 1_000_000)), "body: more than 20000 objects and lists"),
    "as many messages as a body holds": (chat_of(MILLION), "body: more than 20000 objects and lists"),
    "more messages than are taken": (
        chat_of(b",".join([b'{"role":"user","content":"x"}'] * 2049)),
        "messages: at most 2048 in one request, got 2049",
    ),
    "lists in lists": (b"[" * 8_000_000, "body: more than 64 objects and lists in each other"),
    "objects in objects": (b'{"a":' * 1_000_000, "body: more than 64 objects and lists in each other"),
    "NaN": (b'{"prompt": "hi", "temperature": NaN}', "body: NaN is no number in JSON"),
    "Infinity": (b'{"prompt": "hi", "temperature": -Infinity}', "body: -Infinity is no number in JSON"),
    "a float beyond all bounds": (b'{"prompt": "hi", "temperature": 1e999}', "body: 1e999 is no finite number"),
    "an integer of 5000 digits": (b'{"prompt": "hi", "seed": ' + b"9" * 5000 + b"}", "body: an integer has too many"),
    "an integer of 4000 digits": (b'{"prompt": "hi", "seed": ' + b"9" * 4000 + b"}", "seed: "),
    "one field twice": (b'{"prompt": "hi", "prompt": "ho"}', "body: the field 'prompt' is there twice"),
    "a field in a field twice": (b'{"a": [{"b": 1, "b": 1}]}', "body: the field 'b' is there twice"),
    "half a million fields": (
        b"{" + b",".join(b'"%d":0' % n for n in range(499_999)) + b"}",
        "body: more than 100000 fields",
    ),
    "strings without end": (b'{"prompt": ["' + b'","' * 2_000_000, "body: more than 1000000 values"),
    "a string that does not end": (b'{"prompt": "' + b'\\"' * 4_000_000, "body: not valid JSON"),
    "a very long prompt": (b'{"prompt": "' + b"x" * 8_000_000 + b'"}', "prompt: 8000000 characters are more than"),
    "very many token ids": (b'{"prompt": [' + b"1," * 400_000 + b"1]}", "prompt: 400001 tokens leave no room"),
    "a very long session id": (
        b'{"prompt": "hi", "session_id": "' + b"s" * 1_000_000 + b'"}',
        "session_id: must be 1 to 256 printable characters",
    ),
}


@pytest.mark.parametrize("name", BODIES)
async def test_a_hostile_body_is_refused_by_its_name(name: str, port: int) -> None:
    body, message = BODIES[name]
    path = CHATS if b"messages" in body[:20] else "/v1/completions"
    status, answer = await talk(port, post(path, body))
    error = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    assert status == 400
    assert message in error["message"]
    assert len(error["message"]) <= 1001


async def test_a_body_is_refused_at_the_length_it_announces(port: int) -> None:
    announced = head("POST", CHATS, {"content-type": "application/json", "content-length": str(HUGE)})
    assert (await talk(port, announced))[0] == 413


@pytest.mark.parametrize("length", ["9" * 30, "9" * 400])
async def test_a_length_beyond_all_numbers_is_refused(length: str, port: int) -> None:
    announced = head("POST", CHATS, {"content-type": "application/json", "content-length": length})
    assert (await talk(port, announced))[0] in (400, 413)


async def test_a_body_of_100_mb_is_refused_while_it_comes(port: int) -> None:
    announced = head("POST", CHATS, {"content-type": "application/json", "content-length": str(HUGE)})
    assert (await talk(port, announced, *[b"x" * 1_000_000] * 100))[0] == 413


async def test_a_body_without_an_end_is_refused_where_it_becomes_too_long(port: int) -> None:
    chunk = b"%x\r\n" % 1_000_000 + b"x" * 1_000_000 + b"\r\n"
    start = head("POST", CHATS, {"content-type": "application/json", "transfer-encoding": "chunked"})
    assert (await talk(port, start, *[chunk] * 100))[0] == 413


@pytest.mark.parametrize(
    ("request_head", "status"),
    [
        (head("GET", "/v1/models/" + "m" * 60_000), 414),
        (head("GET", "/v1/models?" + "q" * 60_000), 414),
        (head("GET", "/v1/models", {f"x-{n}": "v" for n in range(1000)}), 431),
        (head("GET", "/v1/models", {"x-large": "v" * 50_000}), 431),
        (head("GET", "/v1/models", {"x-request-disconnect-disabled": "?1"}), 400),
        (head("GET", "/v1/sessions/" + "s" * 5_000), 404),
    ],
)
async def test_a_head_that_is_too_much_is_refused(request_head: bytes, status: int, port: int) -> None:
    assert (await talk(port, request_head))[0] == status


async def test_a_body_that_does_not_arrive_is_given_up() -> None:
    app = create_app(gateway(), limits=LimitSettings(body_timeout_s=SHORT_S))
    whole = post(CHATS, CHAT)
    async with served(app) as port:
        status, answer = await talk(port, whole[:-5])
        assert (await talk(port, whole))[0] == 200
    assert (status, json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]) == (408, "body_timeout")


async def test_a_client_that_does_not_read_is_dropped_and_holds_nobody_up() -> None:
    told = 100_000
    targets = ScriptedTargets([ACCEPTED, *[Delta((10,), "x" * 100)] * told, Hang()])
    app = create_app(gateway(targets), limits=LimitSettings(slow_client_timeout_s=SHORT_S))
    async with served(app, send_buffer=4096) as port:
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        await asyncio.get_running_loop().sock_connect(slow, (HOST, port))
        await asyncio.get_running_loop().sock_sendall(slow, post(CHATS, {**CHAT, "stream": True}))
        async with asyncio.timeout(PATIENCE_S):
            await targets.over.wait()
        slow.close()
    assert targets.ended == ["closed"]


async def test_no_hostile_body_stops_the_event_loop_for_long() -> None:
    """Nothing here is timed but by the loop itself: it comes round often while the worst bodies are read."""
    rounds = 0

    async def count() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0.001)

    counting = asyncio.create_task(count())
    for name in ("as many messages as a body holds", "half a million fields", "a string that does not end"):
        before = rounds
        with pytest.raises(InvalidRequest):
            await asyncio.to_thread(loads, BODIES[name][0], LIMITS)
        assert rounds > before
    counting.cancel()


def test_every_route_with_a_body_checks_it() -> None:
    routes = [route for route in create_app(gateway()).routes if isinstance(route, APIRoute)]
    unchecked = [route.path for route in routes if route.body_field is not None and not isinstance(route, CheckedRoute)]
    assert unchecked == []


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon", ""])
async def test_a_deadline_that_is_none_is_refused(given: str, port: int) -> None:
    status, answer = await talk(port, post(CHATS, CHAT, {"x-request-timeout": given}))
    assert status == 400
    assert b"x-request-timeout: must be seconds" in answer


@pytest.mark.parametrize(
    ("script", "stream", "status"), [([Hang()], True, 504), ([Hang()], False, 504), ([ACCEPTED, Hang()], False, 504)]
)
async def test_at_its_own_deadline_a_request_ends_with_504(script: list[object], stream: bool, status: int) -> None:
    targets = ScriptedTargets(script)  # type: ignore[arg-type]
    async with served(create_app(gateway(targets))) as port:
        began = post(CHATS, {**CHAT, "stream": stream}, {"x-request-timeout": str(SHORT_S)})
        assert (await talk(port, began))[0] == status
        assert targets.ended == ["cancelled"]


async def test_a_client_cannot_have_more_time_than_the_server_gives() -> None:
    targets = ScriptedTargets([Hang()])
    async with served(create_app(gateway(targets, timeout_s=SHORT_S))) as port:
        status, answer = await talk(port, post(CHATS, CHAT, {"x-request-timeout": "9999"}))
    assert status == 504
    assert b"longer than 0.2 s" in answer
