"""A simulated engine with a simulated clock: steps cost what a formula says, texts and drafts are made up.

What it measures is the policy alone: the same loads with and without it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from paceline.speculation.controller import Controller, Policy
from paceline.speculation.cost import VerifyCost
from paceline.speculation.frames import Advance
from paceline.speculation.proposer import Proposal, Proposer, Source, Wanted
from paceline.speculation.speculator import Outcome, Speculator
from paceline.types import SamplingParams

WRONG = 1 << 20
POINTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64)
GREEDY = SamplingParams(temperature=0.0)


def flat_then_steep(rows: int) -> float:
    """Milliseconds of a pass that reads its weights once for up to eight rows: 10, then 1 more for each row."""
    return 10.0 + 0.2 * min(rows, 8) + 1.0 * max(0, rows - 8)


def steps_of_six(rows: int) -> float:
    """Tiles of six rows: each begun tile costs."""
    return 9.0 + 1.5 * -(-rows // 6) + 0.1 * rows


@dataclass
class Draft(Proposer):
    """Candidates that are right with a probability; a step waits for them, and its pass may be slower meanwhile."""

    world: World
    right: float = 0.8
    wait_ms: float = 0.0
    token_ms: float = 0.0
    there: bool = True
    asked: int = 0
    known: dict[int, int] = field(default_factory=dict)

    def open(self, sequence: int, tokens: Sequence[int], params: SamplingParams, trace: str = "") -> None:
        self.known[sequence] = len(tokens)

    def propose(self, wanted: Sequence[Wanted]) -> Mapping[int, Proposal]:
        self.asked += 1
        self.world.now += self._seconds(max(want.depth for want in wanted))
        if not self.there:
            return {}
        return {want.sequence: self._proposal(want) for want in wanted}

    def advance(self, updates: Sequence[Advance]) -> None:
        for update in updates:
            assert self.known[update.sequence] == update.base
            self.known[update.sequence] += len(update.tokens)

    def close(self, sequence: int) -> None:
        del self.known[sequence]

    def serves(self, sequence: int) -> bool:
        return True

    def latency(self, depth: int) -> float:
        return self._seconds(depth)

    def _seconds(self, depth: int) -> float:
        return (self.wait_ms + depth * self.token_ms) / 1e3

    def _proposal(self, want: Wanted) -> Proposal:
        assert self.known[want.sequence] == want.base
        stream, draw = self.world.streams[want.sequence], self.world.random
        tokens = tuple(
            stream.token(position) if draw.random() < self.right else WRONG
            for position in range(want.base, want.base + want.depth)
        )
        return Proposal(tokens, Source.REMOTE)


@dataclass
class Stream:
    """A text: new words only, or a repetition of its prompt that now and then says something of its own."""

    sequence: int
    quotes: bool
    length: int
    prompt: int = 400

    def token(self, position: int) -> int:
        if position < self.prompt or not self.quotes or position % 23 == 0:
            return self.sequence * 10_000 + position
        return self.sequence * 10_000 + position % self.prompt


@dataclass
class World:
    """`cost` is milliseconds by rows; `curve` what was measured of it at start-up, its own points if None.

    `shared` is what a pass is slowed down by while a draft is at work on the same cores.
    """

    cost: Callable[[int], float]
    policy: Callable[[VerifyCost], Policy] | None = Controller
    lookup_tokens: int = 8
    curve: Callable[[int], float] | None = None
    noise: float = 0.1
    shared: float = 1.0
    prefill: int = 0
    max_depth: int = 8
    with_draft: bool = False
    now: float = 0.0
    tokens: int = 0
    candidates: int = 0
    slow: float = 1.0

    def __post_init__(self) -> None:
        self.random = random.Random(5)
        self.streams: dict[int, Stream] = {}
        self.draft = Draft(self)
        known = VerifyCost({rows: (self.curve or self.cost)(rows) / 1e3 for rows in POINTS})
        self.speculator = self.policy and Speculator(
            self.policy(known),
            max_depth=self.max_depth,
            draft=self.draft if self.with_draft else None,
            lookup_tokens=self.lookup_tokens,
            clock=lambda: self.now,
        )

    def add(self, count: int = 1, *, quotes: bool = False) -> World:
        for _ in range(count):
            name = max(self.streams, default=0) + 1
            stream = self.streams[name] = Stream(name, quotes, 400)
            if self.speculator is not None:
                self.speculator.open(name, [stream.token(p) for p in range(stream.length)], GREEDY)
        return self

    def remove(self, count: int) -> None:
        for name in list(self.streams)[:count]:
            del self.streams[name]
            if self.speculator is not None:
                self.speculator.close(name)

    def run(self, steps: int) -> float:
        """Tokens a second over that many steps."""
        began, before = self.now, self.tokens
        for _ in range(steps):
            self.step()
        return (self.tokens - before) / (self.now - began)

    def step(self) -> None:
        wanted = [Wanted(name, stream.length, self.max_depth) for name, stream in self.streams.items()]
        asked = self.draft.asked
        found = self.speculator.propose(wanted, self.prefill).found if self.speculator is not None else {}
        rows = len(wanted) + sum(len(proposal.tokens) for proposal in found.values())
        spread = self.random.lognormvariate(0, self.noise) * (self.shared if self.draft.asked > asked else 1.0)
        self.now += self.cost(rows + self.prefill) / 1e3 * spread * self.slow
        outcomes = [self._outcome(stream, found.get(name)) for name, stream in self.streams.items()]
        self.candidates += rows - len(wanted)
        if self.speculator is not None:
            self.speculator.commit(outcomes, self.prefill, self.prefill)

    def _outcome(self, stream: Stream, proposal: Proposal | None) -> Outcome:
        candidates = proposal.tokens if proposal is not None else ()
        base, accepted = stream.length, 0
        while accepted < len(candidates) and candidates[accepted] == stream.token(base + accepted):
            accepted += 1
        new = tuple(stream.token(base + n) for n in range(accepted + 1))
        stream.length += len(new)
        self.tokens += len(new)
        return Outcome(stream.sequence, base, new, 1 + len(candidates), self.max_depth, decoding=True, finished=False)
