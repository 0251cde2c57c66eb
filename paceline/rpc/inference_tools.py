"""The client's functions over gRPC: what a request says of them, and the calls in its answers."""

from __future__ import annotations

import json
import re
from dataclasses import replace

from paceline.api.prompts import shown
from paceline.api.schema_tools import tool_use
from paceline.api.tally import Readers
from paceline.api.tool_parsing import Arguments, CallBegins, Content, ToolCallReader
from paceline.api.tools import NO_PARAMETERS, Tool, ToolChoice, ToolUse
from paceline.errors import InvalidRequest
from paceline.rpc.inference_events import delta_events
from paceline.sessions.history import ChatMessage
from paceline.types import Delta, FinishReason, Metrics, Request, SamplingParams
from paceline.v1 import inference_pb2 as pb

MAX_DEPTH = 64
"""Objects and lists in each other in the schema of a function's parameters."""

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_CHOICES: dict[int, ToolChoice] = {pb.ToolChoice.MODE_NONE: "none", pb.ToolChoice.MODE_REQUIRED: "required"}


def tools_from(message: pb.ChatRequest, params: SamplingParams) -> ToolUse:
    """The functions that may be called. Raises InvalidRequest."""
    tools = [_tool(f"tools.{index}", tool) for index, tool in enumerate(message.tools)]
    if tools and params.grammar is not None and params.grammar.kind != "json_schema":
        raise InvalidRequest("grammar: together with tools only a json_schema", param="grammar")
    chosen = message.tool_choice
    named = chosen.function if chosen.WhichOneof("choice") == "function" else None
    parallel = message.parallel_tool_calls if message.HasField("parallel_tool_calls") else None
    return tool_use(tools, _CHOICES.get(chosen.mode), named, parallel)


def says_of_tools(message: pb.ChatRequest) -> bool:
    """Whether it says anything: a turn that does not has the tools of the one before."""
    return bool(message.tools) or message.HasField("tool_choice")


def check_calls(messages: list[ChatMessage]) -> None:
    """Raises InvalidRequest for calls and results where none can be."""
    for index, message in enumerate(messages):
        if message.tool_calls and message.role != "assistant":
            field = f"messages.{index}.tool_calls"
            raise InvalidRequest(f"{field}: only in a message of role assistant", param=field)
        if message.tool_call_id is not None and message.role != "tool":
            field = f"messages.{index}.tool_call_id"
            raise InvalidRequest(f"{field}: only in a message of role tool", param=field)
        for place, call in enumerate(message.tool_calls):
            _check_name(f"messages.{index}.tool_calls.{place}.name", call.name)


class EventWriter:
    """The events of one request's deltas. With `readers`, calls of functions are found in the text and told apart."""

    def __init__(self, request: Request, readers: Readers | None) -> None:
        self._prompt_tokens = len(request.token_ids)
        self._generated = [0] * request.params.n
        self._readers = [None if readers is None else readers(request, index) for index in range(request.params.n)]

    def events(self, delta: Delta) -> list[pb.GenerateEvent]:
        self._generated[delta.index] += len(delta.token_ids)
        counted = Metrics(prompt_tokens=self._prompt_tokens, completion_tokens=self._generated[delta.index])
        reader = self._readers[delta.index]
        return delta_events(delta, counted) if reader is None else _with_calls(delta, counted, reader)


def _with_calls(delta: Delta, counted: Metrics, reader: ToolCallReader) -> list[pb.GenerateEvent]:
    found = reader.push(delta.text)
    if delta.finished:
        found += reader.finish()
    text = "".join(each.text for each in found if isinstance(each, Content))
    calls = [_piece(delta.index, each) for each in found if not isinstance(each, Content)]
    # Which of the characters were candidates cannot be said of a text without its calls.
    verified = delta.verified if text == delta.text else None
    events = delta_events(replace(delta, text=text, verified=verified), counted)
    if delta.finish_reason is FinishReason.STOP and reader.count:
        events[-1].finished.reason = pb.FINISH_REASON_TOOL_CALLS
    at = len(events) - delta.finished
    return [*events[:at], *calls, *events[at:]]


def _piece(index: int, event: CallBegins | Arguments) -> pb.GenerateEvent:
    if isinstance(event, CallBegins):
        piece = pb.ToolCallDelta(index=index, call=event.index, id=event.call_id, name=event.name)
    else:
        piece = pb.ToolCallDelta(index=index, call=event.index, arguments=event.text)
    return pb.GenerateEvent(tool_call=piece)


def _tool(field: str, tool: pb.Tool) -> Tool:
    _check_name(f"{field}.name", tool.name)
    parameters = tool.parameters_json_schema
    return Tool(
        tool.name,
        tool.description,
        _schema(f"{field}.parameters_json_schema", parameters) if parameters else NO_PARAMETERS,
        tool.strict,
    )


def _check_name(field: str, name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"{field}: {shown(name)} is not 1 to 64 letters, digits, dots, _ and -", param=field)


def _schema(field: str, text: str) -> str:
    """A JSON object as JSON, if it is one that everybody who follows can write down."""
    if text.count("{") + text.count("[") > MAX_DEPTH and _depth(text) > MAX_DEPTH:
        raise InvalidRequest(f"{field}: more than {MAX_DEPTH} objects and lists in each other", param=field)
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except ValueError:
        raise InvalidRequest(f"{field}: not JSON", param=field) from None
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{field}: must be a JSON object", param=field)
    return json.dumps(schema, ensure_ascii=False)


def _depth(text: str) -> int:
    """Brackets in each other, at most; those within strings count as well, which nobody has so many of."""
    deepest = depth = 0
    for char in text:
        depth += (char in "{[") - (char in "}]")
        deepest = max(deepest, depth)
    return deepest


def _no_constant(name: str) -> float:
    raise ValueError(name)
