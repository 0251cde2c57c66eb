"""OpenAI's own Python client, unmodified, synchronous and asynchronous."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.clients.server import MODEL

MESSAGES: Any = [{"role": "user", "content": "hi"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}]
RESPONSE_TOOLS: Any = [{"type": "function", "name": "weather", "parameters": PARAMETERS, "strict": False}]


class Person(BaseModel):
    name: str
    age: int


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    http = openai.DefaultHttpxClient(trust_env=False)
    with openai.OpenAI(api_key="none", base_url=f"{url}/v1", max_retries=0, http_client=http) as found:
        yield found


def test_a_chat_answers(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, temperature=0)
    assert answer.choices[0].message.content == "Hello, friend!"


def test_a_chat_streams_through_the_clients_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model=MODEL, messages=MESSAGES, stream_options={"include_usage": True}
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "content.delta" in kinds
    assert final.choices[0].message.content == "Hello, friend!"
    assert final.usage is not None
    assert final.usage.completion_tokens > 0


def test_a_call_round_trips_through_the_streaming_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=MESSAGES, tools=TOOLS) as stream:
        events = list(stream)
        message = stream.get_final_completion().choices[0].message
    assert message.tool_calls is not None
    call = message.tool_calls[0]
    result = {"role": "tool", "tool_call_id": call.id, "content": "rain"}
    answer = client.chat.completions.create(
        model=MODEL,
        messages=[*MESSAGES, message, result],
        tools=TOOLS,  # type: ignore[list-item]
    )
    assert "tool_calls.function.arguments.delta" in {event.type for event in events}
    assert json.loads(call.function.arguments) == {"city": "Oslo"}
    assert answer.choices[0].message.content == "It rains in Oslo."


def test_a_required_call_is_made(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=MESSAGES, tools=TOOLS, tool_choice="required")
    assert answer.choices[0].finish_reason == "tool_calls"


def test_a_pydantic_model_is_parsed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(model=MODEL, messages=MESSAGES, response_format=Person)
    assert answer.choices[0].message.parsed == Person(name="Ada", age=36)


def test_a_pydantic_function_is_parsed(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=MODEL, messages=MESSAGES, tools=[openai.pydantic_function_tool(Person)], tool_choice="required"
    )
    calls = answer.choices[0].message.tool_calls
    assert calls is not None
    assert calls[0].function.parsed_arguments == Person(name="Ada", age=36)


def test_completions_take_lists_and_echo(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], echo=True, logprobs=1, max_tokens=1)
    assert [choice.text[0] for choice in answer.choices] == ["a", "b"]
    assert answer.choices[0].logprobs is not None


def test_a_response_answers(client: openai.OpenAI) -> None:
    answer = client.responses.create(model=MODEL, input="hi", instructions="Be kind.", metadata={"a": "b"})
    assert (answer.output_text, answer.metadata) == ("Hello, friend!", {"a": "b"})


def test_a_response_streams_through_the_clients_helper(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="hi") as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert (text, final.output_text) == ("Hello, friend!", "Hello, friend!")


def test_a_streamed_response_with_a_call_goes_on_from_its_id(client: openai.OpenAI) -> None:
    with client.responses.stream(model=MODEL, input="hi", tools=RESPONSE_TOOLS) as stream:
        first = stream.get_final_response()
    call = next(item for item in first.output if item.type == "function_call")
    result: Any = [{"type": "function_call_output", "call_id": call.call_id, "output": "rain"}]
    second = client.responses.create(model=MODEL, input=result, previous_response_id=first.id, tools=RESPONSE_TOOLS)
    assert second.output_text == "It rains in Oslo."


def test_a_response_is_parsed_retrieved_and_deleted(client: openai.OpenAI) -> None:
    sent = client.responses.parse(model=MODEL, input="hi", text_format=Person)
    found = client.responses.retrieve(sent.id)
    client.responses.delete(sent.id)
    assert (sent.output_parsed, found.output_text) == (Person(name="Ada", age=36), sent.output_text)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(sent.id)


def test_a_refusal_names_the_field(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.embeddings.create(model=MODEL, input="hi")
    assert refused.value.param == "model"


async def test_the_asynchronous_client_streams_chats_and_responses(url: str) -> None:
    http = openai.DefaultAsyncHttpxClient(trust_env=False)
    async with openai.AsyncOpenAI(api_key="none", base_url=f"{url}/v1", http_client=http) as client:
        chat = await client.chat.completions.create(model=MODEL, messages=MESSAGES, stream=True)
        texts = [chunk.choices[0].delta.content or "" async for chunk in chat]
        response = await client.responses.create(model=MODEL, input="hi", stream=True)
        kinds = [event.type async for event in response]
    assert "".join(texts) == "Hello, friend!"
    assert kinds[-1] == "response.completed"
