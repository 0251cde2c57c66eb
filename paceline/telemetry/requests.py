"""What is told of one request: the attributes of its spans, and the fields of its lines in the log.

Names are those of OpenTelemetry's conventions for generative AI where there are any; ours begin with `paceline.`.
Nothing of a prompt or an answer is among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paceline.telemetry.tracing import Attributes, Span, trace_id
from paceline.types import Metrics, Request

NS = 10**9
GENERATE = "paceline.generate"
DRAFT = "paceline.draft"


@dataclass(frozen=True, slots=True)
class Origin:
    """What a client sent along: its `traceparent` and `x-request-id`, "" for none; and when its request came, in
    nanoseconds since 1970, None if nobody noted it."""

    traceparent: str = ""
    request_id: str = ""
    arrived: int | None = None


NOWHERE = Origin()


def asked(request: Request, model: str) -> Attributes:
    """Of a request, before anything is known of its answer."""
    params = request.params
    return {
        "gen_ai.operation.name": operation(request),
        "gen_ai.provider.name": "paceline",
        "gen_ai.request.model": model,
        "gen_ai.response.id": request.request_id,
        "gen_ai.conversation.id": request.session_id,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.choice.count": params.n if params.n > 1 else None,
        "gen_ai.usage.input_tokens": len(request.token_ids),
        "paceline.priority": request.priority or None,
    }


def operation(request: Request) -> str:
    """Its id says which front door it came through."""
    return "text_completion" if request.request_id.startswith("cmpl-") else "chat"


def answered(metrics: Metrics, reasons: Sequence[str]) -> Attributes:
    """Of an answer that is complete."""
    return {
        "gen_ai.response.finish_reasons": tuple(reasons),
        "gen_ai.usage.output_tokens": metrics.completion_tokens,
        "gen_ai.usage.cache_read.input_tokens": metrics.cached_tokens,
        "gen_ai.response.time_to_first_chunk": metrics.ttft_s,
        "paceline.queue_s": metrics.queue_s,
        "paceline.steps": metrics.steps,
        "paceline.drafted_tokens": metrics.drafted,
        "paceline.accepted_tokens": metrics.accepted,
        "paceline.late_drafts": metrics.late,
        "paceline.resumptions": metrics.resumptions or None,
    }


def together(outputs: Sequence[Metrics]) -> Metrics:
    """Of all outputs of one request: the prompt was computed by the first."""
    if len(outputs) == 1:
        return outputs[0]
    first = outputs[0]
    return Metrics(
        prompt_tokens=first.prompt_tokens,
        cached_tokens=first.cached_tokens,
        completion_tokens=sum(each.completion_tokens for each in outputs),
        drafted=sum(each.drafted for each in outputs),
        accepted=sum(each.accepted for each in outputs),
        late=sum(each.late for each in outputs),
        steps=sum(each.steps for each in outputs),
        queue_s=first.queue_s,
        ttft_s=min(each.ttft_s for each in outputs),
        total_s=max(each.total_s for each in outputs),
        resumptions=max(each.resumptions for each in outputs),
    )


def phases(span: Span, metrics: Metrics, ended: int) -> None:
    """The parts of a generation as children of its span, from what the engine noted: waiting, the prompt, the rest."""
    arrived = ended - int(metrics.total_s * NS)
    admitted, first = arrived + int(metrics.queue_s * NS), arrived + int(metrics.ttft_s * NS)
    span.child("paceline.queue", arrived, admitted)
    computed = metrics.prompt_tokens - metrics.cached_tokens
    span.child("paceline.prefill", admitted, first, {"paceline.computed_tokens": computed})
    span.child("paceline.decode", first, ended, {"paceline.steps": metrics.steps})


def named(request: Request) -> dict[str, Any]:
    """`extra` of a line about a request. Serve adds its `request_id`, which is the client's `x-request-id`."""
    fields = {
        "completion_id": request.request_id,
        "session_id": request.session_id,
        "trace_id": trace_id(request.trace),
    }
    return {name: value for name, value in fields.items() if value is not None}
