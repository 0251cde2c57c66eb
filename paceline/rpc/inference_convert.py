"""Requests of inference.proto as Paceline's own types. What cannot be one is refused by its field."""

from __future__ import annotations

import math
from collections.abc import Sequence, Sized
from typing import Any, Literal

from paceline.errors import InvalidRequest, PacelineError
from paceline.sessions.history import ChatMessage, ToolCall
from paceline.types import Grammar, SamplingParams
from paceline.v1 import inference_pb2 as pb

MAX_MESSAGES = 1 << 16
"""In one request. Far more fit into one of the largest size, and would take seconds to look at; the gateway's own bound
(`limits.max_messages`) is lower."""
MAX_TOKEN_IDS = 1 << 20
"""In one list. The model's context is a closer bound, for who gets so far."""

FIELDS = {"response_format": "grammar", "replica": "replica_id"}
"""Names that the gateway has from HTTP, and the proto's."""
TIMEOUT_KEY = "x-request-timeout"
"""Invocation metadata that stands in for the field `timeout_seconds`."""
MAX_DRAIN_S = 600.0

_OPTIONAL_PARAMS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "logprobs",
    "prompt_logprobs",
    "n",
    "ctx_size",
    "n_keep",
    "n_discard",
)


def params_from(message: pb.SamplingParams) -> SamplingParams:
    """Sampling parameters; an unset field has its default, an unset `max_tokens` means up to the context."""
    given: dict[str, Any] = {name: getattr(message, name) for name in _OPTIONAL_PARAMS if message.HasField(name)}
    bounded("stop_token_ids", message.stop_token_ids, MAX_TOKEN_IDS)
    bounded("logit_bias", message.logit_bias, MAX_TOKEN_IDS)
    return SamplingParams(
        **{"max_tokens": None, **given},
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logit_bias=dict(message.logit_bias),
        min_tokens=message.min_tokens,
        include_stop_str_in_output=message.include_stop_str_in_output,
        grammar=grammar_from(message),
    )


def grammar_from(message: pb.SamplingParams) -> Grammar | None:
    """What the output must be a text of. Raises InvalidRequest if a grammar is sent with nothing in it."""
    if not message.HasField("grammar"):
        return None
    kind: Literal["json_schema", "regex", "lark"] | None = message.grammar.WhichOneof("source")
    if kind is None:
        raise InvalidRequest("grammar: set json_schema, regex or lark", param="grammar")
    return Grammar(kind, getattr(message.grammar, kind))


def messages_from(messages: Sequence[pb.Message]) -> list[ChatMessage]:
    """A conversation. Empty strings stand for what a message does not have. Raises InvalidRequest for too many."""
    bounded("messages", messages, MAX_MESSAGES)
    return [
        ChatMessage(
            message.role,
            message.content,
            message.name or None,
            tuple(ToolCall(call.id, call.name, call.arguments) for call in message.tool_calls),
            message.tool_call_id or None,
        )
        for message in messages
    ]


def prompt_from(message: pb.GenerateRequest) -> str | tuple[int, ...]:
    """The text or the token ids. Raises InvalidRequest if there is neither."""
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "token_ids":
            return ids_from("prompt", message.token_ids.ids)
        case _:
            raise InvalidRequest("prompt: set text or token_ids", param="prompt")


def input_from(message: pb.TokenizeRequest) -> str | list[ChatMessage]:
    """The text or the messages. Raises InvalidRequest if there is neither."""
    match message.WhichOneof("input"):
        case "text":
            return message.text
        case "messages":
            return messages_from(message.messages.messages)
        case _:
            raise InvalidRequest("input: set text or messages", param="input")


def speculation_from(message: pb.ChatRequest | pb.GenerateRequest) -> bool:
    return message.speculation if message.HasField("speculation") else True


def ids_from(param: str, ids: Sequence[int]) -> tuple[int, ...]:
    """Token ids as they were sent. Raises InvalidRequest for too many."""
    bounded(param, ids, MAX_TOKEN_IDS)
    return tuple(ids)


def timeout_from(message: pb.ChatRequest | pb.GenerateRequest, metadata: str | None) -> float | None:
    """The client's own limit in seconds: the field's, else the metadata's `x-request-timeout`; None if it has none.

    Raises InvalidRequest.
    """
    named, given = "timeout_seconds", message.timeout_seconds if message.HasField("timeout_seconds") else None
    if given is None and metadata is not None:
        named = TIMEOUT_KEY
        try:
            given = float(metadata)
        except ValueError:
            given = math.nan
    if given is not None and not (given > 0 and math.isfinite(given)):
        raise InvalidRequest(f"{named}: must be a number of seconds above 0", param=named)
    return given


def drain_timeout_from(message: pb.DrainRequest) -> float | None:
    """How long to wait for turns under way, in seconds; None leaves it to the server. Raises InvalidRequest."""
    if not message.HasField("timeout_seconds"):
        return None
    if not 0 <= message.timeout_seconds <= MAX_DRAIN_S:
        raise InvalidRequest(f"timeout_seconds: must be from 0 to {MAX_DRAIN_S:g}", param="timeout_seconds")
    return message.timeout_seconds


def in_own_words(error: PacelineError) -> PacelineError:
    """The error with the field's name as the proto has it."""
    if error.param not in FIELDS:
        return error
    named, rest = FIELDS[error.param], error.message.removeprefix(error.param)
    message = f"{named}{rest}" if rest != error.message else rest
    return type(error)(message, param=named, retry_after=error.retry_after)


def bounded(param: str, items: Sized, limit: int) -> None:
    """Raise InvalidRequest if there are more."""
    if len(items) > limit:
        raise InvalidRequest(f"{param}: at most {limit} entries, got {len(items)}", param=param)
