"""The candidates a target holds for one sequence: what its drafter said of the text beyond the agreed tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from paceline.speculation.frames import MAX_AHEAD, MAX_DEPTH, Candidates, SparseRow

LONGEST_RUN = MAX_DEPTH + MAX_AHEAD


@dataclass(slots=True)
class RunCounts:
    """Tokens heard, and what became of them: heard = confirmed + wasted + those still held."""

    heard: int = 0
    confirmed: int = 0
    wasted: int = 0


@dataclass(eq=False, slots=True)
class Run:
    """Agreed tokens, and the candidates that follow them.

        agreed ────────────┬─ candidates ─┐
        0                  length         heard

    `heard` is the position up to which the drafter's present text is known. It may lie before `length`: the target
    went on without the rest, which is compared with what was agreed as it comes in.

    A drafter that knew fewer than `valid_from` agreed tokens did not know yet that its text and the target's part
    at the position before; what it says is dropped.
    """

    tokens: list[int]
    counts: RunCounts
    candidates: list[int] = field(default_factory=list)
    probs: list[SparseRow] = field(default_factory=list)
    valid_from: int = 0
    heard: int = 0

    def __post_init__(self) -> None:
        self.restart()

    @property
    def length(self) -> int:
        return len(self.tokens)

    def restart(self) -> None:
        """Nothing is heard yet: the sequence goes to a drafter that knows all of it, or to none."""
        self._drop(0)
        self.valid_from = self.heard = self.length

    def commit(self, tokens: Sequence[int]) -> None:
        """The target agreed on these. Candidates that say the same are confirmed, those beyond them stay."""
        same = common_prefix(self.candidates, tokens)
        if same < min(len(self.candidates), len(tokens)):
            self._part(self.length + same)
        self.counts.confirmed += same
        del self.candidates[:same], self.probs[:same]
        self.tokens += tokens

    def take(self, reply: Candidates) -> bool:
        """Add what a drafter says. False if something before it never arrived, so that it cannot be placed."""
        self.counts.heard += len(reply.tokens)
        if not self.valid_from <= reply.base <= self.length:
            self.counts.wasted += len(reply.tokens)
            return True
        start = reply.base + reply.offset
        if reply.offset and start > self.heard:
            self.counts.wasted += len(reply.tokens)
            return False
        for n, token in enumerate(reply.tokens):
            position = start + n
            if position < self.length:
                if token != self.tokens[position]:
                    self.counts.wasted += len(reply.tokens) - n
                    self._part(position)
                    return True
                self.counts.wasted += 1
                self.heard = max(self.heard, position + 1)
            else:
                self._put(position - self.length, token, reply.probs[n : n + 1])
        return True

    def _put(self, place: int, token: int, row: Sequence[SparseRow]) -> None:
        """A candidate. One that is held already stays, another in its place ends the run there."""
        if place < len(self.candidates) and self.candidates[place] != token:
            self._drop(place)
        if place != len(self.candidates) or place >= LONGEST_RUN:
            self.counts.wasted += 1
            return
        self.candidates.append(token)
        self.probs += row
        self.heard = self.length + place + 1

    def _part(self, position: int) -> None:
        """The drafter's text and the target's differ there."""
        self._drop(max(0, position - self.length))
        self.valid_from, self.heard = position + 1, position

    def _drop(self, place: int) -> None:
        self.counts.wasted += len(self.candidates) - place
        del self.candidates[place:], self.probs[place:]


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens agree."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
