"""How likely a candidate is accepted, given that those before it were: measured, by source and place.

A draft's candidates are told apart by their position in the run. Those of prompt lookup by how much text agrees
before them: a match of n tokens, and one more for each candidate before it, since each that is accepted is one
more token that agrees.

Every sequence has estimates of its own, which begin at those of all sequences together, which begin at a prior.
Old observations fade, so that a text that turns from quoting to inventing is noticed within some thirty tokens.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from enum import Enum

LOOKUP_LENGTHS = (1, 2, 3, 4, 5, 7, 10, 16)
"""Agreeing tokens from which on prompt lookup's candidates count as one kind, and what is expected of each kind."""
LOOKUP_PRIOR = (0.15, 0.3, 0.45, 0.55, 0.65, 0.75, 0.85, 0.9)
DRAFT_PRIOR = 0.7
PRIOR_WEIGHT = 4.0
"""Observations a prior is worth."""
MEMORY_OF_ALL = 0.997
MEMORY_OF_ONE = 0.97
MAX_DEPTH = 16


class Kind(Enum):
    """Two kinds of source: one that must be asked and takes time, one that is there at once."""

    DRAFT = "draft"
    LOOKUP = "lookup"


class _Rate:
    """Hits and trials that fade with the trials of the whole table."""

    __slots__ = ("at", "hits", "trials")

    def __init__(self) -> None:
        self.hits = self.trials = 0.0
        self.at = 0

    def note(self, hit: bool, now: int, memory: float) -> None:
        fade = memory ** (now - self.at)
        self.hits, self.trials, self.at = self.hits * fade + hit, self.trials * fade + 1.0, now

    def estimate(self, prior: float, now: int, memory: float) -> float:
        fade = memory ** (now - self.at)
        return (self.hits * fade + PRIOR_WEIGHT * prior) / (self.trials * fade + PRIOR_WEIGHT)


class _Table:
    """Rates of one kind of source. Its clock ticks with each run that is noted, so that a place which is not
    reached any more fades towards its prior too."""

    __slots__ = ("memory", "now", "rates")

    def __init__(self, size: int, memory: float) -> None:
        self.rates = [_Rate() for _ in range(size)]
        self.memory = memory
        self.now = 0

    def estimate(self, place: int, prior: float) -> float:
        return self.rates[place].estimate(prior, self.now, self.memory)


_SIZES = {Kind.DRAFT: MAX_DEPTH, Kind.LOOKUP: len(LOOKUP_LENGTHS)}


class Acceptance:
    """Estimates for all sequences."""

    def __init__(self) -> None:
        self._all = {kind: _Table(size, MEMORY_OF_ALL) for kind, size in _SIZES.items()}
        self._one: dict[tuple[int, Kind], _Table] = {}

    def close(self, sequence: int) -> None:
        for kind in Kind:
            self._one.pop((sequence, kind), None)

    def note(self, sequence: int, kind: Kind, matched: int, hits: int, missed: bool) -> None:
        """Of a run of candidates the first `hits` stood; `missed` says that the next one did not.

        `matched` is the length of the match they came from, for prompt lookup.
        """
        count = hits + missed
        if not count:
            return
        one = self._one.get((sequence, kind))
        if one is None:
            one = self._one[sequence, kind] = _Table(_SIZES[kind], MEMORY_OF_ONE)
        for table in (one, self._all[kind]):
            table.now += 1
            for n in range(count):
                table.rates[_place(kind, matched, n)].note(n < hits, table.now, table.memory)

    def run(self, sequence: int, kind: Kind, matched: int, count: int, least: float = 0.0) -> list[float]:
        """The probability of each of `count` candidates that it and all before it are accepted, down to `least`."""
        found, together = [], 1.0
        own, everyone = self._one.get((sequence, kind)), self._all[kind]
        prior = DRAFT_PRIOR
        for n in range(count):
            place = _place(kind, matched, n)
            if kind is Kind.LOOKUP:
                prior = LOOKUP_PRIOR[place]
            # A draft's deeper positions begin at what is known of the one before: they are seldom reached.
            rate = prior = everyone.estimate(place, prior)
            if own is not None:
                rate = own.estimate(place, rate)
            together *= rate
            if together < least:
                break
            found.append(together)
        return found


def _place(kind: Kind, matched: int, n: int) -> int:
    if kind is Kind.DRAFT:
        return min(n, MAX_DEPTH - 1)
    return bisect_right(LOOKUP_LENGTHS, matched + n) - 1


def agreeing(candidates: Sequence[int], tokens: Sequence[int]) -> tuple[int, bool]:
    """How many candidates the tokens confirm, and whether the next one is refuted rather than unknown."""
    hits = 0
    for candidate, token in zip(candidates, tokens, strict=False):
        if candidate != token:
            return hits, True
        hits += 1
    return hits, False
