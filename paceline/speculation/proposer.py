"""What the engine asks of a source of candidates, whoever computes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from paceline.speculation.frames import Advance, SparseRow
from paceline.types import SamplingParams


class Source(StrEnum):
    """Who guessed: a draft replica, a draft model in this process, or the sequence's own text."""

    REMOTE = "remote"
    LOCAL = "local"
    LOOKUP = "prompt_lookup"


@dataclass(frozen=True, slots=True)
class Wanted:
    """Up to `depth` candidates for positions base, base + 1, … of a sequence that has `base` tokens."""

    sequence: int
    base: int
    depth: int


@dataclass(frozen=True, slots=True)
class Proposal:
    """Candidates for the positions after a sequence's last token.

    `probs` has, under rejection sampling, a row for each token: the distribution it was drawn from. Without
    them a candidate counts as certain: its distribution is the token alone.
    """

    tokens: tuple[int, ...]
    source: Source
    probs: tuple[SparseRow, ...] = ()

    def first(self, count: int) -> Proposal:
        """Its first `count` candidates."""
        return (
            self if count >= len(self.tokens) else replace(self, tokens=self.tokens[:count], probs=self.probs[:count])
        )


class Proposer(ABC):
    """Candidates for running sequences. Never raises, never waits without a deadline, may always say nothing.

    The engine calls, from its own thread: `open` when a sequence is admitted, `propose` before each step,
    `advance` once after each step with everything that was committed, `close` at the end.
    """

    @abstractmethod
    def open(self, sequence: int, tokens: Sequence[int], params: SamplingParams, trace: str = "") -> None:
        """A sequence begins; `tokens` is its prompt, which may be prefilled while the target does the same. `trace` is
        its request's (`paceline.types.Request`)."""

    @abstractmethod
    def propose(self, wanted: Sequence[Wanted]) -> Mapping[int, Proposal]:
        """Candidates by sequence. A sequence without any is absent: it decodes plainly in this step."""

    @abstractmethod
    def advance(self, updates: Sequence[Advance]) -> None:
        """One step's commits, each with the number of candidates wanted next."""

    @abstractmethod
    def close(self, sequence: int) -> None:
        """The sequence ended or was cancelled."""

    @abstractmethod
    def serves(self, sequence: int) -> bool:
        """Whether candidates for this sequence can be expected at all now."""

    @abstractmethod
    def latency(self, depth: int) -> float:
        """Seconds a step waits for `depth` candidates, as measured lately; 0 if they cost no waiting."""
