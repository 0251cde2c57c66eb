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
from paceline.types import MAX_LOGPROBS, MAX_PRIORITY, SamplingParams

DEFAULT_COMPLETION_TOKENS = 16
"""OpenAI's default of `max_tokens` for /v1/completions."""

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "min_tokens",
    "include_stop_str_in_output",
    "n",
    "ctx_size",
    "n_keep",
    "n_discard",
)
"""Fields of the body that are sampling parameters by the same name and meaning."""


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


def _bias(value: Any) -> dict[int, float]:
    """Token id to bias; JSON's keys are strings."""
    if not isinstance(value, dict):
        raise _refused("must be an object of token ids to numbers")
    found = {}
    for token, bias in value.items():
        if not str(token).isdecimal():
            raise _refused(f"{token!r} is not a token id")
        found[int(token)] = bias
    return found


Ignored = Annotated[Any, Field(description="Accepted; it cannot change the result.")]
Content = Annotated[str, PlainValidator(_text, json_schema_input_type=str | list[dict[str, str]])]
PromptField = Annotated[str | list[int], PlainValidator(_prompt, json_schema_input_type=str | list[int])]
Stop = Annotated[list[str], BeforeValidator(_as_list, json_schema_input_type=str | list[str])]

LogitBias = Annotated[dict[int, float], PlainValidator(_bias, json_schema_input_type=dict[str, float])]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]
Priority = Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY)]


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
    n: int | None = Field(None, description="Choices. The first is that of n = 1, the others have derived seeds.")
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: LogitBias | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Extensions.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = Field(None, description="Over prompt and output; 1 is off.")
    min_tokens: int | None = Field(None, description="Neither end nor stop before so many tokens.")
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    session_id: str | None = Field(None, description="The KV cache to reuse and to leave behind.")
    speculation: bool | None = Field(None, description="Off: no drafts. The tokens are the same either way.")
    ctx_size: int | None = Field(None, description="Streaming window: the text may grow for ever. 0 is off.")
    n_keep: int | None = Field(None, description="First tokens the window never drops.")
    n_discard: int | None = Field(None, description="Tokens it drops at a time; -1 is half.")
    priority: Priority | None = Field(None, description="Lower goes first, if the server schedules by priority.")
    return_token_ids: bool | None = Field(
        None, description="Report token ids in the `paceline` object, and which of a chunk's text was guessed."
    )

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
        given = {name: getattr(self, name) for name in _SAMPLING} | self.reported()
        chosen: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
        return SamplingParams(max_tokens=self.output_tokens, **chosen)

    def reported(self) -> dict[str, int | None]:
        """`logprobs` and `prompt_logprobs`, as the engine means them."""
        return {}


class ChatCompletionRequest(GenerationBody):
    """Body of POST /v1/chat/completions."""

    messages: list[MessageParam]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None

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

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise _refused("only together with logprobs: true")
        return value

    @property
    def output_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def reported(self) -> dict[str, int | None]:
        return {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}


class CompletionRequest(GenerationBody):
    """Body of POST /v1/completions."""

    prompt: PromptField

    logprobs: Logprobs | None = Field(None, description="Likeliest tokens told beside each token of the output.")
    prompt_logprobs: Logprobs | None = Field(None, description="The same for the prompt. An extension.")

    echo: Annotated[Any, _only(False)] = None
    best_of: Annotated[Any, _only(1)] = None
    suffix: Annotated[Any, _only("")] = None

    def reported(self) -> dict[str, int | None]:
        return {"logprobs": self.logprobs, "prompt_logprobs": self.prompt_logprobs}


class CreateSessionBody(Body):
    """Body of POST /v1/sessions."""

    session_id: str | None = Field(None, description="Its name; one is made up if there is none.")
    messages: list[MessageParam] | None = Field(None, description="What was said already.")
    seed: int | None = Field(None, description="Of every appended turn that has none of its own.")


class ForkSessionBody(Body):
    """Body of POST /v1/sessions/{id}/fork."""

    session_id: str | None = Field(None, description="The fork's name; one is made up if there is none.")


class MoveSessionBody(Body):
    """Body of POST /v1/sessions/{id}/move."""

    replica: str | None = Field(None, description="The target replica to take its KV; one is chosen if there is none.")


class RelieveBody(Body):
    """Body of POST /v1/replicas/{id}/relieve."""

    sessions: Annotated[int, Field(ge=1)] = Field(description="How many to hand to other replicas, at most.")
