"""OpenAI's own client against a real HTTP server."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import openai
import pytest
import uvicorn

from paceline.api import create_app
from paceline.errors import Overloaded
from paceline.types import Failure
from tests.api.scripted import HELLO, MODEL, Hang, ScriptedTargets, gateway

PATIENCE_S = 20.0
MESSAGES: Any = [{"role": "user", "content": "hi"}]


@asynccontextmanager
async def client_of(targets: ScriptedTargets) -> AsyncIterator[openai.AsyncOpenAI]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(gateway(targets)), log_config=None, lifespan="off"))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        async with openai.AsyncOpenAI(
            api_key="none",
            base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1",
            max_retries=0,
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False),
        ) as client:
            yield client
    finally:
        server.should_exit = True
        await serving
        listener.close()


async def test_a_chat_completion_parses() -> None:
    async with client_of(ScriptedTargets()) as client:
        completion = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
    choice = completion.choices[0]
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "Hello", "stop")
    assert completion.usage is not None
    assert completion.usage.prompt_tokens_details is not None
    assert (completion.usage.total_tokens, completion.usage.prompt_tokens_details.cached_tokens) == (7, 2)


async def test_acceptance_is_in_openais_own_fields() -> None:
    async with client_of(ScriptedTargets()) as client:
        whole = await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        usages = [whole.usage, *[chunk.usage async for chunk in stream if chunk.usage]]
        text = await client.completions.create(model=MODEL, prompt="hi")
    details = [usage.completion_tokens_details for usage in [*usages, text.usage] if usage is not None]
    counts = [(each.accepted_prediction_tokens, each.rejected_prediction_tokens) for each in details if each]
    assert counts == [(1, 1)] * 3


async def test_a_streamed_chat_completion_parses() -> None:
    async with client_of(ScriptedTargets()) as client:
        stream = await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
    deltas = [choice for chunk in chunks for choice in chunk.choices]
    assert [choice.delta.content for choice in deltas] == ["", "Hel", "lo"]
    assert [choice.finish_reason for choice in deltas] == [None, None, "stop"]
    assert [chunk.usage.total_tokens if chunk.usage else None for chunk in chunks] == [None, None, None, 7]


async def test_a_text_completion_parses_whole_and_streamed() -> None:
    async with client_of(ScriptedTargets()) as client:
        whole = await client.completions.create(model=MODEL, prompt="hi")
        stream = await client.completions.create(model=MODEL, prompt="hi", stream=True)
        streamed = [chunk.choices[0].text async for chunk in stream]
    assert (whole.choices[0].text, streamed) == ("Hello", ["Hel", "lo"])


async def test_models_are_listed() -> None:
    async with client_of(ScriptedTargets()) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]


async def test_our_extensions_travel_in_the_extra_body() -> None:
    targets = ScriptedTargets()
    async with client_of(targets) as client:
        await client.chat.completions.create(
            model=MODEL, messages=MESSAGES, extra_body={"session_id": "s", "speculation": False, "top_k": 5}
        )
    request = targets.requests[0]
    assert (request.session_id, request.speculate, request.params.top_k) == ("s", False, 5)


async def test_errors_are_the_clients_own_classes() -> None:
    async with client_of(ScriptedTargets([Failure.of(Overloaded("full", retry_after=3))])) as client:
        with pytest.raises(openai.RateLimitError) as overloaded:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES)
        with pytest.raises(openai.NotFoundError):
            await client.chat.completions.create(model="other", messages=MESSAGES)
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model=MODEL, messages=MESSAGES, n=200)
    assert overloaded.value.response.headers["retry-after"] == "3"
    assert (refused.value.param, refused.value.code) == ("n", "invalid_request_error")


async def test_an_error_in_the_middle_of_a_stream_is_raised() -> None:
    async with client_of(ScriptedTargets([*HELLO[:2], Failure("service_unavailable", "replica died")])) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        with pytest.raises(openai.APIError, match="replica died"):
            async for _ in stream:
                pass


async def test_closing_a_stream_cancels_the_work() -> None:
    targets = ScriptedTargets([*HELLO[:2], Hang()])
    async with client_of(targets) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        await anext(aiter(stream))
        await targets.hanging.wait()
        await stream.close()
        await asyncio.wait_for(targets.over.wait(), PATIENCE_S)
    assert targets.ended == ["cancelled"]


async def test_giving_up_on_a_whole_answer_cancels_the_work() -> None:
    targets = ScriptedTargets([*HELLO[:2], Hang()])
    async with client_of(targets) as client:
        call = asyncio.create_task(client.chat.completions.create(model=MODEL, messages=MESSAGES))
        await targets.hanging.wait()
        call.cancel()
        await asyncio.wait_for(targets.over.wait(), PATIENCE_S)
    assert targets.ended == ["cancelled"]
