"""What clients send to /v1/responses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, ValidationInfo, field_validator

from paceline.api.fields import Body, Content, Ignored, Logprobs, Priority, Stop, only, refused
from paceline.api.prompts import ChatMessage
from paceline.api.schema_tools import ANY_OBJECT, FunctionName, FunctionParam, tool_use
from paceline.api.tools import Tool, ToolUse, as_json
from paceline.errors import InvalidRequest
from paceline.sessions.history import ToolCall
from paceline.types import Grammar, SamplingParams

MAX_METADATA, MAX_METADATA_KEY, MAX_METADATA_VALUE = 16, 64, 512
"""OpenAI's bounds: pairs, and characters of each."""
LOGPROBS = "message.output_text.logprobs"


class MessageItem(Body):
    """A message of the conversation, new or as it was sent."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Ignored = None
    status: Ignored = None
    phase: Ignored = None


class FunctionCallItem(Body):
    """A call as this server sent it."""

    type: Literal["function_call"]
    call_id: Annotated[str, Field(min_length=1, max_length=256)]
    name: FunctionName
    arguments: str
    id: Ignored = None
    status: Ignored = None
    namespace: Annotated[Any, only()] = None
    caller: Annotated[Any, only()] = None


class FunctionOutputItem(Body):
    """What a call gave."""

    type: Literal["function_call_output"]
    call_id: Annotated[str, Field(min_length=1, max_length=256)]
    output: Content
    id: Ignored = None
    status: Ignored = None
    caller: Annotated[Any, only()] = None


_ITEMS: dict[Any, type[MessageItem | FunctionCallItem | FunctionOutputItem]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionOutputItem,
}


def _item(value: Any) -> MessageItem | FunctionCallItem | FunctionOutputItem:
    """By its type, so that an error names a field of that type alone. One without a type is a message."""
    kind = value.get("type", "message") if isinstance(value, dict) else None
    if not isinstance(kind, str) or kind not in _ITEMS:
        raise refused(f"of no known type; one of {', '.join(_ITEMS)}")
    return _ITEMS[kind].model_validate(value)


InputItem = Annotated[
    MessageItem | FunctionCallItem | FunctionOutputItem,
    PlainValidator(_item, json_schema_input_type=MessageItem | FunctionCallItem | FunctionOutputItem),
]


class ResponseTool(Body):
    """One of `tools`. Only functions are known here."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    defer_loading: Annotated[Any, only(False)] = None
    allowed_callers: Annotated[Any, only()] = None
    output_schema: Annotated[Any, only()] = None

    def tool(self) -> Tool:
        function = FunctionParam(
            name=self.name, description=self.description, parameters=self.parameters, strict=self.strict
        )
        return function.tool()


class NamedResponseTool(Body):
    """The value of `tool_choice` that names the function to call."""

    type: Literal["function"]
    name: str


class TextFormat(Body):
    """Text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"]
    name: FunctionName | None = None
    description: str | None = None
    strict: bool | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    def grammar(self) -> Grammar | None:
        """Raises InvalidRequest for a schema that is missing, or has no place here."""
        if (self.type == "json_schema") != (self.schema_ is not None):
            field = "text.format.schema"
            raise InvalidRequest(f"{field}: required with type json_schema, and only with it", param=field)
        if self.type == "text":
            return None
        return ANY_OBJECT if self.schema_ is None else Grammar("json_schema", as_json(self.schema_))


class TextParam(Body):
    format: TextFormat | None = None
    verbosity: Annotated[Any, only("medium")] = None


class ResponseStreamOptions(Body):
    include_obfuscation: Ignored = None


class ResponsesRequest(Body):
    """Body of POST /v1/responses."""

    model: str | None = Field(None, description="The model served, or nothing.")
    input: Annotated[list[InputItem], Field(min_length=1)] = Field(
        description="A text of the user, or what was said: messages, calls and their outputs."
    )
    instructions: str | None = Field(None, description="A system message of this response alone.")
    previous_response_id: str | None = Field(None, description="Go on from there; `input` is only what is new.")
    store: bool | None = Field(None, description="False: the response cannot be asked for or gone on from.")
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextParam | None = Field(None, description="What the output must be a text of.")
    tools: list[ResponseTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedResponseTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")
    include: list[str] | None = Field(None, description=f"Only {LOGPROBS}.")
    top_logprobs: Logprobs | None = Field(None, description=f"Only with {LOGPROBS} in include.")
    metadata: dict[str, str] | None = Field(None, description="Kept, and sent back.")
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None

    # Extensions.
    seed: int | None = Field(None, description="Fixes the output. None draws one, reported in the response.")
    stop: Stop | None = None
    top_k: int | None = None
    min_p: float | None = None
    speculation: bool | None = Field(None, description="Off: no drafts. The tokens are the same either way.")
    priority: Priority | None = Field(None, description="Lower goes first, if the server schedules by priority.")

    # OpenAI's, and only with the values that say what is done anyway.
    background: Annotated[Any, only(False)] = None
    background_options: Annotated[Any, only()] = None
    conversation: Annotated[Any, only(instead="use previous_response_id")] = None
    context_management: Annotated[Any, only([])] = None
    truncation: Annotated[Any, only("disabled")] = None
    prompt: Annotated[Any, only(instead="send its text as input")] = None
    reasoning: Annotated[Any, only({}, {"effort": "none"})] = None
    moderation: Annotated[Any, only()] = None
    access_programs: Annotated[Any, only([])] = None
    image: Annotated[Any, only()] = None

    # OpenAI's, and without effect on the result.
    max_tool_calls: Ignored = None
    user: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None

    @field_validator("input", mode="before")
    @classmethod
    def _text_of_the_user(cls, value: Any) -> Any:
        return [{"role": "user", "content": value}] if isinstance(value, str) else value

    @field_validator("include")
    @classmethod
    def _known(cls, value: list[str] | None) -> list[str] | None:
        for entry in value or ():
            if entry != LOGPROBS:
                raise refused(f"{entry!r} is not supported; only {LOGPROBS}")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("include"):
            raise refused(f"only with {LOGPROBS} in include")
        return value

    @field_validator("metadata")
    @classmethod
    def _small(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        pairs = value or {}
        long = any(len(key) > MAX_METADATA_KEY or len(text) > MAX_METADATA_VALUE for key, text in pairs.items())
        if long or len(pairs) > MAX_METADATA:
            raise refused(
                f"at most {MAX_METADATA} keys of {MAX_METADATA_KEY} characters with values of {MAX_METADATA_VALUE}"
            )
        return value

    def messages(self) -> list[ChatMessage]:
        """The input as messages of a chat. Calls belong to the assistant's message before them."""
        said: list[ChatMessage] = []
        for item in self.input:
            if isinstance(item, MessageItem):
                said.append(ChatMessage(item.role, item.content))
            elif isinstance(item, FunctionOutputItem):
                said.append(ChatMessage("tool", item.output, tool_call_id=item.call_id))
            else:
                call = ToolCall(item.call_id, item.name, item.arguments)
                last = said.pop() if said and said[-1].role == "assistant" else ChatMessage("assistant", "")
                said.append(ChatMessage("assistant", last.content, tool_calls=(*last.tool_calls, call)))
        return said

    def params(self) -> SamplingParams:
        """Sampling parameters; `max_tokens` None means up to the context. Raises InvalidRequest naming the field."""
        names = ("temperature", "top_p", "seed", "stop", "top_k", "min_p")
        chosen: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        form = self.text.format if self.text is not None else None
        return SamplingParams(
            max_tokens=self.max_output_tokens,
            logprobs=(self.top_logprobs or 0) if self.include else None,
            grammar=None if form is None else form.grammar(),
            **chosen,
        )

    def tool_use(self) -> ToolUse:
        """The functions that may be called. Raises InvalidRequest."""
        tools: list[Tool] = [each.tool() for each in self.tools or ()]
        named = self.tool_choice.name if isinstance(self.tool_choice, NamedResponseTool) else None
        choice = None if isinstance(self.tool_choice, NamedResponseTool) else self.tool_choice
        return tool_use(tools, choice, named, self.parallel_tool_calls)

    def check(self) -> None:
        """Raise InvalidRequest for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options: only together with stream: true", param="stream_options")
