"""How an answer is put into OpenAI's words, whole or in chunks; and a chat completion, in particular."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic_core import to_json

from paceline.api.answers import (
    Answer,
    AnswerMessage,
    CalledFunction,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatToolCall,
    FunctionDelta,
    PacelineInfo,
    ToolCallDelta,
    Usage,
    VerifiedInfo,
)
from paceline.api.failures import envelope_of
from paceline.api.logprobs import TokenTexts, chat_logprobs
from paceline.api.tally import ChoiceTally, Readers, Tally
from paceline.api.tool_parsing import Arguments, CallBegins, Content, Event
from paceline.errors import PacelineError
from paceline.types import Accepted, Delta, Request

TEXT_MARK = "\ue000text\ue001"
"""Stands for the text of an event while everything else of it is written: private characters, in no name or id."""


@dataclass(frozen=True)
class Wording(ABC):
    """The answer's fixed parts, and the choices the client made about its form."""

    id: str
    model: str
    created: int
    texts: TokenTexts
    include_usage: bool = False
    return_token_ids: bool = False
    synthetic_acceptance: float | None = None
    """Set if candidates are accepted by chance: every answer says so."""
    readers: Readers | None = None
    """Find the calls in the choices, if there are functions to call."""

    def tally(self, requests: Sequence[Request], accepted: Accepted) -> Tally:
        """An empty one."""
        return Tally(requests, accepted, self.readers)

    def event(self, tally: Tally, answer: Answer) -> bytes:  # noqa: ARG002
        """One chunk as a Server-Sent Event."""
        return b"data: " + answer.json_bytes() + b"\n\n"

    def failure(self, tally: Tally, error: PacelineError) -> bytes:  # noqa: ARG002
        """What ends a stream that cannot go on."""
        return b"data: " + envelope_of(error) + b"\n\n"

    @property
    def done(self) -> bytes:
        """What ends every other."""
        return b"data: [DONE]\n\n"

    def text_event(self, tally: Tally, delta: Delta) -> bytes | None:  # noqa: ARG002
        """The event of a step that adds nothing but text, written without a model of it; None if there is more to say,
        or no such short way."""
        return None

    def chunks(self, tally: Tally, delta: Delta) -> Sequence[Answer]:
        """One engine step of one choice; none if all of it is held back. The last one says what the answer cost, unless
        a closing chunk will."""
        step = None
        if self.return_token_ids:
            step = PacelineInfo(token_ids=list(delta.token_ids), verified=VerifiedInfo.of(delta))
        if tally.finished and not self.include_usage:
            told = {} if step is None else {"token_ids": step.token_ids, "verified": step.verified}
            step = self._marked(tally.info().model_copy(update=told))
        return self._chunks(tally, delta, step)

    @abstractmethod
    def openings(self, tally: Tally) -> Sequence[Answer]:
        """The chunks before the first token."""

    @abstractmethod
    def closings(self, tally: Tally) -> Sequence[Answer]:
        """The chunks behind the last token. One without choices, if usage was asked for: its token ids are all of the
        answer's."""

    @abstractmethod
    def whole(self, tally: Tally) -> Answer:
        """The answer in one piece."""

    @abstractmethod
    def _chunks(self, tally: Tally, delta: Delta, info: PacelineInfo | None) -> Sequence[Answer]: ...

    def _info(self, tally: Tally) -> PacelineInfo:
        ids = [choice.token_ids for choice in tally.choices]
        if not self.return_token_ids:
            return self._marked(tally.info())
        return self._marked(tally.info(ids[0]) if len(ids) == 1 else tally.info(choices=ids))

    def _marked(self, info: PacelineInfo) -> PacelineInfo:
        if self.synthetic_acceptance is None:
            return info
        return info.model_copy(update={"synthetic_acceptance": self.synthetic_acceptance})

    @property
    def _fingerprint(self) -> str | None:
        """OpenAI's word for what made an answer: told only where that is not the model alone."""
        synthetic = self.synthetic_acceptance
        return None if synthetic is None else f"{self.model}-synthetic-acceptance-{synthetic:g}"


class ChatWording(Wording):
    """chat.completion and chat.completion.chunk."""

    def openings(self, tally: Tally) -> list[Answer]:
        delta = ChatDelta(role="assistant", content="")
        return [self._of([ChatChunkChoice(index=choice.index, delta=delta)]) for choice in tally.choices]

    def text_event(self, tally: Tally, delta: Delta) -> bytes | None:
        told = delta.finished or self.return_token_ids or tally.request.params.logprobs is not None
        if told or tally.choices[delta.index].reader is not None:
            return None
        head, tail = self._around_text(delta.index)
        return head + to_json(delta.text) + tail

    def _around_text(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and behind the text in every event of a choice."""
        found = self._around.get(index)
        if found is None:
            chunk = self._of([ChatChunkChoice(index=index, delta=ChatDelta(content=TEXT_MARK))])
            head, _, tail = (b"data: " + chunk.json_bytes() + b"\n\n").partition(to_json(TEXT_MARK))
            found = self._around[index] = head, tail
        return found

    @cached_property
    def _around(self) -> dict[int, tuple[bytes, bytes]]:
        return {}

    def closings(self, tally: Tally) -> list[Answer]:
        return [self._of([], self._info(tally), Usage.of(tally.metrics))] if self.include_usage else []

    def whole(self, tally: Tally) -> ChatCompletion:
        told = tally.request.params.logprobs is not None
        choices = [
            ChatChoice(
                index=choice.index,
                message=_message(choice),
                logprobs=chat_logprobs(choice.logprobs, self.texts) if told else None,
                finish_reason=choice.finish_reason,
            )
            for choice in tally.choices
        ]
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=choices,
            system_fingerprint=self._fingerprint,
            usage=Usage.of(tally.metrics),
            paceline=self._info(tally),
        )

    def _chunks(self, tally: Tally, delta: Delta, info: PacelineInfo | None) -> list[Answer]:
        """One for each part: a name and its arguments come in two. Log probabilities are in the first, the end and the
        cost in the last."""
        told, choice = tally.request.params.logprobs is not None, tally.choices[delta.index]
        parts = [ChatDelta(content=delta.text)] if choice.reader is None else [_delta(event) for event in choice.fresh]
        if not parts and (told or delta.finished or info is not None):
            parts = [ChatDelta()]
        last = len(parts) - 1
        return [
            self._of(
                [
                    ChatChunkChoice(
                        index=delta.index,
                        delta=part,
                        logprobs=chat_logprobs(delta.logprobs, self.texts) if told and n == 0 else None,
                        finish_reason=(choice.finish_reason or None) if n == last else None,
                    )
                ],
                info if n == last else None,
            )
            for n, part in enumerate(parts)
        ]

    def _of(
        self, choices: list[ChatChunkChoice], info: PacelineInfo | None = None, usage: Usage | None = None
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=choices,
            system_fingerprint=self._fingerprint,
            usage=usage,
            paceline=info,
        )


def _message(choice: ChoiceTally) -> AnswerMessage:
    content, calls = choice.said()
    if not calls:
        return AnswerMessage(content=content)
    called = [
        ChatToolCall(id=call.call_id, function=CalledFunction(name=call.name, arguments=call.arguments))
        for call in calls
    ]
    return AnswerMessage(content=content or None, tool_calls=called)


def _delta(event: Event) -> ChatDelta:
    match event:
        case Content(text):
            return ChatDelta(content=text)
        case CallBegins(index, call_id, name):
            begun = FunctionDelta(name=name, arguments="")
            return ChatDelta(tool_calls=[ToolCallDelta(index=index, id=call_id, type="function", function=begun)])
        case Arguments(index, text):
            return ChatDelta(tool_calls=[ToolCallDelta(index=index, function=FunctionDelta(arguments=text))])
