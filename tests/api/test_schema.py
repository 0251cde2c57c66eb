"""What the HTTP API takes, field by field."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import ValidationError

from paceline.api.failures import invalid_request
from paceline.api.schema import ChatCompletionRequest, CompletionRequest
from paceline.types import SamplingParams
from tests.api.scripted import CHAT, COMPLETION, ScriptedTargets, http

MESSAGES = [{"role": "user", "content": "hi"}]
TOOL = {"type": "function", "function": {"name": "f"}}
SURROGATE = {"name": "f", "arguments": "\ud800"}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}

WRONG_IN_BOTH: list[tuple[dict[str, Any], str]] = [
    ({"model": 3}, "model"),
    ({"max_tokens": "5"}, "max_tokens"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"max_tokens": True}, "max_tokens"),
    ({"max_tokens": 1.5}, "max_tokens"),
    ({"max_tokens": 100_000}, "max_tokens"),
    ({"temperature": "hot"}, "temperature"),
    ({"temperature": -1}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"top_p": 2}, "top_p"),
    ({"top_k": -1}, "top_k"),
    ({"top_k": 1.0}, "top_k"),
    ({"min_p": 1.5}, "min_p"),
    ({"seed": 1.5}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"stop": 3}, "stop"),
    ({"stop": ""}, "stop"),
    ({"stop": ["a", 3]}, "stop.1"),
    ({"stop": ["a"] * 17}, "stop"),
    ({"stop_token_ids": ["a"]}, "stop_token_ids.0"),
    ({"stop_token_ids": [100_000]}, "stop_token_ids"),
    ({"ignore_eos": 1}, "ignore_eos"),
    ({"stream": "yes"}, "stream"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
    ({"stream": True, "stream_options": {"colour": 1}}, "stream_options.colour"),
    ({"session_id": 5}, "session_id"),
    ({"session_id": ""}, "session_id"),
    ({"session_id": "a\nb"}, "session_id"),
    ({"session_id": " a"}, "session_id"),
    ({"session_id": "x" * 257}, "session_id"),
    ({"speculation": "off"}, "speculation"),
    ({"ctx_size": 5}, "ctx_size"),
    ({"ctx_size": 100_000}, "ctx_size"),
    ({"ctx_size": 64.0}, "ctx_size"),
    ({"ctx_size": -1}, "ctx_size"),
    ({"n_keep": 4}, "n_keep"),
    ({"n_discard": -1}, "n_discard"),
    ({"ctx_size": 64, "n_keep": -1}, "n_keep"),
    ({"ctx_size": 64, "n_discard": 60}, "n_discard"),
    ({"ctx_size": 64, "n_discard": 0}, "n_discard"),
    ({"priority": 1}, "priority"),
    ({"priority": -1}, "priority"),
    ({"priority": 0.0}, "priority"),
    ({"priority": True}, "priority"),
    ({"priority": 2**31}, "priority"),
    ({"return_token_ids": 1}, "return_token_ids"),
    ({"n": 0}, "n"),
    ({"n": 129}, "n"),
    ({"n": True}, "n"),
    ({"presence_penalty": 2.5}, "presence_penalty"),
    ({"presence_penalty": "high"}, "presence_penalty"),
    ({"frequency_penalty": -2.5}, "frequency_penalty"),
    ({"repetition_penalty": 0}, "repetition_penalty"),
    ({"logit_bias": [5]}, "logit_bias"),
    ({"logit_bias": {"a": 1}}, "logit_bias"),
    ({"logit_bias": {"-1": 1}}, "logit_bias"),
    ({"logit_bias": {"5": 101}}, "logit_bias"),
    ({"logit_bias": {"5": "1"}}, "logit_bias"),
    ({"logit_bias": {"262": 1}}, "logit_bias"),
    ({"min_tokens": -1}, "min_tokens"),
    ({"min_tokens": 6, "max_tokens": 5}, "min_tokens"),
    ({"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "text", "json_schema": {"name": "x"}}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.name"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": 1}}},
        "response_format.json_schema.schema",
    ),
    ({"structured_outputs": {}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a", "json_object": True}}, "structured_outputs"),
    ({"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}}, "structured_outputs"),
    ({"guided_json": {}}, "guided_json"),
    ({"bad_words": ["a"]}, "bad_words"),
    ({"skip_special_tokens": False}, "skip_special_tokens"),
    ({"use_beam_search": True}, "use_beam_search"),
    ({"length_penalty": 2}, "length_penalty"),
    ({"allowed_token_ids": [1]}, "allowed_token_ids"),
    ({"colour": "red"}, "colour"),
]
WRONG_IN_CHAT: list[tuple[dict[str, Any], str]] = [
    ({"messages": None}, "messages"),
    ({"messages": "hi"}, "messages"),
    ({"messages": []}, "messages"),
    ({"messages": [{"content": "hi"}]}, "messages.0.role"),
    ({"messages": [*MESSAGES, {"role": "function", "content": "hi"}]}, "messages.1.role"),
    ({"messages": [*MESSAGES, {"role": "tool", "content": "hi"}]}, "messages.1.tool_call_id"),
    ({"messages": [{"role": "user", "content": "hi", "tool_call_id": "c"}]}, "messages.0.tool_call_id"),
    ({"messages": [{"role": "user", "content": "hi", "tool_calls": [CALL]}]}, "messages.0.tool_calls"),
    (
        {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}]},
        "messages.0.tool_calls.0.type",
    ),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user"}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": None}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": ["hi"]}]}, "messages.0.content"),
    ({"messages": [{"role": "user", "content": "hi", "tool_calls": [{}]}]}, "messages.0.tool_calls.0.id"),
    ({"messages": [{"role": "user", "content": "hi", "colour": "red"}]}, "messages.0.colour"),
    ({"messages": [{"role": "user", "content": "FORBIDDEN"}]}, "messages"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
    ({"max_completion_tokens": 0}, "max_completion_tokens"),
    ({"max_completion_tokens": "5"}, "max_completion_tokens"),
    ({"max_completion_tokens": 5, "max_tokens": 6}, "max_completion_tokens"),
    ({"logprobs": 1}, "logprobs"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
    ({"prompt_logprobs": 1}, "prompt_logprobs"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"tools": [{"type": "function"}]}, "tools.0.function"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools.0.type"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
    ({"tools": [{"type": "function", "function": {"name": "f", "parameters": "{}"}}]}, "tools.0.function.parameters"),
    ({"tools": [TOOL, TOOL]}, "tools"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
    ({"tools": [TOOL], "structured_outputs": {"regex": "a"}}, "structured_outputs"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"parallel_tool_calls": 1}, "parallel_tool_calls"),
    ({"functions": [{}]}, "functions"),
    ({"function_call": {"name": "f"}}, "function_call"),
    ({"modalities": ["text", "audio"]}, "modalities"),
    ({"audio": {}}, "audio"),
    ({"moderation": {}}, "moderation"),
    ({"reasoning_effort": "high"}, "reasoning_effort"),
    ({"verbosity": "low"}, "verbosity"),
    ({"web_search_options": {}}, "web_search_options"),
    ({"echo": True}, "echo"),
    ({"prompt": "hi"}, "prompt"),
]
WRONG_IN_COMPLETIONS: list[tuple[dict[str, Any], str]] = [
    ({"prompt": None}, "prompt"),
    ({"prompt": ""}, "prompt"),
    ({"prompt": []}, "prompt"),
    ({"prompt": {}}, "prompt"),
    ({"prompt": ["a", ""]}, "prompt"),
    ({"prompt": ["a", 3]}, "prompt"),
    ({"prompt": [[1], []]}, "prompt"),
    ({"prompt": ["a"] * 257}, "prompt"),
    ({"prompt": ["a", "b"], "session_id": "s"}, "session_id"),
    ({"prompt": [1, True]}, "prompt"),
    ({"prompt": [1, 1.5]}, "prompt"),
    ({"prompt": [1, 262]}, "prompt"),
    ({"prompt": [-1]}, "prompt"),
    ({"prompt": "x" * 512}, "prompt"),
    ({"logprobs": True}, "logprobs"),
    ({"logprobs": 21}, "logprobs"),
    ({"prompt_logprobs": -1}, "prompt_logprobs"),
    ({"echo": 1}, "echo"),
    ({"best_of": 2}, "best_of"),
    ({"best_of": 1, "n": 2}, "best_of"),
    ({"tools": [TOOL]}, "tools"),
    ({"suffix": "end"}, "suffix"),
    ({"max_completion_tokens": 5}, "max_completion_tokens"),
    ({"messages": MESSAGES}, "messages"),
]
NEUTRAL: dict[str, Any] = {
    "user": "u",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "flex",
    "safety_identifier": "s",
    "prompt_cache_key": "k",
    "prompt_cache_options": {},
    "prompt_cache_retention": "24h",
    "n": 1,
    "presence_penalty": 0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "priority": 0,
    "ctx_size": 0,
    "skip_special_tokens": True,
    "response_format": {"type": "text"},
    "use_beam_search": False,
    "length_penalty": 1.0,
    "bad_words": [],
}
NEUTRAL_IN_CHAT: dict[str, Any] = {
    "logprobs": False,
    "top_logprobs": 0,
    "response_format": {"type": "text"},
    "tools": [],
    "tool_choice": "auto",
    "chat_template_kwargs": {},
    "functions": [],
    "function_call": "none",
    "modalities": ["text"],
    "audio": None,
    "reasoning_effort": "none",
    "parallel_tool_calls": True,
    "prediction": {"type": "content", "content": "x"},
}
NEUTRAL_IN_COMPLETIONS: dict[str, Any] = {"logprobs": None, "echo": False, "best_of": 1, "suffix": None}


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [("/v1/chat/completions", {**CHAT, **wrong}, field) for wrong, field in WRONG_IN_BOTH + WRONG_IN_CHAT]
    + [("/v1/completions", {**COMPLETION, **wrong}, field) for wrong, field in WRONG_IN_BOTH + WRONG_IN_COMPLETIONS],
)
async def test_bad_input_is_refused_with_the_name_of_its_field(path: str, body: dict[str, Any], field: str) -> None:
    targets = ScriptedTargets()
    async with http(targets) as client:
        response = await client.post(path, json=body)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, field, "invalid_request_error")
    assert field in error["message"]
    assert targets.requests == []


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (
            {"messages": [{"role": "assistant", "tool_calls": [{**CALL, "function": SURROGATE}]}]},
            "messages.0.tool_calls.0",
        ),
        ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "\ud800"}]}, "messages.0.tool_call_id"),
        ({"tools": [{"type": "function", "function": {"name": "f", "description": "\ud800"}}]}, "tools.0"),
        ({"structured_outputs": {"regex": "\ud800"}}, "response_format"),
    ],
)
async def test_half_a_surrogate_pair_is_refused(body: dict[str, Any], field: str) -> None:
    async with http() as client:
        response = await client.post(
            "/v1/chat/completions", content=json.dumps({**CHAT, **body}), headers={"content-type": "application/json"}
        )
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    ("path", "body"),
    [("/v1/chat/completions", {**CHAT, name: off}) for name, off in {**NEUTRAL, **NEUTRAL_IN_CHAT}.items()]
    + [("/v1/completions", {**COMPLETION, name: off}) for name, off in {**NEUTRAL, **NEUTRAL_IN_COMPLETIONS}.items()],
)
async def test_a_field_that_cannot_change_the_result_is_accepted(path: str, body: dict[str, Any]) -> None:
    async with http() as client:
        response = await client.post(path, json=body)
    assert response.status_code == 200


@pytest.mark.parametrize(("model", "body"), [(ChatCompletionRequest, CHAT), (CompletionRequest, COMPLETION)])
def test_every_optional_field_may_be_null(model: type[ChatCompletionRequest], body: dict[str, Any]) -> None:
    names = [name for name, field in model.model_fields.items() if not field.is_required()]
    assert model.model_validate({**body, **dict.fromkeys(names)}).params() == model.model_validate(body).params()


def test_all_wrong_fields_are_named_at_once() -> None:
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate({"messages": [{}], **{f"f{i}": 1 for i in range(9)}})
    found = [{**error, "loc": ("body", *error["loc"])} for error in caught.value.errors()]
    assert invalid_request(found).message == (
        "messages.0.role: required; messages.0.content: required, unless the message has tool_calls; "
        "f0: unknown field; f1: unknown field; f2: unknown field; and 6 more"
    )


def test_sampling_parameters_are_those_of_the_body() -> None:
    body = {
        **CHAT,
        "max_tokens": 5,
        "temperature": 0,
        "top_p": 0.5,
        "top_k": 3,
        "min_p": 0.1,
        "seed": -4,
        "stop": "end",
        "stop_token_ids": [9],
        "ignore_eos": True,
        "n": 2,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {"7": -100, "3": 1.5},
        "min_tokens": 2,
        "include_stop_str_in_output": True,
        "logprobs": True,
        "top_logprobs": 4,
    }
    assert ChatCompletionRequest.model_validate(body).params() == SamplingParams(
        max_tokens=5,
        temperature=0,
        top_p=0.5,
        top_k=3,
        min_p=0.1,
        seed=-4,
        stop=("end",),
        stop_token_ids=(9,),
        ignore_eos=True,
        n=2,
        repetition_penalty=1.1,
        presence_penalty=0.5,
        frequency_penalty=-0.5,
        logit_bias={3: 1.5, 7: -100},
        min_tokens=2,
        include_stop_str_in_output=True,
        logprobs=4,
    )


def test_logprobs_of_a_completion_are_a_number() -> None:
    params = CompletionRequest.model_validate({**COMPLETION, "logprobs": 0, "prompt_logprobs": 2}).params()
    assert (params.logprobs, params.prompt_logprobs) == (0, 2)


def test_logprobs_of_a_chat_are_the_tokens_alone_unless_more_are_asked_for() -> None:
    assert ChatCompletionRequest.model_validate({**CHAT, "logprobs": True}).params().logprobs == 0


def test_max_completion_tokens_is_the_later_word_for_max_tokens() -> None:
    assert ChatCompletionRequest.model_validate({**CHAT, "max_completion_tokens": 5}).params().max_tokens == 5


def test_text_parts_are_joined_by_line_breaks() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    body = ChatCompletionRequest.model_validate({"messages": [{"role": "user", "content": parts}]})
    assert body.messages[0].message().content == "a\nb"


def test_a_message_the_server_sent_can_be_sent_back() -> None:
    sent = {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None, "annotations": [], "audio": None}
    assert ChatCompletionRequest.model_validate({"messages": [sent]}).messages[0].message().content == "hi"


def test_a_message_that_openais_client_has_parsed_can_be_sent_back() -> None:
    call = {**CALL, "function": {**CALL["function"], "parsed_arguments": {}}}  # type: ignore[dict-item]
    sent = {"role": "assistant", "content": None, "parsed": None, "tool_calls": [call]}
    assert ChatCompletionRequest.model_validate({"messages": [sent]}).messages[0].message().tool_calls[0].name == "f"
