"""Text to tokens and back, and what is said to those who want embeddings."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import pytest

from tests.api.scripted import CHAT, CONTEXT, MODEL, http, tokenizer
from tests.api.test_schema import TOOL


async def post(path: str, body: dict[str, Any]) -> Any:
    async with http(context=4096) as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_a_text_is_tokenized() -> None:
    async with http() as client:
        answer = (await client.post("/tokenize", json={"model": MODEL, "prompt": "hi"})).json()
    assert answer == {"count": 2, "max_model_len": CONTEXT, "tokens": tokenizer().encode("hi")}


async def test_tokens_are_told_as_text_if_wanted() -> None:
    answer = await post("/tokenize", {"prompt": "hi", "return_token_strs": True, "add_special_tokens": False})
    assert answer["token_strs"] == ["h", "i"]


async def test_a_conversation_is_tokenized_as_the_chat_renders_it() -> None:
    answer = await post("/tokenize", CHAT)
    assert tokenizer().decode(answer["tokens"]) == "<|user|>hi<|assistant|>"


async def test_a_conversation_is_tokenized_with_its_functions() -> None:
    with_tools = await post("/tokenize", {**CHAT, "tools": [TOOL]})
    assert '"name": "f"' in tokenizer().decode(with_tools["tokens"])


async def test_tokens_become_the_text_they_came_from() -> None:
    tokens = (await post("/tokenize", CHAT))["tokens"]
    assert await post("/detokenize", {"tokens": tokens}) == {"prompt": "<|user|>hi<|assistant|>"}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {**CHAT, "prompt": "hi"}, "prompt"),
        ("/tokenize", {"prompt": "hi", "tools": [TOOL]}, "tools"),
        ("/tokenize", {**CHAT, "add_special_tokens": True}, "add_special_tokens"),
        ("/tokenize", {**CHAT, "add_generation_prompt": False}, "add_generation_prompt"),
        ("/tokenize", {"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role"),
        ("/detokenize", {"tokens": [1, 5000]}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens.0"),
        ("/v1/embeddings", {"input": "hi"}, "model"),
    ],
)
async def test_bad_input_is_refused_with_the_name_of_its_field(path: str, body: dict[str, Any], field: str) -> None:
    async with http() as client:
        response = await client.post(path, json=body)
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize", "/v1/embeddings"])
async def test_another_model_is_not_served(path: str) -> None:
    async with http() as client:
        response = await client.post(
            path,
            json={"model": "other", "prompt": "a"}
            if path == "/tokenize"
            else {"model": "other", "tokens": [1]}
            if path == "/detokenize"
            else {"model": "other", "input": "a"},
        )
    assert response.json()["error"]["code"] == "model_not_found"


async def test_a_refusal_of_embeddings_says_what_to_do() -> None:
    async with http() as client:
        error = (await client.post("/v1/embeddings", json={"input": "hi"})).json()["error"]
    assert "embedding model" in error["message"]


async def test_the_version_and_a_sign_of_life_are_told() -> None:
    async with http() as client:
        assert (await client.get("/version")).json() == {"version": version("paceline")}
        assert (await client.get("/ping")).status_code == 200
