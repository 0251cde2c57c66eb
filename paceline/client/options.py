"""What the methods of a client take by name, and the requests these become."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

from paceline.errors import InvalidRequest
from paceline.sessions.history import ChatMessage
from paceline.types import Grammar, Prompt
from paceline.v1 import inference_pb2 as pb

Message = str | Mapping[str, Any] | ChatMessage
"""A text that the user says; a mapping with role and content, as OpenAI has it; or a ChatMessage."""


class Sampling(TypedDict, total=False):
    """How tokens are drawn and when an output ends: `paceline.SamplingParams`. What is left out is up to the server."""

    max_tokens: int
    temperature: float
    top_p: float
    top_k: int
    min_p: float
    seed: int
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    min_tokens: int
    include_stop_str_in_output: bool
    logprobs: int
    prompt_logprobs: int
    n: int
    ctx_size: int
    n_keep: int
    n_discard: int
    grammar: Grammar


class TurnOptions(Sampling, total=False):
    """Of a turn in a session. `timeout` is in seconds, for the call and all its repetitions."""

    model: str
    speculation: bool
    priority: int
    timeout: float
    tools: Sequence[Mapping[str, Any]]
    """In OpenAI's form: {"type": "function", "function": {"name", "description", "parameters"}}."""
    tool_choice: str
    """auto, none, required, or the name of a function."""
    parallel_tool_calls: bool


class ChatOptions(TurnOptions, total=False):
    """Of a turn all of whose conversation is given."""

    session_id: str


class GenerateOptions(Sampling, total=False):
    """Of a plain prompt."""

    model: str
    speculation: bool
    priority: int
    timeout: float
    session_id: str


_SAMPLING = frozenset(Sampling.__annotations__)
_TOOLS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
_MODES = {
    "auto": pb.ToolChoice.MODE_AUTO,
    "none": pb.ToolChoice.MODE_NONE,
    "required": pb.ToolChoice.MODE_REQUIRED,
}


def chat_request(
    messages: Message | Sequence[Message], options: Mapping[str, Any], *, append: bool = False
) -> pb.ChatRequest:
    """Raises InvalidRequest for what no message of gRPC can hold, TypeError for an unknown option."""
    rest = _request_fields(options, ChatOptions)
    tools = {name: rest.pop(name) for name in _TOOLS & rest.keys()}
    with _Described():
        request = pb.ChatRequest(messages=messages_of(messages), sampling=sampling_of(options), append=append, **rest)
        request.tools.extend(_tool(tool) for tool in tools.get("tools", ()))
        if "tool_choice" in tools:
            choice = tools["tool_choice"]
            named = {"mode": _MODES[choice]} if choice in _MODES else {"function": choice}
            request.tool_choice.CopyFrom(pb.ToolChoice(**named))
        if "parallel_tool_calls" in tools:
            request.parallel_tool_calls = tools["parallel_tool_calls"]
    return request


def generate_request(prompt: Prompt, options: Mapping[str, Any]) -> pb.GenerateRequest:
    """Raises as `chat_request`."""
    rest = _request_fields(options, GenerateOptions)
    with _Described():
        given = {"text": prompt} if isinstance(prompt, str) else {"token_ids": pb.TokenIds(ids=prompt)}
        return pb.GenerateRequest(**given, sampling=sampling_of(options), **rest)


def sampling_of(options: Mapping[str, Any]) -> pb.SamplingParams:
    """The sampling parameters among the options."""
    fields = {name: value for name, value in options.items() if name in _SAMPLING and value is not None}
    if isinstance(fields.get("stop"), str):
        fields["stop"] = [fields["stop"]]
    if "grammar" in fields:
        fields["grammar"] = pb.Grammar(**{fields["grammar"].kind: fields["grammar"].source})
    return pb.SamplingParams(**fields)


def messages_of(messages: Message | Sequence[Message]) -> list[pb.Message]:
    """A conversation, or a single message."""
    if isinstance(messages, str | Mapping | ChatMessage):
        return [_message(messages)]
    return [_message(message) for message in messages]


def _message(message: Message) -> pb.Message:
    if isinstance(message, str):
        return pb.Message(role="user", content=message)
    if isinstance(message, ChatMessage):
        calls = [pb.ToolCall(id=call.call_id, name=call.name, arguments=call.arguments) for call in message.tool_calls]
        return pb.Message(
            role=message.role,
            content=message.content,
            name=message.name or "",
            tool_calls=calls,
            tool_call_id=message.tool_call_id or "",
        )
    known = {"role", "content", "name", "tool_calls", "tool_call_id"}
    if unknown := sorted(message.keys() - known):
        raise InvalidRequest(f"messages: unknown field {unknown[0]!r}", param="messages")
    fields = {name: value for name, value in message.items() if value is not None and name != "tool_calls"}
    return pb.Message(**fields, tool_calls=[_call(call) for call in message.get("tool_calls") or ()])


def _call(call: Mapping[str, Any]) -> pb.ToolCall:
    function = call["function"]
    return pb.ToolCall(id=call["id"], name=function["name"], arguments=function["arguments"])


def _tool(tool: Mapping[str, Any]) -> pb.Tool:
    function = tool["function"]
    parameters = function.get("parameters")
    return pb.Tool(
        name=function["name"],
        description=function.get("description") or "",
        parameters_json_schema="" if parameters is None else json.dumps(parameters),
        strict=bool(function.get("strict")),
    )


def _request_fields(options: Mapping[str, Any], known: Any) -> dict[str, Any]:
    """The options that are fields of the request itself. The time limit is set for each attempt."""
    names = known.__annotations__.keys()
    if unknown := sorted(options.keys() - names):
        raise TypeError(f"unknown option {unknown[0]!r}; one of {', '.join(sorted(names))}")
    own = options.keys() - _SAMPLING - {"timeout"}
    return {name: options[name] for name in own if options[name] is not None}


class _Described:
    """protobuf's errors about a value, as one a caller of ours expects."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if isinstance(error, KeyError):
            raise InvalidRequest(f"missing field {error}") from None
        if isinstance(error, TypeError | ValueError):
            raise InvalidRequest(str(error)) from None
