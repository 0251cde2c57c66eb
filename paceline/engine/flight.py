"""A step under way, and the one after it that begins before anybody has seen its tokens.

    launch n ──► launch n + 1 ──► tokens of n: commit, emit ──► launch n + 2 ──► tokens of n + 1: …

So the device never waits for the host while plain decoding goes on. Whoever turns out to have ended with step n has one
token too many in step n + 1, which is dropped: what it wrote lies behind what its entry holds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.engine.attention import Window
from paceline.engine.runner import Launched, Runner
from paceline.engine.sampling import Draws, Verification, note_prompt_logprobs, rows_of, sample, settle
from paceline.engine.scheduler import Scheduled, Scheduler
from paceline.speculation.sampling import Rows


@dataclass(frozen=True, slots=True)
class Flight:
    """What runs: the parts of a step, in the order of their rows, and its logits; `launched` if they are on their
    way."""

    step: list[Scheduled]
    logits: torch.Tensor
    launched: Launched | None = None

    @classmethod
    def begin(cls, runner: Runner, step: list[Scheduled], verification: Verification) -> Flight:
        """Run a step, without waiting for it if all its rows draw where its logits are."""
        windows = [part.window for part in step]
        if verification == "coupled" and all(part.draws == part.window.sample for part in step):
            launched = runner.launch(windows, [rows_of(part) for part in step if part.draws])
            if launched is not None:
                return cls(step, launched.logits, launched)
        logits = runner.run(windows)
        note_prompt_logprobs(step, logits)
        return cls(step, logits)

    def begin_next(self, runner: Runner, scheduler: Scheduler) -> Flight | None:
        """The step after this one, if it is plain decoding of the same sequences, all of which will go on but for
        what this step draws; else None."""
        if self.launched is None or not scheduler.goes_on_with([part.sequence for part in self.step]):
            return None
        if not all(_plain(part) for part in self.step):
            return None
        following = [Window(part.sequence.kv, [0], sample=1, ahead=1) for part in self.step]
        launched = runner.launch(following, [_rows_after(part) for part in self.step], range(len(self.step)))
        if launched is None:
            return None
        step = [Scheduled(part.sequence, window, None, 1) for part, window in zip(self.step, following, strict=True)]
        return Flight(step, launched.logits, launched)

    def wait(self) -> list[int] | None:
        """The tokens of its drawing rows, once they are there; None if they are drawn here."""
        return self.launched.tokens() if self.launched is not None else None

    def landed(self, tokens: list[int] | None, verification: Verification) -> tuple[list[Scheduled], list[Draws]]:
        """The parts whose sequences still run, with what they drew: `tokens` are what `wait` brought."""
        if tokens is None:
            return self.step, sample(self.step, self.logits, verification)
        drawn = settle(self.step, tokens, self.logits)
        landed = [(_known(part), draws) for part, draws in zip(self.step, drawn, strict=True) if _runs(part)]
        return [part for part, _ in landed], [draws for _, draws in landed]


def _plain(part: Scheduled) -> bool:
    """Whether its sequence draws one token here that does not end it by its length, and nobody asks for more; what a
    grammar lets follow depends on that token."""
    sequence = part.sequence
    one = part.draws == 1 and len(part.window.token_ids) == 1 and sequence.matcher is None
    return one and len(sequence.tokens) + 1 < sequence.room and sequence.request.params.logprobs is None


def _rows_after(part: Scheduled) -> Rows:
    """Of the row that draws the token after the one that is being drawn, whatever that is."""
    sequence = part.sequence
    return Rows(sequence.request.params, sequence.prompt_length, sequence.tokens, (0,))


def _runs(part: Scheduled) -> bool:
    """Whether its sequence is where it was when the step began."""
    return part.sequence.entry is part.window.entry and not part.sequence.finished


def _known(part: Scheduled) -> Scheduled:
    """With the token it began from, which was not known when it was launched."""
    if not part.window.ahead:
        return part
    return Scheduled(part.sequence, Window(part.window.entry, part.sequence.tokens[-1:], sample=1), None, 1)
