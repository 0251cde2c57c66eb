"""Between the messages of inference.proto and Paceline's own types."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from paceline.api.prompts import ChatMessage
from paceline.api.state import SessionInfo
from paceline.errors import InvalidRequest
from paceline.types import Accepted, Delta, FinishReason, Metrics, Request, SamplingParams, TokenLogprobs
from paceline.v1 import inference_pb2 as pb

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

_REASONS = {
    FinishReason.STOP: pb.FINISH_REASON_STOP,
    FinishReason.LENGTH: pb.FINISH_REASON_LENGTH,
    FinishReason.ABORT: pb.FINISH_REASON_ABORT,
}


def params_from(message: pb.SamplingParams) -> SamplingParams:
    """Sampling parameters; an unset field has its default, an unset `max_tokens` means up to the context."""
    given: dict[str, Any] = {name: getattr(message, name) for name in _OPTIONAL_PARAMS if message.HasField(name)}
    return SamplingParams(
        **{"max_tokens": None, **given},
        stop=tuple(message.stop),
        stop_token_ids=tuple(message.stop_token_ids),
        ignore_eos=message.ignore_eos,
        logit_bias=dict(message.logit_bias),
        min_tokens=message.min_tokens,
        include_stop_str_in_output=message.include_stop_str_in_output,
    )


def messages_from(messages: Iterable[pb.Message]) -> list[ChatMessage]:
    return [ChatMessage(message.role, message.content) for message in messages]


def prompt_from(message: pb.GenerateRequest) -> str | tuple[int, ...]:
    """The text or the token ids. Raises InvalidRequest if there is neither."""
    match message.WhichOneof("prompt"):
        case "text":
            return message.text
        case "token_ids":
            return tuple(message.token_ids.ids)
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


def started_event(request: Request, accepted: Accepted, synthetic_acceptance: float | None = None) -> pb.GenerateEvent:
    return pb.GenerateEvent(
        started=pb.Started(
            request_id=request.request_id,
            session_id=request.session_id or "",
            replica_id=accepted.replica_id,
            seed=accepted.seed,
            prompt_tokens=len(request.token_ids),
            synthetic_acceptance=synthetic_acceptance,
            route=accepted.route,
        )
    )


def delta_events(delta: Delta, counted: Metrics) -> list[pb.GenerateEvent]:
    """The tokens of one engine step, the end, or both. `counted` stands in for metrics the replica left out."""
    events = []
    if delta.token_ids or delta.text:
        tokens = pb.Tokens(
            token_ids=delta.token_ids,
            text=delta.text,
            index=delta.index,
            logprobs=[_logprobs_message(entry) for entry in delta.logprobs],
            prompt_logprobs=[_logprobs_message(entry) for entry in delta.prompt_logprobs],
            verified=None if delta.verified is None else pb.Verified(**asdict(delta.verified)),
        )
        events.append(pb.GenerateEvent(tokens=tokens))
    if delta.finish_reason is not None:
        usage = usage_message(delta.metrics or counted)
        finished = pb.Finished(reason=_REASONS[delta.finish_reason], usage=usage, index=delta.index)
        events.append(pb.GenerateEvent(finished=finished))
    return events


def _logprobs_message(entry: TokenLogprobs) -> pb.TokenLogprobs:
    return pb.TokenLogprobs(
        token_id=entry.token_id,
        logprob=entry.logprob,
        rank=entry.rank,
        top=[pb.TopLogprob(token_id=token, logprob=logprob) for token, logprob in entry.top],
    )


def usage_message(metrics: Metrics) -> pb.Usage:
    return pb.Usage(
        prompt_tokens=metrics.prompt_tokens,
        cached_tokens=metrics.cached_tokens,
        completion_tokens=metrics.completion_tokens,
        drafted_tokens=metrics.drafted,
        accepted_tokens=metrics.accepted,
        late_drafts=metrics.late,
        steps=metrics.steps,
        queue_seconds=metrics.queue_s,
        ttft_seconds=metrics.ttft_s,
        total_seconds=metrics.total_s,
        wasted_drafts=metrics.wasted,
        resumptions=metrics.resumptions,
        sources=[
            pb.SourceUsage(source=each.source, drafted=each.drafted, accepted=each.accepted, wasted=each.wasted)
            for each in metrics.sources
        ],
    )


def session_message(session: SessionInfo) -> pb.Session:
    told = {name: value for name, value in asdict(session).items() if value is not None}
    return pb.Session(**told)
