"""What clients send: OpenAI's requests, strictly typed.

A field of OpenAI's that cannot change the result here is accepted. One that would, and is not supported, is
refused by its name unless it has the value that means "off". An unknown field is refused by its name.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from paceline.api.fields import Body, Ignored, LogitBias, Logprobs, Priority, Prompts, Stop, only, refused
from paceline.api.schema_tools import (
    MessageParam,
    NamedTool,
    ResponseFormat,
    StructuredOutputs,
    ToolParam,
    tool_use,
)
from paceline.api.tools import ToolUse
from paceline.errors import InvalidRequest
from paceline.types import Grammar, SamplingParams

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


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Ignored = None


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
    response_format: ResponseFormat | None = Field(None, description="What the output must be a text of.")

    # Extensions.
    structured_outputs: StructuredOutputs | None = Field(None, description="The same in vLLM's words.")
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

    # vLLM's, and only with the values that say what is done anyway.
    skip_special_tokens: Annotated[Any, only(True)] = None
    spaces_between_special_tokens: Ignored = None
    detokenize: Annotated[Any, only(True)] = None
    use_beam_search: Annotated[Any, only(False)] = None
    length_penalty: Annotated[Any, only(1, 1.0)] = None
    allowed_token_ids: Annotated[Any, only([], instead="use structured_outputs")] = None
    bad_words: Annotated[Any, only([])] = None
    truncate_prompt_tokens: Annotated[Any, only(instead="use ctx_size")] = None
    add_special_tokens: Annotated[Any, only()] = None
    guided_json: Annotated[Any, only(instead="use structured_outputs.json")] = None
    guided_regex: Annotated[Any, only(instead="use structured_outputs.regex")] = None
    guided_choice: Annotated[Any, only(instead="use structured_outputs.choice")] = None
    guided_grammar: Annotated[Any, only(instead="use structured_outputs.grammar")] = None

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
            raise refused("only together with stream: true")
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
        return SamplingParams(max_tokens=self.output_tokens, grammar=self.grammar(), **chosen)

    def grammar(self) -> Grammar | None:
        """What the output must be a text of, if anything."""
        wanted = None if self.response_format is None else self.response_format.grammar()
        if self.structured_outputs is None:
            return wanted
        if wanted is not None:
            raise InvalidRequest("structured_outputs: contradicts response_format", param="structured_outputs")
        return self.structured_outputs.constraint()

    def reported(self) -> dict[str, int | None]:
        """`logprobs` and `prompt_logprobs`, as the engine means them."""
        return {}


class ChatCompletionRequest(GenerationBody):
    """Body of POST /v1/chat/completions."""

    messages: list[MessageParam]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None

    tools: list[ToolParam] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = Field(None, description="False: at most one call.")
    functions: Annotated[Any, only([], instead="use tools")] = None
    function_call: Annotated[Any, only("none", "auto", instead="use tool_choice")] = None
    add_generation_prompt: Annotated[Any, only(True)] = None
    continue_final_message: Annotated[Any, only(False)] = None
    chat_template: Annotated[Any, only()] = None
    chat_template_kwargs: Annotated[Any, only({})] = None
    documents: Annotated[Any, only([])] = None
    modalities: Annotated[Any, only(["text"])] = None
    audio: Annotated[Any, only()] = None
    moderation: Annotated[Any, only()] = None
    reasoning_effort: Annotated[Any, only("none")] = None
    verbosity: Annotated[Any, only()] = None
    web_search_options: Annotated[Any, only()] = None
    prediction: Ignored = None

    @field_validator("max_completion_tokens")
    @classmethod
    def _one_bound(cls, value: int | None, info: ValidationInfo) -> int | None:
        other = info.data.get("max_tokens")
        if value is not None and other is not None and value != other:
            raise refused(f"contradicts max_tokens, which is {other}")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _only_with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise refused("only together with logprobs: true")
        return value

    @property
    def output_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def reported(self) -> dict[str, int | None]:
        return {"logprobs": (self.top_logprobs or 0) if self.logprobs else None}

    def tool_use(self) -> ToolUse:
        """The functions that may be called. Raises InvalidRequest."""
        tools = [each.function.tool() for each in self.tools or ()]
        if tools and self.structured_outputs is not None:
            raise InvalidRequest(
                "structured_outputs: not together with tools; use response_format", param="structured_outputs"
            )
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        choice = None if isinstance(self.tool_choice, NamedTool) else self.tool_choice
        return tool_use(tools, choice, named, self.parallel_tool_calls)


class CompletionRequest(GenerationBody):
    """Body of POST /v1/completions."""

    prompt: Prompts = Field(description="One or several; the choices of the first come first.")
    max_tokens: Annotated[int, Field(ge=0)] | None = Field(None, description="0 only with echo.")

    logprobs: Logprobs | None = Field(None, description="Likeliest tokens told beside each token of the output.")
    prompt_logprobs: Logprobs | None = Field(None, description="The same for the prompt. An extension.")
    echo: bool | None = Field(None, description="Begin each choice with its prompt, in logprobs too.")

    best_of: int | None = Field(None, description="Only if it is n: nothing is generated to be thrown away.")
    suffix: Annotated[Any, only("")] = None

    @field_validator("best_of")
    @classmethod
    def _as_many(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value not in (None, info.data.get("n") or 1):
            raise refused("not supported; leave it out or send n")
        return value

    @property
    def output_tokens(self) -> int | None:
        """The engine generates at least one token, which the answer then leaves out."""
        return 1 if self.max_tokens == 0 and self.echo else self.max_tokens

    def reported(self) -> dict[str, int | None]:
        """With echo the prompt's tokens are told as the output's are."""
        told = self.prompt_logprobs
        if self.echo and self.logprobs is not None:
            told = max(self.logprobs, told or 0)
        return {"logprobs": self.logprobs, "prompt_logprobs": told}
