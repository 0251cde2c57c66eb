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
    SourceInfo,
    Usage,
    VerifiedInfo,
)
from paceline.api.logprobs import Offsets, TokenTexts, chat_logprobs, completion_logprobs, prompt_logprobs
from paceline.seeds import choice_seed
from paceline.speculation.telemetry import merged
from paceline.types import Accepted, Delta, Metrics, Request, TokenLogprobs


@dataclass
class ChoiceTally:
    """What one choice has grown to so far, and in the end what it cost. `offsets` follow its chunks."""

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    offsets: Offsets = field(default_factory=Offsets)
    finish_reason: str = ""
    metrics: Metrics = field(default_factory=Metrics)

    def add(self, delta: Delta, prompt_tokens: int) -> None:
        self.texts.append(delta.text)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        if delta.finish_reason is not None:
            counted = Metrics(prompt_tokens=prompt_tokens, completion_tokens=len(self.token_ids))
            self.finish_reason = delta.finish_reason.value
            self.metrics = delta.metrics or counted


class Tally:
    """What has been generated so far of every choice of a request."""

    def __init__(self, request: Request, accepted: Accepted) -> None:
        self.request = request
        self.accepted = accepted
        self.choices = [ChoiceTally(index) for index in range(request.params.n)]
        self.prompt_logprobs: list[TokenLogprobs] = []

    @property
    def finished(self) -> bool:
        return all(choice.finish_reason for choice in self.choices)

    def add(self, delta: Delta) -> None:
        self.choices[delta.index].add(delta, len(self.request.token_ids))
        self.prompt_logprobs.extend(delta.prompt_logprobs)

    @property
    def metrics(self) -> Metrics:
        """Of all choices. The prompt is one, and what of it was cached is what its first reader found."""
        each = [choice.metrics for choice in self.choices]
        return Metrics(
            prompt_tokens=each[0].prompt_tokens,
            cached_tokens=each[0].cached_tokens,
            completion_tokens=sum(m.completion_tokens for m in each),
            drafted=sum(m.drafted for m in each),
            accepted=sum(m.accepted for m in each),
            late=sum(m.late for m in each),
            steps=sum(m.steps for m in each),
            queue_s=each[0].queue_s,
            ttft_s=min(m.ttft_s for m in each),
            total_s=max(m.total_s for m in each),
            wasted=sum(m.wasted for m in each),
            sources=merged(m.sources for m in each),
            resumptions=max(m.resumptions for m in each),
        )

    def info(self, token_ids: list[int] | None = None, choices: list[list[int]] | None = None) -> PacelineInfo:
        metrics, seed, n = self.metrics, self.accepted.seed, len(self.choices)
        return PacelineInfo(
            replica_id=self.accepted.replica_id,
            session_id=self.request.session_id,
            seed=seed,
            seeds=[choice_seed(seed, index) for index in range(n)] if n > 1 else None,
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

    def chunk(self, tally: Tally, delta: Delta) -> Answer:
        """One engine step of one choice. The last one says what the answer cost, unless a closing chunk will."""
        step = None
        if self.return_token_ids:
            step = PacelineInfo(token_ids=list(delta.token_ids), verified=VerifiedInfo.of(delta))
        if tally.finished and not self.include_usage:
            told = {} if step is None else {"token_ids": step.token_ids, "verified": step.verified}
            step = self._marked(tally.info().model_copy(update=told))
        return self._chunk(tally, delta, step)

    @abstractmethod
    def openings(self, tally: Tally) -> list[Answer]:
        """The chunks before the first token."""

    @abstractmethod
    def closing(self, tally: Tally) -> Answer:
        """The last chunk, without choices, when usage was asked for. Its token ids are all of the answer's."""

    @abstractmethod
    def whole(self, tally: Tally) -> Answer:
        """The answer in one piece."""

    @abstractmethod
    def _chunk(self, tally: Tally, delta: Delta, info: PacelineInfo | None) -> Answer: ...

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

    def closing(self, tally: Tally) -> ChatCompletionChunk:
        return self._of([], self._info(tally), Usage.of(tally.metrics))

    def whole(self, tally: Tally) -> ChatCompletion:
        told = tally.request.params.logprobs is not None
        choices = [
            ChatChoice(
                index=choice.index,
                message=AnswerMessage(content="".join(choice.texts)),
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

    def _chunk(self, tally: Tally, delta: Delta, info: PacelineInfo | None) -> ChatCompletionChunk:
        told = tally.request.params.logprobs is not None
        choice = ChatChunkChoice(
            index=delta.index,
            delta=ChatDelta(content=delta.text),
            logprobs=chat_logprobs(delta.logprobs, self.texts) if told else None,
            finish_reason=delta.finish_reason,
        )
        return self._of([choice], info)

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


class CompletionWording(Wording):
    """text_completion, whole and in chunks alike."""

    def openings(self, tally: Tally) -> list[Answer]:  # noqa: ARG002
        return []

    def closing(self, tally: Tally) -> Completion:
        return self._of([], self._info(tally), Usage.of(tally.metrics))

    def whole(self, tally: Tally) -> Completion:
        params = tally.request.params
        told = params.logprobs is not None
        prompt = None if params.prompt_logprobs is None else prompt_logprobs(tally.prompt_logprobs, self.texts)
        choices = [
            CompletionChoice(
                index=choice.index,
                text="".join(choice.texts),
                logprobs=completion_logprobs(choice.logprobs, self.texts, Offsets()) if told else None,
                prompt_logprobs=prompt,
                finish_reason=choice.finish_reason,
            )
            for choice in tally.choices
        ]
        return self._of(choices, self._info(tally), Usage.of(tally.metrics))

    def _chunk(self, tally: Tally, delta: Delta, info: PacelineInfo | None) -> Completion:
        params, grown = tally.request.params, tally.choices[delta.index]
        told = params.logprobs is not None
        # The first step's tokens bring the prompt's along; a prompt of one token has nothing to bring but null.
        prompt = params.prompt_logprobs is not None and delta.index == 0 and len(grown.texts) == 1
        choice = CompletionChoice(
            index=delta.index,
            text=delta.text,
            logprobs=completion_logprobs(delta.logprobs, self.texts, grown.offsets) if told else None,
            prompt_logprobs=prompt_logprobs(delta.prompt_logprobs, self.texts) if prompt else None,
            finish_reason=delta.finish_reason,
        )
        return self._of([choice], info)

    def _of(
        self, choices: list[CompletionChoice], info: PacelineInfo | None = None, usage: Usage | None = None
    ) -> Completion:
        return Completion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=choices,
            system_fingerprint=self._fingerprint,
            usage=usage,
            paceline=info,
        )
