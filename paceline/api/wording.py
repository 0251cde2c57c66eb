"""How one answer is put into OpenAI's words: a chat completion or a text completion, whole or in chunks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

from paceline.api.answers import (
    Answer,
    AnswerMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    Completion,
    CompletionChoice,
    PacelineInfo,
    Usage,
)
from paceline.types import Accepted, Delta, Metrics, Request


@dataclass
class Tally:
    """What has been generated so far, and in the end what it cost."""

    request: Request
    accepted: Accepted
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    metrics: Metrics = field(default_factory=Metrics)

    def add(self, delta: Delta) -> None:
        self.texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        if delta.finish_reason is not None:
            counted = Metrics(prompt_tokens=len(self.request.token_ids), completion_tokens=len(self.token_ids))
            self.finish_reason = delta.finish_reason.value
            self.metrics = delta.metrics or counted

    def info(self, token_ids: list[int] | None) -> PacelineInfo:
        metrics = self.metrics
        return PacelineInfo(
            replica_id=self.accepted.replica_id,
            session_id=self.request.session_id,
            seed=self.accepted.seed,
            drafted_tokens=metrics.drafted,
            accepted_tokens=metrics.accepted,
            late_drafts=metrics.late,
            steps=metrics.steps,
            cached_tokens=metrics.cached_tokens,
            ttft_s=metrics.ttft_s,
            total_s=metrics.total_s,
            token_ids=token_ids,
        )


@dataclass(frozen=True)
class Wording(ABC):
    """The answer's fixed parts, and the choices the client made about its form."""

    id: str
    model: str
    created: int
    include_usage: bool = False
    return_token_ids: bool = False

    def chunk(self, tally: Tally, delta: Delta) -> Answer:
        """One engine step. The last one says what the answer cost, unless a closing chunk will."""
        token_ids = list(delta.token_ids) if self.return_token_ids else None
        if delta.finished and not self.include_usage:
            return self._chunk(delta.text, tally.finish_reason, tally.info(token_ids))
        info = None if token_ids is None else PacelineInfo(token_ids=token_ids)
        return self._chunk(delta.text, tally.finish_reason or None, info)

    @abstractmethod
    def opening(self) -> Answer | None:
        """The chunk before the first token, if there is one."""

    @abstractmethod
    def closing(self, tally: Tally) -> Answer:
        """The last chunk, without choices, when usage was asked for. Its token ids are all of the answer's."""

    @abstractmethod
    def whole(self, tally: Tally) -> Answer:
        """The answer in one piece."""

    @abstractmethod
    def _chunk(self, text: str, finish_reason: str | None, info: PacelineInfo | None) -> Answer: ...

    def _info(self, tally: Tally) -> PacelineInfo:
        return tally.info(tally.token_ids if self.return_token_ids else None)


class ChatWording(Wording):
    """chat.completion and chat.completion.chunk."""

    def opening(self) -> ChatCompletionChunk:
        return self._of([ChatChunkChoice(delta=ChatDelta(role="assistant", content=""))])

    def closing(self, tally: Tally) -> ChatCompletionChunk:
        return self._of([], self._info(tally), Usage.of(tally.metrics))

    def whole(self, tally: Tally) -> ChatCompletion:
        message = AnswerMessage(content="".join(tally.texts))
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[ChatChoice(message=message, finish_reason=tally.finish_reason)],
            usage=Usage.of(tally.metrics),
            paceline=self._info(tally),
        )

    def _chunk(self, text: str, finish_reason: str | None, info: PacelineInfo | None) -> ChatCompletionChunk:
        return self._of([ChatChunkChoice(delta=ChatDelta(content=text), finish_reason=finish_reason)], info)

    def _of(
        self, choices: list[ChatChunkChoice], info: PacelineInfo | None = None, usage: Usage | None = None
    ) -> ChatCompletionChunk:
        return ChatCompletionChunk(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage, paceline=info
        )


class CompletionWording(Wording):
    """text_completion, whole and in chunks alike."""

    def opening(self) -> None:
        return None

    def closing(self, tally: Tally) -> Completion:
        return self._of([], self._info(tally), Usage.of(tally.metrics))

    def whole(self, tally: Tally) -> Completion:
        choice = CompletionChoice(text="".join(tally.texts), finish_reason=tally.finish_reason)
        return self._of([choice], self._info(tally), Usage.of(tally.metrics))

    def _chunk(self, text: str, finish_reason: str | None, info: PacelineInfo | None) -> Completion:
        return self._of([CompletionChoice(text=text, finish_reason=finish_reason)], info)

    def _of(
        self, choices: list[CompletionChoice], info: PacelineInfo | None = None, usage: Usage | None = None
    ) -> Completion:
        return Completion(
            id=self.id, created=self.created, model=self.model, choices=choices, usage=usage, paceline=info
        )
