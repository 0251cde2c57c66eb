"""Target and drafter over a wire that does its worst: the tokens never change, no wait outlives its deadline, no KV
is left behind, and once the wire behaves there are drafts again."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from paceline.engine.draft_streams import IDLE_S, SWEEP_S
from paceline.speculation.frames import DraftFrame
from paceline.speculation.remote import LONGEST_REST_S
from paceline.types import Request
from paceline.v1 import draft_pb2 as pb
from tests import tiny
from tests.speculation.wire import Clock, DraftSide, TargetSide, Wire

MODEL = tiny.tiny_llama(num_hidden_layers=1)
TIMEOUT_S = 1.0
SEEDED: dict[str, Any] = {"temperature": 0.8, "top_p": 0.95, "seed": 11}


@functools.cache
def noisy(share: float = 0.05) -> Any:
    """The same model, a little off: a draft that is right for a while and then is not."""
    torch.manual_seed(5)
    twin = copy.deepcopy(MODEL)
    with torch.no_grad():
        for weights in twin.parameters():
            weights += share * weights.std() * torch.randn_like(weights)
    return twin


@functools.cache
def plain(request: Request) -> list[int]:
    return tiny.run(tiny.engine_for(MODEL), request)[request.request_id]


def pair(draft_model: Any = MODEL, passes: int = 6, **options: Any) -> tuple[TargetSide, Wire]:
    """A drafter that makes so many passes while the target makes one."""
    clock = Clock()
    target = TargetSide(MODEL, clock, TIMEOUT_S, **options)
    wire = Wire("s", "d", target.proposer, DraftSide(draft_model, clock))
    target.meanwhile = wire.pump
    target.computing = lambda: [wire.pump() for _ in range(passes)]
    return target, wire


def closed(wire: Wire) -> bool:
    """Whether the drafter holds nothing once it has heard everything."""
    while wire.pump():
        pass
    drafter = wire.draft.drafter
    drafter.kv.check()
    return (drafter.num_sequences, drafter.kv.usage().in_use) == (0, 0)


# A wire that behaves.


@pytest.mark.parametrize("draft_model", [MODEL, noisy()], ids=["same", "noisy"])
@pytest.mark.parametrize("params", [{}, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("ahead", [0, 3, 8])
def test_tokens_equal_plain_decoding(draft_model: Any, params: dict[str, Any], ahead: int) -> None:
    target, wire = pair(draft_model, ahead=ahead)
    request = tiny.request(tiny.prompt(9), max_tokens=60, **params)
    target.run(request)
    assert (target.tokens["r"], closed(wire)) == (plain(request), True)


def test_a_drafter_that_is_right_is_waited_for_once() -> None:
    """After that it is ahead: while the target verifies four, it drafts the bonus token and the next four."""
    target, _ = pair(ahead=8)
    target.run(tiny.request(tiny.prompt(9), max_tokens=60))
    assert target.proposer.stats.waits == 1


def test_a_drafter_without_credit_is_waited_for_at_every_step() -> None:
    target, _ = pair(ahead=0)
    target.run(tiny.request(tiny.prompt(9), max_tokens=60))
    assert target.proposer.stats.waits == 12  # 60 tokens: one with the prompt, then runs of five


def test_every_token_heard_is_accounted_for() -> None:
    target, wire = pair(noisy())
    target.run(tiny.request(tiny.prompt(9), max_tokens=60))
    closed(wire)
    target.proposer.check()
    counts = target.proposer.stats.tokens
    assert counts.heard == counts.confirmed + counts.wasted == wire.draft.drafter.drafted_tokens


def test_rows_of_rejection_sampling_cross() -> None:
    target, wire = pair(noisy(), verification="rejection")
    target.run(tiny.request(tiny.prompt(9), max_tokens=60, **SEEDED))
    assert (target.proposer.stats.tokens.confirmed > 0, closed(wire)) == (True, True)


# What it weighs.


def bytes_per_token(draft_model: Any, sequences: int, tokens: int = 96, **options: Any) -> float:
    """Of all messages in both directions, the prompts among them."""
    target, wire = pair(draft_model, **options)
    for number in range(sequences):
        target.add(tiny.request(tiny.prompt(8, seed=number), f"r{number}", max_tokens=tokens, **SEEDED))
    target.run()
    return (wire.bytes_sent + wire.bytes_received) / (sequences * tokens)


@pytest.mark.parametrize(
    ("draft_model", "sequences"),
    [
        pytest.param(MODEL, 1, id="same"),
        pytest.param(MODEL, 8, id="same-8"),
        pytest.param(noisy(), 1, id="noisy"),
        pytest.param(noisy(), 8, id="noisy-8"),
        pytest.param(tiny.tiny_llama(seed=7), 1, id="useless"),
        pytest.param(tiny.tiny_llama(seed=7), 8, id="useless-8", marks=pytest.mark.slow),
    ],
)
def test_a_token_costs_less_than_a_hundred_bytes(draft_model: Any, sequences: int) -> None:
    assert bytes_per_token(draft_model, sequences) < 100


# A wire that does not.

NAMES = st.sampled_from(["a", "b"])
WHICH = st.integers(0, 5)
REQUESTS = [
    tiny.request(tiny.prompt(9), "r0", max_tokens=30),
    tiny.request(tiny.prompt(20, seed=1), "r1", max_tokens=40, **SEEDED),
    tiny.request(tiny.prompt(40, seed=2), "r2", max_tokens=12, **SEEDED | {"seed": 3}),
    tiny.request(tiny.prompt(3, seed=3), "r3", max_tokens=50),
]


class Chaos(RuleBasedStateMachine):
    """Two drafters, one exact and one noisy; frames are lost, late, doubled, out of order or wrong; either side
    restarts, either end of a stream breaks first."""

    @initialize()
    def begin(self) -> None:
        self.clock = Clock()
        self.drafts = {"a": DraftSide(MODEL, self.clock), "b": DraftSide(noisy(), self.clock, capacity=200)}
        self.links: dict[str, Wire] = {}
        self.broken: list[Wire] = []
        self.responsive: set[str] = set()
        self.streams = 0
        self.target = self._new_target()
        self.connect("a")

    def _new_target(self) -> TargetSide:
        return TargetSide(MODEL, self.clock, TIMEOUT_S, meanwhile=self._meanwhile, computing=self._meanwhile)

    def _meanwhile(self) -> bool:
        moved = [self.links[name].pump() for name in sorted(self.responsive & self.links.keys())]
        return any(moved)

    # Work.

    @rule(number=st.integers(0, len(REQUESTS) - 1))
    def submit(self, number: int) -> None:
        name = REQUESTS[number].request_id
        if name not in self.target.tokens:
            self.target.add(REQUESTS[number])

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.target.step()

    @rule(name=NAMES, times=st.integers(1, 6))
    def flow(self, name: str, times: int) -> None:
        if name in self.links:
            for _ in range(times):
                self.links[name].pump()

    @rule(name=NAMES)
    def deliver_up(self, name: str) -> None:
        if name in self.links:
            self.links[name].deliver_up()

    @rule(name=NAMES)
    def deliver_down(self, name: str) -> None:
        if name in self.links:
            self.links[name].deliver_down()

    @rule(name=NAMES)
    def draft(self, name: str) -> None:
        self.drafts[name].work()

    @rule(name=NAMES, on=st.booleans())
    def answer_while_waited_for(self, name: str, on: bool) -> None:
        self.responsive = self.responsive | {name} if on else self.responsive - {name}

    @rule(seconds=st.sampled_from([0.05, 0.5, 1.0, 3.0, 40.0, 150.0]))
    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds

    # Faults.

    def _queues(self, name: str) -> list[list[bytes]]:
        return [self.links[name].up, self.links[name].down] if name in self.links else []

    @rule(name=NAMES, where=WHICH)
    def lose(self, name: str, where: int) -> None:
        for queue in self._queues(name):
            del queue[where : where + 1]

    @rule(name=NAMES, where=WHICH)
    def double(self, name: str, where: int) -> None:
        for queue in self._queues(name):
            queue += queue[where : where + 1]

    @rule(name=NAMES, where=WHICH)
    def reorder(self, name: str, where: int) -> None:
        for queue in self._queues(name):
            queue[where : where + 2] = reversed(queue[where : where + 2])

    @rule(name=NAMES, where=WHICH, by=st.sampled_from([-3, -1, 1, 5]))
    def misplace(self, name: str, where: int, by: int) -> None:
        """Another base in whatever has one."""
        for queue, kind in zip(self._queues(name), (pb.DraftRequest, pb.DraftReply), strict=False):
            if where < len(queue):
                message = kind.FromString(queue[where])
                parts = message.advance if isinstance(message, pb.DraftRequest) else message.candidates
                for part in parts:
                    part.base = max(0, part.base + by)
                queue[where] = message.SerializeToString()

    @rule(name=NAMES)
    def connect(self, name: str) -> None:
        """A stream, also where there is one: the old one's end was not noticed yet."""
        if name in self.links:
            self.broken.append(self.links[name])
        self.streams += 1
        self.links[name] = Wire(f"{name}#{self.streams}", name, self.target.proposer, self.drafts[name])

    @rule(name=NAMES)
    def reset(self, name: str) -> None:
        """The target's end notices first."""
        if name in self.links:
            wire = self.links.pop(name)
            wire.cut()
            self.broken.append(wire)

    @precondition(lambda self: bool(self.broken))
    @rule()
    def notice(self) -> None:
        """A stream that ended is noticed at its other ends, late."""
        wire = self.broken.pop()
        wire.cut()
        wire.cut_below()

    @rule(name=NAMES)
    def restart_draft(self, name: str) -> None:
        self.reset(name)
        self.drafts[name].restart()

    @rule()
    def restart_target(self) -> None:
        for name in list(self.links):
            self.reset(name)
        unfinished = [r for r in REQUESTS if len(self.target.tokens.get(r.request_id, [])) < _length(r)]
        old, self.target = self.target, self._new_target()
        self.target.tokens |= old.tokens
        for request in unfinished:
            if request.request_id in old.tokens:
                self.target.add(request)

    # What always holds.

    @invariant()
    def tokens_are_those_of_plain_decoding(self) -> None:
        for request in REQUESTS:
            found = self.target.tokens.get(request.request_id, [])
            assert found == plain(request)[: len(found)]

    @invariant()
    def no_wait_outlives_its_deadline(self) -> None:
        assert self.target.longest_wait_s <= TIMEOUT_S * 1.001

    @invariant()
    def the_books_close(self) -> None:
        self.target.proposer.check()
        self.target.engine.check()
        for draft in self.drafts.values():
            draft.drafter.kv.check()

    def teardown(self) -> None:
        """The faults end. Everything is answered; nobody holds anything; the drafters are used again."""
        while self.broken:
            self.notice()
        for name in self.drafts:
            if name not in self.links:
                self.connect(name)
        self.responsive = set(self.drafts)
        self.target.run()
        for request in REQUESTS:
            assert self.target.tokens.get(request.request_id) in (None, plain(request))
        self.clock.now += LONGEST_REST_S + IDLE_S + SWEEP_S
        confirmed = self.target.proposer.stats.tokens.confirmed
        again = tiny.request(tiny.prompt(12, seed=9), "again", max_tokens=40)
        self.target.run(again)
        assert self.target.tokens["again"] == plain(again)
        assert self.target.proposer.stats.tokens.confirmed > confirmed
        self.the_books_close()
        for wire in self.links.values():
            wire.send(DraftFrame())  # time to sweep
            assert closed(wire)


def _length(request: Request) -> int:
    return len(plain(request))


Chaos.TestCase.settings = settings(max_examples=30, stateful_step_count=40, suppress_health_check=list(HealthCheck))
test_whatever_the_wire_does = Chaos.TestCase
