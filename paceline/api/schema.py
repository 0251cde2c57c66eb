"""What clients send: OpenAI's requests, strictly typed.

A field of OpenAI's that cannot change the result here is accepted. One that would, and is not supported, is
refused by its name unless it has the value that means "off". An unknown field is refused by its name.
"""

from __future__ import annotations

import json
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainValidator,
    ValidationInfo,
    field_validator,
)
from pydantic_core import PydanticCustomError

from paceline.api.prompts import ChatMessage
from paceline.types import SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` for /v1/completions."""


def _refused(reason: str) -> PydanticCustomError:
    return PydanticCustomError("refused", "{reason}", {"reason": reason})


def _only(*neutral: Any) -> AfterValidator:
    """The field has no effect with these values (and null), and is refused with any other."""

    def check(value: Any) -> Any:
        if value is None or any(value == off and isinstance(value, bool) == isinstance(off, bool) for off in neutral):
            return value
        raise _refused(
            f"not supported; leave it out or send {' or '.join(json.dumps(off) for off in (*neutral, None))}"
        )

    return AfterValidator(check)


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _text(content: Any) -> str:
    """A message's content; parts of type text are joined by line breaks, as other servers do."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise _refused("must be a string or a list of text parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise _refused(f'part {index} is not {{"type": "text", "text": …}}; only text is supported')
        texts.append(part["text"])
    return "\n".join(texts)


def _prompt(value: Any) -> str | list[int]:
    """A text or token ids."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise _refused("must be a string or a list of token ids")
    if any(isinstance(item, str | list) for item in value):
        raise _refused("a list of prompts is not supported; send one prompt a request")
    for index, item in enumerate(value):
        if isinstance(item, bool) or not isinstance(item, int):
            raise _refused(f"token ids must be integers; entry {index} is not")
    return value


Ignored = Annotated[Any, Field(description="Accepted; it cannot change the result.")]
Content = Annotated[str, PlainValidator(_text, json_schema_input_type=str | list[dict[str, str]])]
PromptField = Annotated[str | list[int], PlainValidator(_prompt, json_schema_input_type=str | list[int])]
Stop = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]


class Body(BaseModel):
    """Base: no coercion, no unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


class MessageParam(Body):
    """One message. A message this server sent can be sent back as it was."""

    role: str
    content: Content
    name: str | None = None
    refusal: Annotated[Any, _only("")] = None
    annotations: Annotated[Any, _only([])] = None
    audio: Annotated[Any, _only()] = None
    tool_calls: Annotated[Any, _only([])] = None
    tool_call_id: Annotated[Any, _only()] = None
    function_call: Annotated[Any, _only()] = None

    def message(self) -> ChatMessage:
        return ChatMessage(self.role, self.content, self.name)


class GenerationBody(Body):
    """The fields that both endpoints share."""

    model: str | None = Field(None, description="The model served, or nothing.")
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = Field(None, description="Fixes the output. None draws one, reported in the response.")
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Extensions.
    top_k: int | None = None
    min_p: float | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    session_id: str | None = Field(None, description="The KV cache to reuse and to leave behind.")
    speculation: bool | None = Field(None, description="Off: no drafts. The tokens are the same either way.")
    return_token_ids: bool | None = Field(None, description="Report token ids in the `paceline` object.")

    # OpenAI's, and not supported.
    n: Annotated[Any, _only(1)] = None
    presence_penalty: Annotated[Any, _only(0)] = None
    frequency_penalty: Annotated[Any, _only(0)] = None
    logit_bias: Annotated[Any, _only({})] = None

    # OpenAI's, and without effect on the result.
    user: Ignored = None
    metadata: Ignored = None
    store: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_options: Ignored = None
    prompt_cache_retention: Ignored = None

    @field_validator("stream_options")
    @classmethod
    def _only_with_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise _refused("only together with stream: true")
        return value

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def output_tokens(self) -> int | None:
        """The bound on the answer the client set."""
        return self.max_tokens

    def params(self) -> SamplingParams:
        """Sampling parameters; what is null has its default, and `max_tokens` None means up to the context.

        Raises InvalidRequest naming the field.
        """
        given = {
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "seed": self.seed,
            "stop": self.stop,
            "stop_token_ids": self.stop_token_ids,
            "ignore_eos": self.ignore_eos,
        }
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(max_tokens=self.output_tokens, **chosen)


class ChatCompletionRequest(GenerationBody):
    """Body of POST /v1/chat/completions."""

    messages: list[MessageParam]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    logprobs: Annotated[Any, _only(False)] = None
    top_logprobs: Annotated[Any, _only(0)] = None
    response_format: Annotated[Any, _only({"type": "text"})] = None
    tools: Annotated[Any, _only([])] = None
    tool_choice: Annotated[Any, _only("none", "auto")] = None
    functions: Annotated[Any, _only([])] = None
    function_call: Annotated[Any, _only("none", "auto")] = None
    modalities: Annotated[Any, _only(["text"])] = None
    audio: Annotated[Any, _only()] = None
    moderation: Annotated[Any, _only()] = None
    reasoning_effort: Annotated[Any, _only("none")] = None
    verbosity: Annotated[Any, _only()] = None
    web_search_options: Annotated[Any, _only()] = None
    parallel_tool_calls: Ignored = None
    prediction: Ignored = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_bound(cls, value: int | None, info: ValidationInfo) -> int | None:
        other = info.data.get("max_tokens")
        if value is not None and other is not None and value != other:
            raise _refused(f"contradicts max_tokens, which is {other}")
        return value

    @property
    def output_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(GenerationBody):
    """Body of POST /v1/completions."""

    prompt: PromptField

    logprobs: Annotated[Any, _only()] = None
    echo: Annotated[Any, _only(False)] = None
    best_of: Annotated[Any, _only(1)] = None
    suffix: Annotated[Any, _only("")] = None
