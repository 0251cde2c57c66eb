"""Functions over gRPC: told to the model, found in what it writes, sent back as messages."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from paceline.api import Gateway
from paceline.client import AsyncClient
from paceline.errors import InvalidRequest
from paceline.rpc.inference_service import InferenceHandlers
from paceline.sessions.history import ChatMessage, ToolCall
from paceline.types import Delta, FinishReason, Frame
from paceline.v1 import inference_pb2 as pb
from tests.api.scripted import ACCEPTED, HELLO, METRICS, MODEL, ScriptedTargets, tokenizer
from tests.rpc.served import refused, serving, stub_of

HI = [pb.Message(role="user", content="hi")]
SCHEMA = '{"type": "object", "properties": {"city": {"type": "string"}}}'
WEATHER = pb.Tool(name="weather", description="of a city", parameters_json_schema=SCHEMA)
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'


def script(text: str, *, size: int = 7) -> list[Frame]:
    """The text in pieces, and a proper end."""
    pieces = [text[start : start + size] for start in range(0, len(text), size)]
    deltas = [Delta((10 + n,), piece) for n, piece in enumerate(pieces)]
    return [ACCEPTED, *deltas, Delta((), "", FinishReason.STOP, METRICS)]


async def events(frames: list[Frame], **fields: Any) -> list[pb.GenerateEvent]:
    async with stub_of(ScriptedTargets(frames)) as stub:
        request = pb.ChatRequest(**{"messages": HI, "tools": [WEATHER], **fields})
        return [event async for event in stub.Chat(request)]


async def test_a_call_is_told_apart_from_the_text() -> None:
    found = await events(script(f"Let me look. {CALL}"))
    pieces = [event.tool_call for event in found if event.HasField("tool_call")]
    assert "".join(event.tokens.text for event in found) == "Let me look."
    assert (pieces[0].name, pieces[0].index, pieces[0].call, len(pieces[0].id)) == ("weather", 0, 0, 9)
    assert "".join(piece.arguments for piece in pieces) == '{"city": "Rome"}'
    assert found[-1].finished.reason == pb.FINISH_REASON_TOOL_CALLS
    assert found[-1].finished.usage.completion_tokens == METRICS.completion_tokens


async def test_every_token_is_told_whatever_becomes_of_its_text() -> None:
    frames = script(CALL)
    found = await events(frames)
    assert [token for event in found for token in event.tokens.token_ids] == [
        token for frame in frames if isinstance(frame, Delta) for token in frame.token_ids
    ]


async def test_text_without_a_call_is_as_it_was() -> None:
    found = await events(list(HELLO))
    assert ("".join(event.tokens.text for event in found), found[-1].finished.reason) == (
        "Hello",
        pb.FINISH_REASON_STOP,
    )


async def test_the_model_is_told_of_the_functions_unless_none_may_be_called() -> None:
    for choice, told in ((pb.ToolChoice(), True), (pb.ToolChoice(mode=pb.ToolChoice.MODE_NONE), False)):
        targets = ScriptedTargets()
        async with stub_of(targets) as stub:
            [_ async for _ in stub.Chat(pb.ChatRequest(messages=HI, tools=[WEATHER], tool_choice=choice))]
        assert ("weather" in tokenizer().decode(targets.requests[0].token_ids)) is told


async def test_a_call_that_is_required_is_constrained() -> None:
    for choice in (pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED), pb.ToolChoice(function="weather")):
        targets = ScriptedTargets()
        async with stub_of(targets) as stub:
            [_ async for _ in stub.Chat(pb.ChatRequest(messages=HI, tools=[WEATHER], tool_choice=choice))]
        grammar = targets.requests[0].params.grammar
        assert grammar is not None and "weather" in grammar.source


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"tools": [pb.Tool(name="a b")]}, "tools.0.name"),
        ({"tools": [WEATHER, pb.Tool(name="f", parameters_json_schema="[1]")]}, "tools.1.parameters_json_schema"),
        ({"tools": [pb.Tool(name="f", parameters_json_schema="{")]}, "tools.0.parameters_json_schema"),
        ({"tools": [pb.Tool(name="f", parameters_json_schema='{"a": NaN}')]}, "tools.0.parameters_json_schema"),
        (
            {"tools": [pb.Tool(name="f", parameters_json_schema='{"a":' * 5000 + "1" + "}" * 5000)]},
            "tools.0.parameters_json_schema",
        ),
        ({"tools": [WEATHER] * 2}, "tools"),
        ({"tools": [], "tool_choice": pb.ToolChoice(mode=pb.ToolChoice.MODE_REQUIRED)}, "tool_choice"),
        ({"tool_choice": pb.ToolChoice(function="other")}, "tool_choice"),
        ({"sampling": pb.SamplingParams(grammar=pb.Grammar(regex="a"))}, "grammar"),
        ({"messages": [pb.Message(role="user", tool_calls=[pb.ToolCall(name="f")])]}, "messages.0.tool_calls"),
        ({"messages": [*HI, pb.Message(role="user", tool_call_id="x")]}, "messages.1.tool_call_id"),
        ({"messages": [*HI, pb.Message(role="tool", content="x")]}, "messages.1.tool_call_id"),
    ],
)
async def test_what_fits_nothing_is_refused_by_name(fields: dict[str, Any], named: str) -> None:
    async with stub_of() as stub:
        error = await refused(stub.Chat(pb.ChatRequest(**{"messages": HI, "tools": [WEATHER], **fields})))
    assert (type(error), error.param) == (InvalidRequest, named)


async def test_calls_make_the_round_with_the_client() -> None:
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    targets = ScriptedTargets(script(CALL))
    roomy = Gateway(targets, tokenizer(), MODEL, 4096, 30.0)
    async with serving(InferenceHandlers(roomy)) as address, AsyncClient(address) as client:
        asked = await client.chat("hi", tools=[tool])
        (call,) = asked.tool_calls
        assert call == ToolCall(call.call_id, "weather", '{"city": "Rome"}')
        targets.script = HELLO
        result = ChatMessage("tool", "sunny", tool_call_id=call.call_id)
        answer = await asyncio.wait_for(client.chat(["hi", asked.message, result], tools=[tool]), 20)
    rendered = tokenizer().decode(targets.requests[1].token_ids)
    assert (answer.text, "Rome" in rendered, "sunny" in rendered) == ("Hello", True, True)


async def test_a_turn_keeps_the_functions_of_the_one_before() -> None:
    targets = ScriptedTargets(script(CALL))
    tool = {"type": "function", "function": {"name": "weather"}}
    roomy = Gateway(targets, tokenizer(), MODEL, 4096, 30.0)
    async with serving(InferenceHandlers(roomy)) as address, AsyncClient(address) as client:
        session = await client.session("s")
        (call,) = (await session.say("hi", tools=[tool])).tool_calls
        again = await session.say(ChatMessage("tool", "sunny", tool_call_id=call.call_id))
    assert [each.name for each in again.tool_calls] == ["weather"]
