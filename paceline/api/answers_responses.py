"""What /v1/responses sends: OpenAI's response object, its output items, and the events of its stream."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import ConfigDict, Field, field_serializer

from paceline.api.answers import Answer, ChatTokenLogprob, PacelineInfo
from paceline.types import Metrics

Status = Literal["in_progress", "completed", "incomplete", "failed"]


class Told(Answer):
    """Sent with its nulls: OpenAI's clients expect these fields."""

    def json_bytes(self) -> bytes:
        return self.model_dump_json().encode()


class OutputText(Told):
    type: Literal["output_text"] = "output_text"
    text: str
    annotations: list[Any] = Field(default_factory=list)
    logprobs: list[ChatTokenLogprob] = Field(default_factory=list)


class OutputMessage(Told):
    type: Literal["message"] = "message"
    id: str
    status: Status
    role: Literal["assistant"] = "assistant"
    content: list[OutputText]


class FunctionCall(Told):
    """A call of one of the client's functions. `arguments` is JSON text as the model wrote it."""

    type: Literal["function_call"] = "function_call"
    id: str
    call_id: str
    name: str
    arguments: str
    status: Status


OutputItem = OutputMessage | FunctionCall


class InputTokensDetails(Told):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Told):
    reasoning_tokens: int = 0


class ResponseUsage(Told):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int

    @classmethod
    def of(cls, metrics: Metrics) -> ResponseUsage:
        return cls(
            input_tokens=metrics.prompt_tokens,
            input_tokens_details=InputTokensDetails(cached_tokens=metrics.cached_tokens),
            output_tokens=metrics.completion_tokens,
            output_tokens_details=OutputTokensDetails(),
            total_tokens=metrics.prompt_tokens + metrics.completion_tokens,
        )


class IncompleteDetails(Told):
    reason: Literal["max_output_tokens"] = "max_output_tokens"


class ResponseError(Told):
    code: str
    message: str


class ResponseObject(Told):
    """Answer of POST and GET /v1/responses."""

    id: str
    object: Literal["response"] = "response"
    created_at: float
    status: Status
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None = None
    max_output_tokens: int | None = None
    model: str
    output: list[OutputItem] = Field(default_factory=list)
    parallel_tool_calls: bool
    previous_response_id: str | None = None
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    top_logprobs: int
    truncation: Literal["disabled"] = "disabled"
    background: Literal[False] = False
    metadata: dict[str, str]
    usage: ResponseUsage | None = None
    paceline: PacelineInfo | None = None

    @field_serializer("paceline")
    def _without_nulls(self, value: PacelineInfo | None) -> dict[str, Any] | None:
        return None if value is None else value.model_dump(exclude_none=True)


class ResponseDeleted(Answer):
    object: Literal["response"] = "response"
    id: str
    deleted: Literal[True] = True


class ResponseEvent(Told):
    """One Server-Sent Event of a streamed response. Which other fields it has depends on its type, as in OpenAI's."""

    model_config = ConfigDict(frozen=True, extra="allow")

    type: str
    sequence_number: int
