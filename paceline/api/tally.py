"""What has been generated so far of a request's choices, and in the end what they cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from paceline.api.answers import PacelineInfo, SourceInfo
from paceline.api.logprobs import Offsets
from paceline.api.tool_parsing import Event, ToolCallReader, gathered
from paceline.seeds import choice_seed
from paceline.sessions.history import ToolCall
from paceline.speculation.telemetry import summed
from paceline.types import Accepted, Delta, FinishReason, Metrics, Request, TokenLogprobs

CALLED = "tool_calls"
"""OpenAI's reason of an answer that ended after calling functions."""

Readers = Callable[[Request, int], ToolCallReader]
"""Of output `index` of a request."""


@dataclass
class ChoiceTally:
    """What one choice has grown to so far. `offsets` follow its chunks. With a `reader`, `fresh` is what it made of the
    last delta, and `events` of all."""

    index: int
    request: Request
    reader: ToolCallReader | None = None
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    offsets: Offsets = field(default_factory=Offsets)
    finish_reason: str = ""
    metrics: Metrics = field(default_factory=Metrics)
    fresh: list[Event] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.prompt_logprobs.extend(delta.prompt_logprobs)
        if delta.finish_reason is not None:
            counted = Metrics(prompt_tokens=len(self.request.token_ids), completion_tokens=len(self.token_ids))
            self.finish_reason = delta.finish_reason.value
            self.metrics = delta.metrics or counted
        if self.reader is not None:
            self._read(self.reader, delta)

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def said(self) -> tuple[str, tuple[ToolCall, ...]]:
        """Content and calls."""
        return (self.text, ()) if self.reader is None else gathered(self.events)

    def _read(self, reader: ToolCallReader, delta: Delta) -> None:
        self.fresh = reader.push(delta.text)
        if delta.finished:
            self.fresh += reader.finish()
            if reader.count and delta.finish_reason is FinishReason.STOP:
                self.finish_reason = CALLED
        self.events += self.fresh


class Tally:
    """All choices of a request, or of several that are one to the client: those of the first come first."""

    def __init__(self, requests: Sequence[Request], accepted: Accepted, readers: Readers | None = None) -> None:
        self.requests = requests
        self.accepted = accepted
        self.choices = [
            ChoiceTally(number, request, readers and readers(request, index))
            for number, (request, index) in enumerate(
                (request, index) for request in requests for index in range(request.params.n)
            )
        ]

    @property
    def request(self) -> Request:
        return self.requests[0]

    @property
    def finished(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    def add(self, delta: Delta) -> None:
        self.choices[delta.index].add(delta)

    def prompt_logprobs(self, choice: ChoiceTally) -> list[TokenLogprobs]:
        """Of a choice's prompt, which the first choice of the same prompt brings along."""
        return self.choices[choice.index - choice.index % choice.request.params.n].prompt_logprobs

    @property
    def metrics(self) -> Metrics:
        """Of all choices. A prompt is counted once, and what of it was cached is what its first reader found."""
        each = [choice.metrics for choice in self.choices]
        prompts = each[:: self.request.params.n]
        return replace(  # the choices were computed side by side
            summed(each),
            prompt_tokens=sum(m.prompt_tokens for m in prompts),
            cached_tokens=sum(m.cached_tokens for m in prompts),
            queue_s=each[0].queue_s,
            ttft_s=min(m.ttft_s for m in each),
            total_s=max(m.total_s for m in each),
            resumptions=max(m.resumptions for m in each),
        )

    def info(self, token_ids: list[int] | None = None, choices: list[list[int]] | None = None) -> PacelineInfo:
        metrics, seed, n = self.metrics, self.accepted.seed, len(self.choices)
        each = self.request.params.n
        return PacelineInfo(
            replica_id=self.accepted.replica_id,
            session_id=self.request.session_id,
            seed=seed,
            seeds=[choice_seed(seed, index % each) for index in range(n)] if n > 1 else None,
            drafted_tokens=metrics.drafted,
            accepted_tokens=metrics.accepted,
            late_drafts=metrics.late,
            wasted_drafts=metrics.wasted,
            sources={source.source: SourceInfo.of(source) for source in metrics.sources} or None,
            steps=metrics.steps,
            cached_tokens=metrics.cached_tokens,
            ttft_s=metrics.ttft_s,
            total_s=metrics.total_s,
            resumptions=metrics.resumptions or None,
            token_ids=token_ids,
            choice_token_ids=choices,
        )
