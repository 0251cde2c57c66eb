"""A drafter in this process: what its tokens cost."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import pytest

from paceline.speculation.frames import Advance, DraftFailureReason, SparseRow
from paceline.speculation.local import LocalProposer
from paceline.speculation.proposer import Wanted
from paceline.types import SamplingParams

FIRST_S, NEXT_S, SLOW_S = 0.004, 0.001, 0.5
PARAMS = SamplingParams(seed=1)


@dataclass
class Answered:
    key: Hashable
    base: int
    tokens: tuple[int, ...]
    failure: DraftFailureReason | None = None
    probs: tuple[SparseRow, ...] = ()


@dataclass
class Scripted:
    """A drafter whose first token of a turn takes longer than the others, and now and then something very long."""

    now: float = 0.0
    depth: int = 0
    drafted: int = 0
    drafted_tokens: int = 0
    accidents: set[int] = field(default_factory=set)
    rejection: bool = False

    @property
    def has_work(self) -> bool:
        return self.drafted < self.depth

    @property
    def passes(self) -> int:
        return self.drafted_tokens

    def open(
        self, key: Hashable, tokens: Sequence[int], params: SamplingParams, depth: int, *, rejection: bool = False
    ) -> None:
        self.rejection = rejection

    def advance(self, key: Hashable, base: int, tokens: Sequence[int], depth: int) -> None:
        self.depth, self.drafted = depth, 0

    def close(self, key: Hashable) -> None:
        """Nothing is kept."""

    def step(self) -> list[Answered]:
        self.now += SLOW_S if self.drafted_tokens in self.accidents else NEXT_S if self.drafted else FIRST_S
        self.drafted += 1
        self.drafted_tokens += 1
        return [] if self.has_work else [Answered(1, 3, tuple(range(self.depth)))]


def turns(drafter: Scripted, *depths: int) -> LocalProposer:
    proposer = LocalProposer(drafter, lambda: drafter.now)
    proposer.open(1, (7, 8, 9), PARAMS)
    for depth in depths:
        proposer.advance([Advance(1, 3, (), depth)])
        assert proposer.propose([Wanted(1, 3, depth)])[1].tokens == tuple(range(depth))
    return proposer


def test_before_anything_is_known_a_draft_costs_nothing() -> None:
    assert turns(Scripted()).latency(4) == 0.0


def test_a_first_token_and_those_after_it_have_costs_of_their_own() -> None:
    """So that a while of depth 1 does not make deeper drafts look dear."""
    proposer = turns(Scripted(), 4, 4, 4, *[1] * 40)
    assert [proposer.latency(depth) for depth in (0, 1, 4)] == pytest.approx([0.0, FIRST_S, FIRST_S + 3 * NEXT_S])


def test_where_only_first_tokens_are_known_the_others_are_worth_a_try() -> None:
    assert turns(Scripted(), *[1] * 9).latency(3) == pytest.approx(FIRST_S)


def test_one_accident_changes_nothing() -> None:
    proposer = turns(Scripted(accidents={9}), *[4] * 9)
    assert proposer.latency(4) == pytest.approx(FIRST_S + 3 * NEXT_S)


def test_steps_that_are_always_slow_are_believed() -> None:
    proposer = turns(Scripted(accidents=set(range(100))), *[4] * 9)
    assert proposer.latency(4) == pytest.approx(4 * SLOW_S)
