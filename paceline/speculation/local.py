"""Candidates from a drafter in this process: the same interface, no wire."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Protocol

from paceline.speculation.frames import Advance, DraftFailureReason
from paceline.speculation.proposer import Proposal, Proposer, Source, Wanted
from paceline.types import SamplingParams

SMOOTHING = 0.2
"""Weight of the latest measurement."""


class Answer(Protocol):
    """What a drafter's step yields."""

    @property
    def key(self) -> Hashable: ...
    @property
    def base(self) -> int: ...
    @property
    def tokens(self) -> tuple[int, ...]: ...
    @property
    def failure(self) -> DraftFailureReason | None: ...


class DrafterLike(Protocol):
    """The part of `paceline.engine.drafter.Drafter` used here."""

    @property
    def has_work(self) -> bool: ...
    def open(self, key: Hashable, tokens: Sequence[int], params: SamplingParams, depth: int) -> None: ...
    def advance(self, key: Hashable, base: int, tokens: Sequence[int], depth: int) -> None: ...
    def close(self, key: Hashable) -> None: ...
    def step(self) -> Iterable[Answer]: ...


class LocalProposer(Proposer):
    """Runs the drafter inside `propose`, until it has nothing left to do. Its deadline is its own work."""

    def __init__(self, drafter: DrafterLike) -> None:
        self._drafter = drafter
        self._ready: dict[int, Answer] = {}
        self._open: set[int] = set()
        self._token_s = 0.0

    def open(self, sequence: int, tokens: Sequence[int], params: SamplingParams) -> None:
        self._open.add(sequence)
        self._drafter.open(sequence, tokens, params, depth=0)

    def advance(self, updates: Sequence[Advance]) -> None:
        for update in updates:
            self._ready.pop(update.sequence, None)
            self._drafter.advance(update.sequence, update.base, update.tokens, update.depth)

    def propose(self, wanted: Sequence[Wanted]) -> Mapping[int, Proposal]:
        began = time.perf_counter()
        while self._drafter.has_work:
            for answer in self._drafter.step():
                if answer.failure is None and isinstance(answer.key, int):
                    self._ready[answer.key] = answer
        found = {}
        for want in wanted:
            ready = self._ready.get(want.sequence)
            if ready is not None and ready.base == want.base:
                found[want.sequence] = Proposal(ready.tokens[: want.depth], Source.LOCAL)
        if depth := max((len(proposal.tokens) for proposal in found.values()), default=0):
            self._token_s += SMOOTHING * ((time.perf_counter() - began) / depth - self._token_s)
        return found

    def close(self, sequence: int) -> None:
        self._open.discard(sequence)
        self._ready.pop(sequence, None)
        self._drafter.close(sequence)

    def serves(self, sequence: int) -> bool:
        return sequence in self._open

    def latency(self, depth: int) -> float:
        return depth * self._token_s
