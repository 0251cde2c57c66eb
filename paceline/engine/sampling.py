"""What one step's logits say: the tokens it commits, and log probabilities where a request asked for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from paceline.engine.scheduler import Scheduled
from paceline.speculation import rejection, sampling
from paceline.speculation.rejection import Guess
from paceline.speculation.sampling import Rows

Verification = Literal["coupled", "rejection"]


@dataclass(frozen=True, slots=True)
class Draws:
    """What a step says of one sequence: the run of candidates accepted, then one token of the target's own.

    `rows` are its drawing rows among `step_logits`, [sampled rows of the step, vocab].
    """

    tokens: list[int]
    accepted: int
    step_logits: torch.Tensor
    rows: range = range(0)

    @property
    def logits(self) -> torch.Tensor:
        """[drawing rows, vocab]; row i is the one that `tokens[i]` came from."""
        return self.step_logits[self.rows.start : self.rows.stop]

    def note_logprobs(self, part: Scheduled, taken: int) -> None:
        """Tell the sequence what the model thought of the tokens it took, if that was asked for."""
        top = part.sequence.request.params.logprobs
        if top is not None and taken:
            part.sequence.add_logprobs(sampling.logprobs(self.logits[:taken], self.tokens[:taken], top))


def sample(step: list[Scheduled], logits: torch.Tensor, verification: Verification = "coupled") -> list[Draws]:
    """What each member of the step commits; `logits` are of every sampled row.

    The two ways to verify share no random numbers, so an engine keeps to one of them.
    """
    spans = _drawing_spans(step)
    drawing = logits if sum(len(span) for span in spans) == len(logits) else logits[[n for span in spans for n in span]]
    parts = [part for part in step if part.draws]
    found = iter(_coupled(parts, drawing) if verification == "coupled" else _rejection(parts, drawing))
    return [
        Draws(*next(found), logits, span) if part.draws else Draws([], 0, logits)
        for part, span in zip(step, spans, strict=True)
    ]


def settle(step: list[Scheduled], tokens: list[int], logits: torch.Tensor) -> list[Draws]:
    """As `sample`, of a step all of whose rows were drawn where their logits are: `tokens` has one for each."""
    found, start = [], 0
    for part in step:
        end = start + part.draws
        run, accepted = sampling.accepted_run(tokens[start:end], part.candidates) if part.draws else ([], 0)
        found.append(Draws(run, accepted, logits, range(start, end)))
        start = end
    return found


def note_prompt_logprobs(step: list[Scheduled], logits: torch.Tensor) -> None:
    """Tell sequences that asked what the model thought of their prompt; call before the KV is committed."""
    start = 0
    for part in step:
        sequence, window = part.sequence, part.window
        top = sequence.request.params.prompt_logprobs
        if top is not None and sequence.owes_prompt:
            # The row of position p speaks of the token at p + 1. Rows of a window computed anew may be known.
            known, first = len(sequence.prompt_logprobs), sequence.kv.length
            tokens = sequence.tokens[known + 1 : min(first + len(window.token_ids) + 1, sequence.prompt_length)]
            row = start + known - first
            sequence.prompt_logprobs += sampling.logprobs(logits[row : row + len(tokens)], tokens, top)
        start += window.sample


def _coupled(parts: list[Scheduled], logits: torch.Tensor) -> list[tuple[list[int], int]]:
    """Candidates stand as long as they equal the target's own draws."""
    drawn = sampling.draw(logits, [rows_of(part) for part in parts])
    return [sampling.accepted_run(run, part.candidates) for run, part in zip(drawn, parts, strict=True)]


def _rejection(parts: list[Scheduled], logits: torch.Tensor) -> list[tuple[list[int], int]]:
    """Candidates stand with probability min(1, p / q)."""
    batch, guesses = [rows_of(part) for part in parts], [_guess_of(part) for part in parts]
    return [(verdict.tokens, verdict.accepted) for verdict in rejection.verify(logits, batch, guesses)]


def _guess_of(part: Scheduled) -> Guess:
    """A row beyond the candidates is that of one whose id the model does not know."""
    if part.proposal is None:
        return Guess()
    tokens, probs = part.proposal.tokens, part.proposal.probs
    return Guess(tokens, probs[: len(tokens)], probs[len(tokens)] if len(probs) > len(tokens) else None)


def rows_of(part: Scheduled) -> Rows:
    """How a part of a step draws."""
    sequence = part.sequence
    matcher = sequence.matcher
    return Rows(sequence.request.params, sequence.prompt_length, sequence.tokens, part.candidates, part.draws, matcher)


def _drawing_spans(step: list[Scheduled]) -> list[range]:
    """Of each member of a step, its drawing rows among all sampled rows."""
    spans, end = [], 0
    for part in step:
        end += part.window.sample
        spans.append(range(end - part.draws, end))
    return spans
