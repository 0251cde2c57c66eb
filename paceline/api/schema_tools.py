"""What clients send about messages, functions and the form of the answer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from paceline.api.fields import Body, Content, Ignored, only, refused
from paceline.api.prompts import ChatMessage
from paceline.api.tools import NO_PARAMETERS, Tool, ToolChoice, ToolUse, as_json
from paceline.errors import InvalidRequest
from paceline.sessions.history import ToolCall
from paceline.types import Grammar

FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
ANY_OBJECT = Grammar("json_schema", '{"type": "object"}')
MAX_TOOLS = 128


class FunctionParam(Body):
    """A function the model may call. `parameters` is a JSON Schema; null takes none."""

    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    def tool(self) -> Tool:
        parameters = NO_PARAMETERS if self.parameters is None else as_json(self.parameters)
        return Tool(self.name, self.description or "", parameters, self.strict is True)


class ToolParam(Body):
    """One of `tools`. Only functions are known here."""

    type: Literal["function"]
    function: FunctionParam


class NamedFunction(Body):
    name: str


class NamedTool(Body):
    """The value of `tool_choice` that names the function to call."""

    type: Literal["function"]
    function: NamedFunction


class CalledFunctionParam(Body):
    name: FunctionName
    arguments: str
    parsed_arguments: Ignored = None


class ToolCallParam(Body):
    """A call as this server sent it."""

    id: Annotated[str, Field(min_length=1, max_length=256)]
    type: Literal["function"] = "function"
    index: Ignored = None
    function: CalledFunctionParam

    def call(self) -> ToolCall:
        return ToolCall(self.id, self.function.name, self.function.arguments)


class MessageParam(Body):
    """One message. A message this server sent can be sent back as it was, or as OpenAI's client made it: with what it
    parsed."""

    role: str
    name: str | None = None
    tool_calls: list[ToolCallParam] | None = None
    tool_call_id: str | None = Field(None, description="Of a message of role tool: the call it answers.")
    content: Content | None = Field(None, validate_default=True)
    refusal: Annotated[Any, only("")] = None
    annotations: Annotated[Any, only([])] = None
    audio: Annotated[Any, only()] = None
    function_call: Annotated[Any, only(instead="use tool_calls")] = None
    reasoning_content: Ignored = None
    parsed: Ignored = None

    @field_validator("tool_calls")
    @classmethod
    def _of_an_answer(cls, value: list[ToolCallParam] | None, info: ValidationInfo) -> list[ToolCallParam] | None:
        if value and info.data.get("role") != "assistant":
            raise refused("only in a message of role assistant")
        return value

    @field_validator("tool_call_id")
    @classmethod
    def _of_a_result(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is not None and info.data.get("role") != "tool":
            raise refused("only in a message of role tool")
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _said(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and not info.data.get("tool_calls"):
            raise refused("required, unless the message has tool_calls")
        return value

    def message(self) -> ChatMessage:
        calls = tuple(call.call() for call in self.tool_calls or ())
        return ChatMessage(self.role, self.content or "", self.name, calls, self.tool_call_id)


class JSONSchemaParam(Body):
    """`schema` None is any object. The output keeps to the schema, strict or not."""

    name: FunctionName
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """Text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JSONSchemaParam | None = Field(None, validate_default=True)

    @field_validator("json_schema")
    @classmethod
    def _where_it_belongs(cls, value: JSONSchemaParam | None, info: ValidationInfo) -> JSONSchemaParam | None:
        if (info.data.get("type") == "json_schema") != (value is not None):
            raise refused("required with type json_schema, and only with it")
        return value

    def grammar(self) -> Grammar | None:
        if self.type == "text":
            return None
        schema = None if self.json_schema is None else self.json_schema.schema_
        return ANY_OBJECT if schema is None else Grammar("json_schema", as_json(schema))


class StructuredOutputs(Body):
    """What the output must be, in vLLM's words; exactly one of them. `grammar` is in llguidance's Lark."""

    json_: dict[str, Any] | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: Annotated[list[str], Field(min_length=1)] | None = None
    grammar: str | None = None
    json_object: bool | None = None

    def constraint(self) -> Grammar:
        """Raises InvalidRequest unless there is exactly one."""
        choice = None if self.choice is None else "start: " + " | ".join(map(as_json, self.choice))
        schema = self.json_ if self.json_ is None or isinstance(self.json_, str) else as_json(self.json_)
        found = [Grammar("json_schema", schema)] if schema is not None else []
        found += [Grammar("regex", self.regex)] if self.regex is not None else []
        found += [Grammar("lark", source) for source in (choice, self.grammar) if source is not None]
        found += [ANY_OBJECT] if self.json_object else []
        if len(found) != 1:
            raise InvalidRequest(
                "structured_outputs: exactly one of json, regex, choice, grammar and json_object: true",
                param="structured_outputs",
            )
        return found[0]


def tool_use(tools: list[Tool], choice: ToolChoice | None, named: str | None, parallel: bool | None) -> ToolUse:
    """The functions of a request. Raises InvalidRequest if they do not fit each other."""
    if len(tools) > MAX_TOOLS:
        raise InvalidRequest(f"tools: at most {MAX_TOOLS}, got {len(tools)}", param="tools")
    names = [tool.name for tool in tools]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InvalidRequest(f"tools: two functions are named {twice!r}", param="tools")
    if not tools and (named is not None or choice == "required"):
        raise InvalidRequest("tool_choice: needs tools to choose from", param="tool_choice")
    if named is not None and named not in names:
        raise InvalidRequest(f"tool_choice: no function {named!r} among tools", param="tool_choice")
    if named is not None:
        return ToolUse(tuple(tools), "required", named, parallel=False)
    return ToolUse(tuple(tools), choice or "auto", parallel=parallel is not False)
