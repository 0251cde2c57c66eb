"""How an answer is put into the words of OpenAI's older text completions."""

from __future__ import annotations

from dataclasses import dataclass

from paceline.api.answers import (
    Answer,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    PacelineInfo,
    PromptLogprob,
    Usage,
)
from paceline.api.logprobs import Offsets, completion_logprobs, prompt_logprobs
from paceline.api.tally import ChoiceTally, Tally
from paceline.api.wording import Wording
from paceline.types import Delta, TokenLogprobs


@dataclass(frozen=True)
class CompletionWording(Wording):
    """text_completion, whole and in chunks alike."""

    echo: tuple[str, ...] | None = None
    """With echo the text of each prompt."""
    told_prompt: int | None = None
    """Likeliest tokens to tell of the prompt in a field of its own."""
    silent: bool = False
    """Nothing was to be generated: the one token that was is left out."""

    def openings(self, tally: Tally) -> list[Answer]:  # noqa: ARG002
        return []

    def closings(self, tally: Tally) -> list[Answer]:
        return [self._of([], self._info(tally), self._usage(tally))] if self.include_usage else []

    def whole(self, tally: Tally) -> Completion:
        choices = [
            CompletionChoice(
                index=choice.index,
                text=self._text(choice, "" if self.silent else choice.text, first=True),
                logprobs=self._logprobs(tally, choice, choice.logprobs, Offsets(), first=True),
                prompt_logprobs=self._of_prompt(tally, choice),
                finish_reason="length" if self.silent else choice.finish_reason,
            )
            for choice in tally.choices
        ]
        return self._of(choices, self._info(tally), self._usage(tally))

    def _chunks(self, tally: Tally, delta: Delta, info: PacelineInfo | None) -> list[Answer]:
        grown = tally.choices[delta.index]
        # The first step's tokens bring the prompt's along; a prompt of one token has nothing to bring but null.
        first = len(grown.texts) == 1
        brings = first and delta.index % tally.request.params.n == 0
        choice = CompletionChoice(
            index=delta.index,
            text=self._text(grown, "" if self.silent else delta.text, first=first),
            logprobs=self._logprobs(tally, grown, delta.logprobs, grown.offsets, first=first),
            prompt_logprobs=self._of_prompt(tally, grown) if brings else None,
            finish_reason="length" if self.silent and delta.finished else delta.finish_reason,
        )
        return [self._of([choice], info)]

    def _text(self, choice: ChoiceTally, generated: str, *, first: bool) -> str:
        if self.echo is None or not first:
            return generated
        return self.echo[choice.index // choice.request.params.n] + generated

    def _logprobs(
        self,
        tally: Tally,
        choice: ChoiceTally,
        entries: list[TokenLogprobs] | tuple[TokenLogprobs, ...],
        offsets: Offsets,
        *,
        first: bool,
    ) -> CompletionLogprobs | None:
        """Of the tokens generated, and with echo of those before them."""
        wanted = choice.request.params.logprobs
        if wanted is None:
            return None
        generated = [] if self.silent else list(entries)
        if self.echo is None or not first:
            return completion_logprobs(generated, self.texts, offsets)
        before = [entry.cut(wanted) for entry in tally.prompt_logprobs(choice)]
        return completion_logprobs([*before, *generated], self.texts, offsets, choice.request.token_ids[0])

    def _of_prompt(self, tally: Tally, choice: ChoiceTally) -> list[dict[str, PromptLogprob] | None] | None:
        if self.told_prompt is None:
            return None
        entries = [entry.cut(self.told_prompt) for entry in tally.prompt_logprobs(choice)]
        return prompt_logprobs(entries, self.texts)

    def _usage(self, tally: Tally) -> Usage:
        usage = Usage.of(tally.metrics)
        if not self.silent:
            return usage
        return usage.model_copy(update={"completion_tokens": 0, "total_tokens": usage.prompt_tokens})

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
