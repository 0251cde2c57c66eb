"""What the engine asks of a source of candidates, whoever computes them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from paceline.speculation.frames import Advance
from paceline.types import SamplingParams


@dataclass(frozen=True, slots=True)
class Wanted:
    """Up to `depth` candidates for positions base, base + 1, … of a sequence that has `base` tokens."""

    sequence: int
    base: int
    depth: int


class Proposer(ABC):
    """Candidates for running sequences. Never raises, never waits without a deadline, may always say nothing.

    The engine calls, from its own thread: `open` when a sequence is admitted, `propose` before each step,
    `advance` once after each step with everything that was committed, `close` at the end.
    """

    @abstractmethod
    def open(self, sequence: int, tokens: Sequence[int], params: SamplingParams) -> None:
        """A sequence begins; `tokens` is its prompt, which may be prefilled while the target does the same."""

    @abstractmethod
    def propose(self, wanted: Sequence[Wanted]) -> Mapping[int, tuple[int, ...]]:
        """Candidates by sequence. A sequence without any is absent: it decodes plainly in this step."""

    @abstractmethod
    def advance(self, updates: Sequence[Advance]) -> None:
        """One step's commits."""

    @abstractmethod
    def close(self, sequence: int) -> None:
        """The sequence ended or was cancelled."""
