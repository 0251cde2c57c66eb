"""Clients that go away at any moment, from a real server with a real engine: their work ends, and nothing is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import pytest

from paceline.api import Gateway, create_app
from paceline.api.access import Access
from paceline.api.keys import KeyRing
from paceline.config import ApiKeySettings
from tests import tiny
from tests.api.scripted import CONTEXT, MODEL, tokenizer
from tests.api.test_keys import ALICE, entry, ring
from tests.api.wire import HOST, PATIENCE_S, EngineTargets, post, served, talk

LLAMA = tiny.tiny_llama(
    num_hidden_layers=1, hidden_size=24, num_attention_heads=4, num_key_value_heads=2, vocab_size=len(tokenizer())
)
CHATS = "/v1/chat/completions"
BEARER = {"authorization": f"Bearer {ALICE}"}
AT_ONCE = 12
SESSIONS = 5


@dataclass
class House:
    """A server of one engine that runs two requests at a time, and lets eight wait."""

    targets: EngineTargets
    gateway: Gateway
    keys: KeyRing
    port: int

    @property
    def under_way(self) -> int:
        """Requests counted for the key."""
        return self.keys.caller(ALICE).quota.open


@asynccontextmanager
async def house(**options: int) -> AsyncIterator[House]:
    engine = tiny.engine_for(LLAMA, decoder=tokenizer(), max_num_seqs=2, max_queued_requests=8, **options)
    targets, keys = EngineTargets(engine), ring(entry(ALICE, "alice", max_concurrent=100))
    gateway = Gateway(targets, tokenizer(), MODEL, CONTEXT, 60.0)
    app = create_app(gateway, access=Access(keys, ApiKeySettings(file="unread")))
    try:
        async with served(app) as port:
            yield House(targets, gateway, keys, port)
    finally:
        targets.loop.stop()


def turn(number: int, *, stream: bool = True, max_tokens: int = 60) -> bytes:
    """Of one of a few sessions, appended or not, or of none."""
    body = {"messages": [{"role": "user", "content": f"hello {number}"}], "max_tokens": max_tokens, "stream": stream}
    which = number % (2 * SESSIONS)
    if which < SESSIONS:
        return post(f"/v1/sessions/s{which}/turns", body, BEARER)
    return post(CHATS, body | ({"session_id": f"t{which}"} if number % 3 else {}), BEARER)


async def visit(port: int, request: bytes, chance: random.Random) -> None:
    """Send a request, or a part of it; read a little, or nothing; and go."""
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        body_at = request.index(b"\r\n\r\n") + 4
        moment = chance.choice(("in the head", "before the body", "in the body", "at once", "later", "at the end"))
        match moment:
            case "in the head":
                writer.write(request[: chance.randrange(body_at)])
            case "before the body":
                writer.write(request[:body_at])
            case "in the body":
                writer.write(request[: chance.randrange(body_at, len(request))])
            case _:
                writer.write(request)
        await writer.drain()
        async with asyncio.timeout(PATIENCE_S):
            if moment == "later":
                for _ in range(chance.randrange(1, 20)):
                    await reader.read(chance.randrange(1, 400))
            elif moment == "at the end":
                await reader.readuntil(b"\r\n0\r\n\r\n" if b'"stream": true' in request else b"}\r\n")
    except (asyncio.IncompleteReadError, ConnectionError, asyncio.LimitOverrunError):
        pass  # refused: the queue is full, or the session has a turn under way
    finally:
        if chance.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()


async def visits(made: House, count: int, seed: int) -> None:
    chance, numbers = random.Random(seed), iter(range(count))

    async def one_after_the_other() -> None:
        for number in numbers:
            request = turn(number, max_tokens=chance.randrange(1, 60))
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(visit(made.port, request, chance), chance.choice((0.02, 0.2, PATIENCE_S)))

    await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))


async def nothing_is_left(made: House) -> None:
    await made.targets.idle()
    async with asyncio.timeout(PATIENCE_S):
        while made.under_way:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    engine = made.targets.engine
    assert (engine.num_running, engine.num_waiting, engine.queued_prefill_tokens) == (0, 0, 0)
    assert engine.kv.usage().in_use == 0
    assert made.targets.loop._sinks == {}
    assert made.targets.open == set()
    assert all(not each._busy for each in made.gateway._scopes.values())


@pytest.mark.parametrize("count", [200, pytest.param(1000, marks=pytest.mark.slow)])
async def test_clients_that_leave_at_random_leave_nothing_behind(count: int) -> None:
    async with house() as made:
        for number in range(SESSIONS):
            assert (await talk(made.port, post("/v1/sessions", {"session_id": f"s{number}"}, BEARER)))[0] == 200
        await nothing_is_left(made)
        tasks = len(asyncio.all_tasks())
        await visits(made, count, seed=count)
        await nothing_is_left(made)
        async with asyncio.timeout(PATIENCE_S):
            while len(asyncio.all_tasks()) > tasks:  # noqa: ASYNC110  (connections that the server still closes)
                await asyncio.sleep(0.01)
        assert made.targets.steps_to_free, "some were running, or waiting, when their clients left"
        assert max(made.targets.steps_to_free) <= 1
        for number in range(SESSIONS):
            status, answer = await talk(made.port, turn(number, stream=False, max_tokens=4))
            assert (status, b'"finish_reason"' in answer) == (200, True)
        await nothing_is_left(made)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_frees_its_kv_within_a_step(stream: bool) -> None:
    async with house() as made:
        reader, writer = await asyncio.open_connection(HOST, made.port)
        writer.write(post(CHATS, {"messages": [{"role": "user", "content": "hi"}], "stream": stream}, BEARER))
        if stream:
            await reader.readuntil(b"data: ")
        else:
            async with asyncio.timeout(PATIENCE_S):
                while not made.targets.engine.num_running:  # noqa: ASYNC110
                    await asyncio.sleep(0.001)
        writer.transport.abort()
        await nothing_is_left(made)
        assert len(made.targets.steps_to_free) == 1
        assert made.targets.steps_to_free[0] <= 1


async def test_at_its_deadline_a_request_frees_its_kv_within_a_step() -> None:
    async with house() as made:
        asked = {"messages": [{"role": "user", "content": "hi"}], "stream": False, "max_tokens": 400}
        status, answer = await talk(made.port, post(CHATS, asked, BEARER | {"x-request-timeout": "0.05"}))
        await nothing_is_left(made)
    assert (status, json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"]) == (504, "timeout")
    assert [steps <= 1 for steps in made.targets.steps_to_free] == [True]


async def test_a_full_queue_is_told_over_http_with_the_time_to_wait() -> None:
    async with house() as made:
        long = post(CHATS, {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 100}, BEARER)
        answers = await asyncio.gather(*(talk(made.port, long) for _ in range(20)))
        await nothing_is_left(made)
    statuses = [status for status, _ in answers]
    assert statuses.count(200) >= 8
    assert set(statuses) == {200, 429}
    assert all(b"retry-after: 1\r\n" in answer for status, answer in answers if status == 429)
