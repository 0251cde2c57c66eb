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

from paceline.speculation.lookup import LONGEST_MATCH

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


_SIZES = {Kind.DRAFT: MAX_DEPTH, Kind.LOOKUP: len(LOOKUP_LENGTHS)}
_LARGEST = 1e100


class _Table:
    """Hits and trials by place. They fade with each run that is noted, so that a place which is not reached any more
    fades towards its prior too.

    Instead of making the old ones lighter, each is noted with more weight than the last.
    """

    __slots__ = ("fade", "hits", "trials", "weight")

    def __init__(self, size: int, memory: float) -> None:
        self.hits, self.trials = [0.0] * size, [0.0] * size
        self.weight, self.fade = 1.0, 1 / memory

    def note(self, places: Sequence[int], hits: int) -> None:
        """The first `hits` places of a run were hit, the others were not."""
        self.weight *= self.fade
        for n, place in enumerate(places):
            self.trials[place] += self.weight
            if n < hits:
                self.hits[place] += self.weight
        if self.weight > _LARGEST:
            self.hits = [x / self.weight for x in self.hits]
            self.trials = [x / self.weight for x in self.trials]
            self.weight = 1.0

    def estimate(self, place: int, prior: float) -> float:
        held = PRIOR_WEIGHT * self.weight
        return (self.hits[place] + held * prior) / (self.trials[place] + held)


class Acceptance:
    """Estimates for all sequences."""

    def __init__(self) -> None:
        self._all = {kind: _Table(size, MEMORY_OF_ALL) for kind, size in _SIZES.items()}
        self._one: dict[tuple[int, Kind], _Table] = {}
        self._of_all: dict[Kind, list[float]] = {}

    def close(self, sequence: int) -> None:
        for kind in Kind:
            self._one.pop((sequence, kind), None)

    def note(self, sequence: int, kind: Kind, matched: int, hits: int, missed: bool) -> None:
        """Of a run of candidates the first `hits` stood; `missed` says that the next one did not.

        `matched` is the length of the match they came from, for prompt lookup.
        """
        places = _places(kind, matched, hits + missed)
        if not places:
            return
        one = self._one.get((sequence, kind))
        if one is None:
            one = self._one[sequence, kind] = _Table(_SIZES[kind], MEMORY_OF_ONE)
        one.note(places, hits)
        self._all[kind].note(places, hits)
        self._of_all.pop(kind, None)

    def run(self, sequence: int, kind: Kind, matched: int, count: int, least: float = 0.0) -> list[float]:
        """The probability of each of `count` candidates that it and all before it are accepted, down to `least`."""
        found, together = [], 1.0
        own, rates = self._one.get((sequence, kind)), self._rates(kind)
        for place in _places(kind, matched, count):
            rate = rates[place]
            together *= rate if own is None else own.estimate(place, rate)
            if together < least:
                break
            found.append(together)
        return found

    def _rates(self, kind: Kind) -> list[float]:
        """Over all sequences, by place; kept until something is noted."""
        if kind not in self._of_all:
            table, rates, prior = self._all[kind], [], DRAFT_PRIOR
            for place in range(_SIZES[kind]):
                # A draft's deeper positions begin at what is known of the one before: they are seldom reached.
                prior = table.estimate(place, LOOKUP_PRIOR[place] if kind is Kind.LOOKUP else prior)
                rates.append(prior)
            self._of_all[kind] = rates
        return self._of_all[kind]


_DRAFT_PLACES = tuple(range(MAX_DEPTH))
_LOOKUP_PLACES = tuple(bisect_right(LOOKUP_LENGTHS, length) - 1 for length in range(LONGEST_MATCH + MAX_DEPTH))


def _places(kind: Kind, matched: int, count: int) -> tuple[int, ...]:
    return _DRAFT_PLACES[:count] if kind is Kind.DRAFT else _LOOKUP_PLACES[matched : matched + count]


def agreeing(candidates: Sequence[int], tokens: Sequence[int]) -> tuple[int, bool]:
    """How many candidates the tokens confirm, and whether the next one is refuted rather than unknown."""
    hits = 0
    for candidate, token in zip(candidates, tokens, strict=False):
        if candidate != token:
            return hits, True
        hits += 1
    return hits, False
