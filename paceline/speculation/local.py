"""Candidates from a drafter in this process: the same interface, no wire."""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Protocol

from paceline.speculation.frames import Advance, DraftFailureReason, SparseRow
from paceline.speculation.proposer import Proposal, Proposer, Source, Wanted
from paceline.speculation.waiting import Typical
from paceline.types import SamplingParams


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
    @property
    def probs(self) -> tuple[SparseRow, ...]: ...


class DrafterLike(Protocol):
    """The part of `paceline.engine.drafter.Drafter` used here."""

    @property
    def has_work(self) -> bool: ...
    @property
    def drafted_tokens(self) -> int: ...
    @property
    def passes(self) -> int: ...
    def open(
        self, key: Hashable, tokens: Sequence[int], params: SamplingParams, depth: int, *, rejection: bool = False
    ) -> None: ...
    def advance(self, key: Hashable, base: int, tokens: Sequence[int], depth: int) -> None: ...
    def close(self, key: Hashable) -> None: ...
    def step(self) -> Iterable[Answer]: ...


class LocalProposer(Proposer):
    """Runs the drafter inside `propose`, until it has nothing left to do. Its deadline is its own work.

    For `rejection` sampling candidates bring the distributions they were drawn from.
    """

    def __init__(
        self, drafter: DrafterLike, clock: Callable[[], float] = time.perf_counter, *, rejection: bool = False
    ) -> None:
        self._drafter, self._rejection = drafter, rejection
        self._clock = clock
        self._ready: dict[int, Answer] = {}
        self._open: set[Hashable] = set()
        self._new = False
        self._first_s, self._next_s = Typical(), Typical()

    def open(self, sequence: int, tokens: Sequence[int], params: SamplingParams, trace: str = "") -> None:  # noqa: ARG002
        self._open.add(sequence)
        self._new = True
        self._drafter.open(sequence, tokens, params, depth=0, rejection=self._rejection)

    def advance(self, updates: Sequence[Advance]) -> None:
        for update in updates:
            self._ready.pop(update.sequence, None)
            if update.sequence in self._open:
                self._drafter.advance(update.sequence, update.base, update.tokens, update.depth)

    def propose(self, wanted: Sequence[Wanted]) -> Mapping[int, Proposal]:
        drafting = 0
        while self._drafter.has_work:
            began, drafted, passes = self._clock(), self._drafter.drafted_tokens, self._drafter.passes
            for answer in self._drafter.step():
                if answer.failure is not None:
                    # It has forgotten the sequence, which goes on without drafts.
                    self._open.discard(answer.key)
                elif isinstance(answer.key, int):
                    self._ready[answer.key] = answer
            if self._drafter.drafted_tokens > drafted:
                made = max(1, self._drafter.passes - passes)
                for place in range(drafting, drafting + made):
                    self._note_step(place, (self._clock() - began) / made)
                drafting += made
        found = {}
        for want in wanted:
            ready = self._ready.get(want.sequence)
            if ready is not None and ready.base == want.base:
                found[want.sequence] = Proposal(ready.tokens, Source.LOCAL, ready.probs).first(want.depth)
        return found

    def close(self, sequence: int) -> None:
        self._open.discard(sequence)
        self._ready.pop(sequence, None)
        self._drafter.close(sequence)

    def serves(self, sequence: int) -> bool:
        return sequence in self._open

    def latency(self, depth: int) -> float:
        """A first token costs more than one after it: the target's pass has had the caches in between. What is not
        known yet is believed to cost nothing, so that it is tried."""
        return (self._first_s.mean or 0.0) + (depth - 1) * (self._next_s.mean or 0.0) if depth else 0.0

    def _note_step(self, place: int, seconds: float) -> None:
        """The first step after an opening has computed a prompt as well, and does not say what a token costs."""
        if not self._new:
            (self._next_s if place else self._first_s).note(seconds)
        self._new = False
