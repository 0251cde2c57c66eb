"""How an answer is put into the words of /v1/responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paceline.api.answers import Answer, ChatTokenLogprob, PacelineInfo
from paceline.api.answers_responses import (
    IncompleteDetails,
    ResponseError,
    ResponseEvent,
    ResponseObject,
    ResponseUsage,
)
from paceline.api.logprobs import chat_logprobs
from paceline.api.response_output import Output
from paceline.api.tally import Readers, Tally
from paceline.api.tool_parsing import Arguments, CallBegins, Content, Event
from paceline.api.wording import Wording
from paceline.errors import PacelineError
from paceline.sessions.history import ChatMessage
from paceline.types import Accepted, Delta, FinishReason, Metrics, Request


class ResponseTally(Tally):
    """With the output as it was told so far."""

    def __init__(
        self, requests: Sequence[Request], accepted: Accepted, readers: Readers | None, response_id: str
    ) -> None:
        super().__init__(requests, accepted, readers)
        self.output = Output(response_id)


@dataclass(frozen=True, kw_only=True)
class ResponseWording(Wording):
    """response, and the events of its stream. `begun` is what is known of it before anything is generated."""

    begun: ResponseObject

    def tally(self, requests: Sequence[Request], accepted: Accepted) -> ResponseTally:
        return ResponseTally(requests, accepted, self.readers, self.id)

    def event(self, tally: Tally, answer: Answer) -> bytes:  # noqa: ARG002
        assert isinstance(answer, ResponseEvent)
        return b"event: " + answer.type.encode() + b"\ndata: " + answer.json_bytes() + b"\n\n"

    def failure(self, tally: Tally, error: PacelineError) -> bytes:
        failed = {"status": "failed", "error": ResponseError(code=error.code, message=error.message)}
        told = _output(tally).event("response.failed", response=self.begun.model_copy(update=failed))
        return self.event(tally, told)

    @property
    def done(self) -> bytes:
        return b""

    def openings(self, tally: Tally) -> list[ResponseEvent]:
        output = _output(tally)
        return [output.event(kind, response=self.begun) for kind in ("response.created", "response.in_progress")]

    def closings(self, tally: Tally) -> list[ResponseEvent]:
        whole = self.whole(tally)
        return [_output(tally).event(f"response.{whole.status}", response=whole)]

    def whole(self, tally: Tally) -> ResponseObject:
        choice = tally.choices[0]
        told = chat_logprobs(choice.logprobs, self.texts).content
        events = choice.events if choice.reader is not None else [Content(choice.text)]
        return self._ended(
            events, choice.finish_reason == FinishReason.LENGTH, tally.metrics, told, paceline=self._info(tally)
        )

    def stored(self, answer: ChatMessage, last: Delta, output_tokens: int, prompt_tokens: int) -> str:
        """The same as JSON for the session store, from the answer as the session keeps it."""
        events: list[Event] = [Content(answer.content)] if answer.content or not answer.tool_calls else []
        for n, call in enumerate(answer.tool_calls):
            events += [CallBegins(n, call.call_id, call.name), Arguments(n, call.arguments)]
        counted = Metrics(prompt_tokens=prompt_tokens, completion_tokens=output_tokens)
        ended = self._ended(events, last.finish_reason is FinishReason.LENGTH, last.metrics or counted)
        return ended.model_dump_json()

    def _chunks(self, tally: Tally, delta: Delta, info: PacelineInfo | None) -> list[ResponseEvent]:  # noqa: ARG002
        choice, output = tally.choices[0], _output(tally)
        events = choice.fresh if choice.reader is not None else [Content(delta.text)] if delta.text else []
        told = output.grow(events, chat_logprobs(delta.logprobs, self.texts).content)
        if delta.finished:
            told += output.finish(cut=delta.finish_reason is FinishReason.LENGTH)
        return told

    def _ended(
        self,
        events: Sequence[Event],
        cut: bool,
        metrics: Metrics,
        logprobs: Sequence[ChatTokenLogprob] = (),
        paceline: PacelineInfo | None = None,
    ) -> ResponseObject:
        output = Output(self.id)
        output.grow(events, logprobs)
        output.finish(cut=cut)
        end = {
            "status": "incomplete" if cut else "completed",
            "output": output.items(cut=cut),
            "incomplete_details": IncompleteDetails() if cut else None,
            "usage": ResponseUsage.of(metrics),
            "paceline": paceline,
        }
        return self.begun.model_copy(update=end)


def _output(tally: Tally) -> Output:
    assert isinstance(tally, ResponseTally)
    return tally.output
