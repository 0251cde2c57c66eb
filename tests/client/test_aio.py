"""The asynchronous client is the synchronous one, awaited: its own tests are about what is different."""

from __future__ import annotations

import asyncio
import inspect
from typing import Any

import pytest

from paceline.client import AsyncClient, AsyncSession, AsyncStream, Client, Retry, Session, Stream
from paceline.errors import Overloaded, UnknownSession
from paceline.rpc.inference_service import InferenceHandlers
from paceline.types import Failure
from tests.api.scripted import HELLO, Hang, ScriptedTargets, gateway
from tests.client.test_client import Flaky
from tests.rpc.served import serving

PATIENCE_S = 20.0
AT_ONCE = Retry(max_attempts=3, first_s=0.0)


def handlers(targets: ScriptedTargets | None = None) -> InferenceHandlers:
    return InferenceHandlers(gateway(targets))


async def test_a_chat_is_answered_whole_and_as_it_comes() -> None:
    async with serving(handlers()) as address, AsyncClient(address) as client:
        assert (await client.chat("hi")).text == "Hello"
        async with client.stream_chat("hi", session_id="s") as stream:
            assert (await stream.started()).session_id == "s"
            assert [delta.text async for delta in stream] == ["Hel", "lo", ""]
            assert (await stream.answer()).text == "Hello"


async def test_a_session_is_talked_to_and_forked() -> None:
    async with serving(handlers()) as address, AsyncClient(address) as client:
        session = await client.session("trip")
        assert (await session.say("hi")).text == "Hello"
        fork = await session.fork("other")
        assert (await fork.info()).parent == "trip"
        await session.delete()
        with pytest.raises(UnknownSession):
            await session.info()


async def test_a_refusal_is_tried_again() -> None:
    targets = Flaky([Failure.of(Overloaded("full", retry_after=0.001))], HELLO)
    async with serving(handlers(targets)) as address, AsyncClient(address, retry=AT_ONCE) as client:
        assert (await client.chat("hi")).text == "Hello"


@pytest.mark.parametrize("way", ["closed", "cancelled"])
async def test_a_stream_that_is_given_up_ends_the_work(way: str) -> None:
    targets = ScriptedTargets([*HELLO[:2], Hang()])
    async with serving(handlers(targets)) as address, AsyncClient(address) as client:
        stream = client.stream_chat("hi")
        reading = asyncio.create_task(stream.answer())
        await asyncio.wait_for(targets.hanging.wait(), PATIENCE_S)
        if way == "closed":
            stream.close()
        else:
            reading.cancel()
        await asyncio.wait({reading}, timeout=PATIENCE_S)
        await asyncio.wait_for(targets.over.wait(), PATIENCE_S)
    assert targets.ended == ["cancelled"]


@pytest.mark.parametrize(("theirs", "ours"), [(Client, AsyncClient), (Session, AsyncSession), (Stream, AsyncStream)])
def test_both_clients_have_the_same_methods(theirs: type, ours: type) -> None:
    def methods(kind: type) -> dict[str, Any]:
        found = {name: value for name, value in vars(kind).items() if name[0] != "_" and callable(value)}
        return {name: list(inspect.signature(value).parameters) for name, value in found.items()}

    assert methods(theirs) == methods(ours)
