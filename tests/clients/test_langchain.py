"""LangChain's ChatOpenAI, unmodified."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import BaseModel

from tests.clients.server import MODEL

langchain_openai = pytest.importorskip("langchain_openai", reason="needs the extra `clients`")
pytestmark = pytest.mark.slow


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def weather(city: str) -> str:
    """Weather of a place."""
    return f"rain in {city}"


@pytest.fixture
def chat(url: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return langchain_openai.ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", max_retries=0)


def test_a_chat_answers(chat: Any) -> None:
    assert chat.invoke("hi").content == "Hello, friend!"


def test_a_chat_streams(chat: Any) -> None:
    assert "".join(chunk.content for chunk in chat.stream("hi")) == "Hello, friend!"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_bound_function_is_called_and_answered(chat: Any, streaming: bool) -> None:
    from langchain_core.messages import HumanMessage, ToolMessage

    bound = chat.bind_tools([weather])
    asked = [HumanMessage("Weather?")]
    answer = bound.invoke(asked)
    if streaming:
        chunks = list(bound.stream(asked))
        answer = chunks[0]
        for chunk in chunks[1:]:
            answer += chunk
    call = answer.tool_calls[0]
    result = ToolMessage(weather(**call["args"]), tool_call_id=call["id"])
    assert (call["name"], call["args"]) == ("weather", {"city": "Oslo"})
    assert bound.invoke([*asked, answer, result]).content == "It rains in Oslo."


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_structured_output_is_an_object(chat: Any, method: str) -> None:
    assert chat.with_structured_output(Person, method=method).invoke("Who?") == Person(name="Ada", age=36)


def test_the_responses_api_is_used_as_well(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    chat = langchain_openai.ChatOpenAI(model=MODEL, base_url=f"{url}/v1", api_key="none", use_responses_api=True)
    assert chat.invoke("hi").text == "Hello, friend!"
