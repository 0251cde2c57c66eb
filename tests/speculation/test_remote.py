"""Candidates from elsewhere: used if they are there and fit, and never waited for without reason."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from paceline.speculation.frames import (
    Advance,
    Candidates,
    DraftFailureReason,
    DraftFrame,
    Open,
    SparseRow,
)
from paceline.speculation.links import AFFINITY_TOKENS, MAX_OPENING_TOKENS, DraftLink
from paceline.speculation.proposer import Wanted
from paceline.speculation.remote import (
    AHEAD,
    COLD_S,
    FIRST_REFUSAL_S,
    FIRST_REST_S,
    LATE_BEFORE_REST,
    LONGEST_REST_S,
    SILENCE_S,
    RemoteProposer,
)
from paceline.speculation.waiting import SLACK_S
from paceline.types import SamplingParams

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
PARAMS = SamplingParams(seed=1)
FOR_EVER_S = 1e6
PATIENCE_S = 30.0
REOPEN = [DraftFailureReason.BASE_MISMATCH, DraftFailureReason.UNKNOWN_SEQUENCE]
REFUSE = [DraftFailureReason.BUSY, DraftFailureReason.UNSUPPORTED]


class FakeClock:
    """Time stands still until the test moves it. `asked` is set whenever someone looks."""

    def __init__(self) -> None:
        self.now = 100.0
        self.asked = threading.Event()

    def __call__(self) -> float:
        self.asked.set()
        return self.now


class FakeLink(DraftLink):
    """Records frames and keeps the books of an honest drafter; `answer` replies from inside `send`.

    Openings are acknowledged at once, as of a prompt that is computed, unless the drafter is `cold`.
    """

    def __init__(self, proposer: RemoteProposer, replica_id: str = "a") -> None:
        self.replica_id = replica_id
        self.frames: list[DraftFrame] = []
        self.held: dict[int, list[int]] = {}
        self.answer: Callable[[DraftFrame], list[Candidates]] | None = None
        self.cold = False
        self._proposer = proposer
        proposer.add_link(self)

    def send(self, frame: DraftFrame) -> None:
        self.frames.append(frame)
        for sequence in frame.closes:
            self.held.pop(sequence, None)
        for opened in frame.opens:
            self.held[opened.sequence] = list(opened.tokens)
        for step in frame.advances:
            assert step.base == len(self.held[step.sequence]), "an advance follows what this drafter was told"
            self.held[step.sequence] += step.tokens
        if not self.cold:
            for opened in frame.opens:
                self.reply(Candidates(opened.sequence, len(opened.tokens)))
        if self.answer is not None:
            self.reply(*self.answer(frame))

    def reply(self, *replies: Candidates) -> None:
        """Without replies it is a heartbeat."""
        self._proposer.receive(self, replies)

    def kill(self) -> None:
        self._proposer.remove_link(self)


class Setup:
    """A proposer, its clock, and an engine's view of its sequences."""

    def __init__(self, timeout_s: float = 0.0, links: Sequence[str] = ("a",)) -> None:
        self.clock = FakeClock()
        self.proposer = RemoteProposer(timeout_s, self.clock)
        self.links = {name: FakeLink(self.proposer, name) for name in links}
        self.tokens: dict[int, list[int]] = {}

    def open(self, sequence: int = 1, tokens: tuple[int, ...] = (10, 11, 12)) -> None:
        self.tokens[sequence] = list(tokens)
        self.proposer.open(sequence, tokens, PARAMS)

    def advance(self, *sequences: int, new: tuple[int, ...] = (7,), depth: int = 4) -> None:
        updates = []
        for sequence in sequences or tuple(self.tokens):
            updates.append(Advance(sequence, len(self.tokens[sequence]), new, depth))
            self.tokens[sequence] += new
        self.proposer.advance(updates)

    def propose(self, *sequences: int, depth: int = 4) -> dict[int, tuple[int, ...]]:
        wanted = [Wanted(s, len(self.tokens[s]), depth) for s in sequences or tuple(self.tokens)]
        return {s: proposal.tokens for s, proposal in self.proposer.propose(wanted).items()}

    def close(self, sequence: int = 1) -> None:
        del self.tokens[sequence]
        self.proposer.close(sequence)

    def be_late(self, times: int = LATE_BEFORE_REST) -> None:
        """Miss deadlines, and be heard of in between."""
        for _ in range(times):
            self.advance()
            self.propose()
            for link in self.links.values():
                link.reply()


def right(setup: Setup, sequence: int = 1, tokens: tuple[int, ...] = (1, 2, 3, 4), offset: int = 0) -> Candidates:
    return Candidates(sequence, len(setup.tokens[sequence]), tokens, offset=offset)


def failure(setup: Setup, reason: DraftFailureReason, sequence: int = 1) -> Candidates:
    return Candidates(sequence, len(setup.tokens[sequence]), failure=reason)


def opening(*tokens: int, depth: int = 4) -> Open:
    return Open(1, tokens, PARAMS, depth, 3, AHEAD)


# Without a link.


def test_without_a_link_nothing_is_proposed_and_nothing_waited_for() -> None:
    setup = Setup(FOR_EVER_S, links=())
    setup.open()
    setup.advance()
    assert setup.propose() == {}


def test_a_sequence_nobody_opened_has_no_candidates() -> None:
    assert Setup(FOR_EVER_S).proposer.propose([Wanted(9, 3, 4)]) == {}


def test_a_prefilled_sequence_that_was_never_advanced_is_not_waited_for() -> None:
    setup = Setup(FOR_EVER_S)
    setup.open()
    assert setup.propose() == {}


def test_depth_zero_is_not_waited_for() -> None:
    setup = Setup(FOR_EVER_S)
    setup.open()
    setup.advance(depth=0)
    assert setup.propose() == {}


# With one.


def test_opening_sends_the_history_and_prefills_only() -> None:
    setup = Setup()
    setup.open()
    assert setup.links["a"].frames == [DraftFrame(opens=(opening(10, 11, 12, depth=0),))]


def test_one_step_is_one_frame() -> None:
    setup = Setup()
    setup.open(1)
    setup.open(2)
    setup.advance(1, 2)
    assert setup.links["a"].frames[2:] == [DraftFrame(advances=(Advance(1, 3, (7,), 4), Advance(2, 3, (7,), 4)))]


def test_a_reply_at_the_base_is_used() -> None:
    setup = Setup(FOR_EVER_S)
    setup.open()
    setup.advance()
    setup.links["a"].reply(right(setup))
    assert setup.propose() == {1: (1, 2, 3, 4)}


def test_no_more_than_the_depth_is_proposed() -> None:
    setup = Setup(FOR_EVER_S)
    setup.open()
    setup.advance()
    setup.links["a"].reply(right(setup))
    assert setup.propose(depth=2) == {1: (1, 2)}


def test_a_link_may_answer_inside_send() -> None:
    setup = Setup(FOR_EVER_S)
    setup.links["a"].answer = lambda frame: [Candidates(s.sequence, s.base + 1, (5, 6)) for s in frame.advances]
    setup.open()
    setup.advance(depth=2)
    assert setup.propose() == {1: (5, 6)}


def test_candidates_stay_until_the_sequence_advances() -> None:
    setup = Setup(FOR_EVER_S)
    setup.open()
    setup.advance()
    setup.links["a"].reply(right(setup))
    assert setup.propose() == setup.propose()


def test_candidates_are_gone_once_the_sequence_advanced() -> None:
    setup = Setup()
    setup.open()
    setup.advance()
    setup.links["a"].reply(right(setup))
    setup.advance()
    assert setup.propose() == {}


@pytest.mark.parametrize("off", [-1, 1])
def test_a_reply_for_another_base_is_wasted(off: int) -> None:
    setup = Setup()
    setup.open()
    setup.advance()
    setup.links["a"].reply(Candidates(1, 4 + off, (1, 2, 3)))
    assert (setup.propose(), setup.proposer.stats.wasted) == ({}, 3)


def test_a_reply_of_a_link_that_does_not_hold_the_sequence_is_wasted() -> None:
    setup = Setup(links=("a", "b"))
    setup.open()
    setup.advance()
    (other,) = (link for link in setup.links.values() if not link.held)
    other.reply(right(setup))
    assert (setup.propose(), setup.proposer.stats.wasted) == ({}, 4)


def test_closing_tells_the_drafter() -> None:
    setup = Setup()
    setup.open()
    setup.close()
    assert setup.links["a"].frames[1:] == [DraftFrame(closes=(1,))]


def test_a_reply_for_a_closed_sequence_is_wasted() -> None:
    setup = Setup()
    setup.open()
    setup.advance()
    reply = right(setup)
    setup.close()
    setup.links["a"].reply(reply)
    assert setup.proposer.stats.wasted == 4


def test_sequences_go_to_the_least_loaded_link() -> None:
    setup = Setup(links=("a", "b", "c"))
    for sequence in range(7):
        setup.open(sequence)
    assert sorted(len(link.held) for link in setup.links.values()) == [2, 2, 3]
    (idlest, *_) = sorted(setup.links.values(), key=lambda link: len(link.held))
    for sequence in list(idlest.held):
        setup.close(sequence)
    setup.open(7)
    setup.open(8)
    assert sorted(idlest.held) == [7, 8]


def test_the_next_turn_of_a_text_goes_where_the_last_one_went() -> None:
    """Links that are equally busy share texts by how they begin, whoever begins and in whatever order."""
    setup = Setup(links=("a", "b", "c"))
    beginnings = [tuple(range(n, n + AFFINITY_TOKENS)) for n in range(40)]
    where = []
    for turn in ((1,), (1, 2, 3)):
        for beginning in beginnings:
            setup.open(1, (*beginning, *turn))
            where.append(next(name for name, link in setup.links.items() if link.held))
            setup.close()
    assert where[:40] == where[40:]
    assert set(where) == {"a", "b", "c"}


def test_opening_again_replaces_the_sequence() -> None:
    setup = Setup(links=("a", "b"))
    setup.open(1)
    setup.open(1, (20, 21))
    assert [held for link in setup.links.values() for held in link.held.items()] == [(1, [20, 21])]


# Late.


def test_a_step_without_an_answer_counts_as_late() -> None:
    setup = Setup()
    setup.open()
    setup.be_late(2)
    assert (setup.proposer.stats.late, setup.proposer.stats.missed) == (2, 2)


def test_a_link_late_in_a_row_rests() -> None:
    setup = Setup()
    setup.open()
    setup.be_late()
    assert (setup.proposer.stats.links_rested, setup.links["a"].held) == (1, {1: [10, 11, 12, 7, 7, 7]})


def test_a_resting_link_hears_a_close_and_then_nothing() -> None:
    setup = Setup()
    setup.open()
    setup.be_late()
    before = len(setup.links["a"].frames)
    setup.be_late(5)
    assert setup.links["a"].frames[before:] == [DraftFrame(closes=(1,))]


def test_a_resting_link_is_not_waited_for() -> None:
    setup = Setup(FOR_EVER_S)
    setup.open()
    for _ in range(LATE_BEFORE_REST):
        setup.advance()
        setup.clock.now += FOR_EVER_S
        setup.propose()
        setup.links["a"].reply()
    setup.advance()
    assert (setup.propose(), setup.proposer.stats.links_rested) == ({}, 1)


def test_an_answer_between_forgives_lateness() -> None:
    setup = Setup()
    setup.open()
    for _ in range(3):
        setup.be_late(LATE_BEFORE_REST - 1)
        setup.advance()
        setup.links["a"].reply(right(setup))
        setup.propose()
    assert setup.proposer.stats.links_rested == 0


def test_after_its_rest_a_link_is_opened_with_the_whole_history() -> None:
    setup = Setup()
    setup.open()
    setup.be_late()
    setup.clock.now += FIRST_REST_S
    setup.advance()
    last = setup.links["a"].frames[-1]
    assert last.opens == (opening(10, 11, 12, 7, 7, 7, 7),)


def test_after_its_rest_a_link_is_used() -> None:
    setup = Setup()
    setup.open()
    setup.be_late()
    setup.clock.now += FIRST_REST_S
    setup.advance()
    setup.links["a"].reply(right(setup))
    assert setup.propose() == {1: (1, 2, 3, 4)}


def rests(setup: Setup, times: int) -> list[float]:
    """Seconds from each of `times` rests to the first frame after it, in steps of half the shortest."""
    found = []
    for _ in range(times):
        setup.be_late()
        began = setup.clock.now
        setup.advance()
        while not setup.links["a"].held:
            setup.clock.now += FIRST_REST_S / 2
            setup.advance()
        found.append(setup.clock.now - began)
    return found


def test_rests_double_up_to_a_bound() -> None:
    setup = Setup()
    setup.open()
    assert rests(setup, 9) == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0, 30.0]


def test_an_answer_makes_the_next_rest_a_short_one() -> None:
    setup = Setup()
    setup.open()
    rests(setup, 3)
    setup.advance()
    setup.links["a"].reply(right(setup))
    setup.propose()
    assert rests(setup, 1) == [0.5]


def test_a_drafter_that_never_gets_better_is_tried_for_ever() -> None:
    setup = Setup()
    setup.open()
    for _ in range(1200):  # 2 ** 1024 seconds are no float
        setup.be_late()
        setup.clock.now += LONGEST_REST_S
    assert setup.proposer.stats.links_rested == 1200


# Suspect, silent, cold.


def test_a_link_that_missed_a_deadline_is_not_waited_for_before_it_is_heard_of() -> None:
    setup = Setup(1.0)
    setup.open()
    setup.advance()
    setup.clock.now += 1.0
    setup.propose()
    setup.advance()
    assert (setup.propose(), setup.proposer.stats.missed) == ({}, 1)


def test_a_silent_link_rests() -> None:
    setup = Setup()
    setup.open()
    setup.advance()
    setup.clock.now += SILENCE_S * 1.01
    setup.advance()
    assert (setup.proposer.stats.links_rested, setup.links["a"].held) == (1, {})


def test_a_link_that_is_at_work_is_not_silent() -> None:
    setup = Setup()
    setup.open()
    for _ in range(5):
        setup.advance()
        setup.clock.now += SILENCE_S * 0.9
        setup.links["a"].reply()
    assert setup.proposer.stats.links_rested == 0


def test_a_link_that_was_asked_nothing_may_be_silent() -> None:
    setup = Setup()
    setup.open()
    setup.advance(depth=0)
    setup.clock.now += 10 * SILENCE_S
    setup.advance(depth=0)
    assert setup.proposer.stats.links_rested == 0


def test_a_link_without_sequences_may_be_silent() -> None:
    setup = Setup()
    setup.links["a"].cold = True
    setup.open()
    setup.close()
    setup.clock.now += 10 * SILENCE_S
    setup.open()
    setup.advance()
    assert setup.proposer.stats.links_rested == 0


def test_a_prompt_that_is_still_being_computed_is_not_waited_for() -> None:
    setup = Setup(FOR_EVER_S)
    setup.links["a"].cold = True
    setup.open()
    setup.advance()
    assert (setup.propose(), setup.proposer.serves(1)) == ({}, False)


def test_a_prompt_that_stays_without_an_answer_is_opened_again() -> None:
    setup = Setup()
    setup.links["a"].cold = True
    setup.open()
    setup.links["a"].reply()
    setup.clock.now += COLD_S * 1.01
    setup.links["a"].cold = False
    setup.advance(depth=0)
    assert [len(frame.opens) for frame in setup.links["a"].frames] == [1, 1]


def test_a_computed_prompt_is_served() -> None:
    setup = Setup()
    setup.open()
    assert setup.proposer.serves(1) is True


def test_the_deadline_follows_the_usual_round_trip() -> None:
    setup = Setup(1.0)
    setup.open()
    for _ in range(50):
        setup.advance()
        setup.clock.now += 0.005
        setup.links["a"].reply(right(setup))
        setup.propose()
    setup.advance()
    setup.clock.now += 2 * 0.005 + SLACK_S + 0.001
    assert (setup.propose(), setup.proposer.stats.missed) == ({}, 1)


def test_a_deadline_missed_is_long_before_the_timeout() -> None:
    waits: list[float] = []

    def wait(_: object, seconds: float) -> None:
        waits.append(seconds)
        setup.clock.now += seconds

    setup = Setup(1.0)
    setup.proposer._wait = wait
    setup.open()
    for _ in range(50):
        setup.advance()
        setup.clock.now += 0.005
        setup.links["a"].reply(right(setup))
        setup.propose()
    setup.advance()
    setup.propose()
    assert waits == [pytest.approx(2 * 0.005 + SLACK_S, abs=1e-3)]


def test_latency_is_what_steps_waited() -> None:
    def wait(_: object, seconds: float) -> None:
        setup.clock.now += 0.008
        setup.links["a"].reply(right(setup))

    setup = Setup(1.0)
    setup.proposer._wait = wait
    setup.open()
    for asked in range(2):
        assert setup.proposer.latency(4) == 0, asked
        setup.advance()
        setup.propose()
    assert [setup.proposer.latency(depth) for depth in (0, 2, 4)] == [0, pytest.approx(0.004), pytest.approx(0.008)]


def test_candidates_that_are_there_already_cost_no_latency() -> None:
    setup = Setup(1.0)
    setup.open()
    setup.advance()
    setup.links["a"].reply(right(setup))
    setup.propose()
    assert setup.proposer.latency(4) == 0.0


# Ahead.


def test_full_agreement_leaves_the_next_candidates_there() -> None:
    setup = Setup(FOR_EVER_S)
    setup.open()
    setup.advance()
    setup.links["a"].reply(right(setup, tokens=tuple(range(1, 10))))
    setup.advance(new=(1, 2, 3, 4, 5))
    assert setup.propose() == {1: (6, 7, 8, 9)}


def test_what_is_pushed_later_goes_behind_what_is_held() -> None:
    setup = Setup(FOR_EVER_S)
    setup.open()
    setup.advance()
    setup.links["a"].reply(right(setup, tokens=(1, 2, 3, 4)), right(setup, tokens=(5, 6), offset=4))
    setup.advance(new=(1, 2), depth=3)
    assert setup.propose(depth=3) == {1: (3, 4, 5)}


def test_disagreement_drops_the_run() -> None:
    setup = Setup()
    setup.open()
    setup.advance()
    setup.links["a"].reply(right(setup, tokens=(1, 2, 3, 4)))
    setup.advance(new=(1, 9))
    assert (setup.propose(), setup.proposer.stats.wasted) == ({}, 3)


def test_what_was_drafted_before_a_disagreement_was_heard_of_is_wasted() -> None:
    setup = Setup()
    setup.open()
    setup.advance()
    old = right(setup, tokens=(5, 6), offset=4)
    setup.links["a"].reply(right(setup, tokens=(1, 2, 3, 4)))
    setup.advance(new=(1, 9))
    setup.links["a"].reply(old)
    assert setup.propose() == {}


def test_what_was_drafted_without_knowing_of_an_agreement_is_good() -> None:
    setup = Setup(FOR_EVER_S)
    setup.open()
    setup.advance()
    later = right(setup, tokens=(5, 6), offset=4)
    setup.links["a"].reply(right(setup, tokens=(1, 2, 3, 4)))
    setup.advance(new=(1, 2, 3, 4), depth=2)
    setup.links["a"].reply(later)
    assert setup.propose(depth=2) == {1: (5, 6)}


def test_late_candidates_serve_from_where_the_target_is() -> None:
    setup = Setup()
    setup.open()
    setup.advance()
    late = right(setup, tokens=(1, 2, 3, 4))
    setup.advance(new=(1,))
    setup.advance(new=(2,))
    setup.links["a"].reply(late)
    assert setup.propose() == {1: (3, 4)}


def test_late_candidates_that_went_another_way_are_wasted() -> None:
    setup = Setup()
    setup.open()
    setup.advance()
    late = right(setup, tokens=(1, 2, 3, 4))
    setup.advance(new=(9,))
    setup.links["a"].reply(late)
    assert (setup.propose(), setup.proposer.stats.wasted) == ({}, 4)


def test_a_duplicate_adds_nothing() -> None:
    setup = Setup(FOR_EVER_S)
    setup.open()
    setup.advance(depth=6)
    setup.links["a"].reply(right(setup), right(setup, tokens=(5, 6), offset=4), right(setup))
    assert setup.propose(depth=6) == {1: (1, 2, 3, 4, 5, 6)}


def test_a_gap_opens_the_sequence_again() -> None:
    setup = Setup()
    setup.open()
    setup.advance()
    setup.links["a"].reply(right(setup, tokens=(5, 6), offset=4))
    setup.advance()
    assert (setup.proposer.stats.reopened, setup.links["a"].frames[-1].opens) == (1, (opening(10, 11, 12, 7, 7),))


def test_a_drafter_at_the_end_of_its_context_is_not_waited_for() -> None:
    setup = Setup(FOR_EVER_S)
    setup.open()
    setup.advance()
    setup.links["a"].reply(Candidates(1, 4, (1,), final=True))
    first = setup.propose()
    setup.advance(new=(1,))
    assert (first, setup.propose()) == ({1: (1,)}, {})


def test_long_histories_are_spread_over_frames() -> None:
    setup = Setup(links=("a", "b"))
    long = tuple(range(MAX_OPENING_TOKENS // 2 + 1))
    for sequence in (1, 2, 3, 4):
        setup.open(sequence, long)
    lost, left = setup.links.values()
    lost.kill()
    before = len(left.frames)
    setup.advance(1, 2, 3, 4)
    assert [len(frame.opens) for frame in left.frames[before:]] == [1, 1]


def test_rows_of_rejection_sampling_follow_their_tokens() -> None:
    setup = Setup(FOR_EVER_S)
    setup.proposer = RemoteProposer(FOR_EVER_S, setup.clock, rejection=True)
    link = FakeLink(setup.proposer)
    setup.open()
    setup.advance()
    rows = tuple(SparseRow((n,), (1.0,)) for n in (1, 2, 3))
    link.reply(Candidates(1, 4, (1, 2, 3), probs=rows))
    setup.advance(new=(1,), depth=2)
    (proposal,) = setup.proposer.propose([Wanted(1, 5, 2)]).values()
    assert (link.frames[0].opens[0].rejection, proposal.tokens, proposal.probs) == (True, (2, 3), rows[1:])


@pytest.mark.parametrize("rejection", [True, False])
def test_candidates_for_the_other_way_of_verifying_are_a_failure(rejection: bool) -> None:
    setup = Setup()
    setup.proposer = RemoteProposer(0.0, setup.clock, rejection=rejection)
    link = FakeLink(setup.proposer)
    setup.open()
    setup.advance()
    link.reply(Candidates(1, 4, (1,), probs=() if rejection else (SparseRow((1,), (1.0,)),)))
    assert (setup.propose(), setup.proposer.stats.links_rested) == ({}, 1)


def test_a_link_reports_itself() -> None:
    setup = Setup()
    setup.open()
    setup.links["a"].bytes_sent = 7
    (report,) = setup.proposer.links()
    assert (report.replica_id, report.sequences, report.resting, report.bytes_sent) == ("a", 1, False, 7)


def test_traffic_of_links_that_are_gone_is_not_forgotten() -> None:
    setup = Setup(links=("a", "b"))
    for link in setup.links.values():
        link.bytes_sent, link.bytes_received = 7, 5
    setup.links["a"].kill()
    assert setup.proposer.traffic() == (14, 10)


# Waiting, with threads.


def waiting(setup: Setup) -> Future[dict[int, tuple[int, ...]]]:
    """`propose` in another thread. It holds the lock from its look at the clock until it waits."""
    setup.clock.asked.clear()
    future: Future[dict[int, tuple[int, ...]]] = Future()
    threading.Thread(target=lambda: future.set_result(setup.propose()), daemon=True).start()
    assert setup.clock.asked.wait(PATIENCE_S)
    return future


def test_a_reply_wakes_the_step_that_waits_for_it() -> None:
    setup = Setup(FOR_EVER_S)
    setup.open()
    setup.advance()
    step = waiting(setup)
    setup.links["a"].reply(right(setup))
    assert step.result(PATIENCE_S) == {1: (1, 2, 3, 4)}


def test_a_lost_link_wakes_the_step_that_waits_for_it() -> None:
    setup = Setup(FOR_EVER_S)
    setup.open()
    setup.advance()
    step = waiting(setup)
    setup.links["a"].kill()
    assert step.result(PATIENCE_S) == {}


@pytest.mark.parametrize("reason", list(DraftFailureReason))
def test_a_failure_wakes_the_step_that_waits_for_it(reason: DraftFailureReason) -> None:
    setup = Setup(FOR_EVER_S)
    setup.open()
    setup.advance()
    step = waiting(setup)
    setup.links["a"].reply(failure(setup, reason))
    assert step.result(PATIENCE_S) == {}


def test_a_link_that_came_again_wakes_the_step_that_waits_for_its_former_self() -> None:
    setup = Setup(FOR_EVER_S)
    setup.open()
    setup.advance()
    step = waiting(setup)
    FakeLink(setup.proposer, "a")
    assert step.result(PATIENCE_S) == {}


def test_an_answer_for_one_does_not_end_the_wait_for_another() -> None:
    setup = Setup(FOR_EVER_S)
    setup.open(1)
    setup.open(2)
    setup.advance(1, 2)
    step = waiting(setup)
    setup.links["a"].reply(right(setup, 1))
    setup.links["a"].reply(right(setup, 2))
    assert step.result(PATIENCE_S) == {1: (1, 2, 3, 4), 2: (1, 2, 3, 4)}


# Lost, failed, retired.


def test_sequences_of_a_lost_link_move_with_their_whole_history() -> None:
    setup = Setup(links=("a", "b"))
    setup.open()
    setup.advance()
    setup.links["a"].kill()
    setup.advance()
    assert setup.links["b"].held == {1: [10, 11, 12, 7, 7]}


def test_a_sequence_that_moved_is_drafted_by_its_new_link() -> None:
    setup = Setup(links=("a", "b"))
    setup.open()
    setup.links["a"].kill()
    setup.advance()
    setup.links["b"].reply(right(setup))
    assert setup.propose() == {1: (1, 2, 3, 4)}


def test_candidates_of_a_lost_link_are_gone() -> None:
    setup = Setup()
    setup.open()
    setup.advance()
    setup.links["a"].reply(right(setup))
    setup.links["a"].kill()
    assert setup.propose() == {}


def test_a_lost_link_is_counted_once() -> None:
    setup = Setup()
    setup.links["a"].kill()
    setup.links["a"].kill()
    assert (setup.proposer.stats.links_lost, setup.proposer.link_ids) == (1, [])


def test_replies_of_a_lost_link_are_wasted() -> None:
    setup = Setup()
    setup.open()
    setup.advance()
    setup.links["a"].kill()
    setup.links["a"].reply(right(setup))
    assert (setup.propose(), setup.proposer.stats.wasted) == ({}, 4)


def test_a_link_that_came_again_knows_nothing_and_is_told_everything() -> None:
    setup = Setup()
    setup.open()
    again = FakeLink(setup.proposer, "a")
    setup.advance()
    assert again.held == {1: [10, 11, 12, 7]}


@pytest.mark.parametrize("reason", REOPEN)
def test_a_drafter_that_lost_the_place_is_told_the_whole_history(reason: DraftFailureReason) -> None:
    setup = Setup()
    setup.open()
    setup.advance()
    setup.links["a"].reply(failure(setup, reason))
    setup.advance()
    assert setup.links["a"].frames[-1].opens == (opening(10, 11, 12, 7, 7),)


@pytest.mark.parametrize("reason", REOPEN)
def test_a_drafter_that_lost_the_place_does_not_rest(reason: DraftFailureReason) -> None:
    setup = Setup()
    setup.open()
    setup.links["a"].reply(failure(setup, reason))
    assert (setup.proposer.stats.reopened, setup.proposer.stats.links_rested) == (1, 0)


@pytest.mark.parametrize("reason", REOPEN)
def test_a_drafter_that_loses_the_place_again_and_again_rests(reason: DraftFailureReason) -> None:
    setup = Setup()
    setup.open()
    for _ in range(LATE_BEFORE_REST):
        setup.advance()
        setup.links["a"].reply(failure(setup, reason))
    setup.advance()
    assert (setup.proposer.stats.links_rested, setup.links["a"].held) == (1, {})


def test_a_drafter_that_lost_many_places_at_once_does_not_rest() -> None:
    setup = Setup()
    for sequence in range(8):
        setup.open(sequence)
    setup.advance()
    setup.links["a"].reply(*(failure(setup, DraftFailureReason.UNKNOWN_SEQUENCE, each) for each in range(8)))
    setup.advance()
    assert (setup.proposer.stats.links_rested, len(setup.links["a"].frames[-1].opens)) == (0, 8)


@pytest.mark.parametrize("reason", REOPEN)
def test_a_drafter_left_by_a_sequence_is_told_to_forget_it(reason: DraftFailureReason) -> None:
    setup = Setup(links=("a", "b"))
    setup.open(1)
    setup.links["a"].reply(failure(setup, reason))
    setup.close(1)
    assert setup.links["a"].held == {}


def test_a_drafter_that_fails_is_left_alone() -> None:
    setup = Setup()
    setup.open()
    setup.advance()
    setup.links["a"].reply(failure(setup, DraftFailureReason.INTERNAL))
    setup.advance()
    assert (setup.proposer.stats.links_rested, setup.links["a"].held) == (1, {})


@pytest.mark.parametrize("reason", [*REFUSE, DraftFailureReason.INTERNAL])
def test_sequences_of_a_drafter_that_cannot_go_elsewhere(reason: DraftFailureReason) -> None:
    setup = Setup(links=("a", "b"))
    setup.open(1)
    setup.links["a"].reply(failure(setup, reason))
    setup.advance()
    assert setup.links["b"].held == {1: [10, 11, 12, 7]}


@pytest.mark.parametrize("reason", REFUSE)
def test_a_refusal_concerns_one_sequence(reason: DraftFailureReason) -> None:
    setup = Setup()
    setup.open(1)
    setup.open(2)
    setup.links["a"].reply(failure(setup, reason, 1))
    setup.advance(1, 2)
    assert (setup.proposer.stats.links_rested, sorted(setup.links["a"].held)) == (0, [2])


def test_a_sequence_that_found_no_room_comes_back_later() -> None:
    setup = Setup()
    setup.open()
    setup.links["a"].reply(failure(setup, DraftFailureReason.BUSY))
    setup.clock.now += FIRST_REFUSAL_S
    setup.advance()
    assert setup.links["a"].held == {1: [10, 11, 12, 7]}


def test_a_sequence_that_finds_no_room_again_stays_away_longer() -> None:
    setup = Setup()
    setup.open()
    for _ in range(2):
        setup.links["a"].reply(failure(setup, DraftFailureReason.BUSY))
        setup.clock.now += FIRST_REFUSAL_S
        setup.advance()
    assert setup.links["a"].held == {}


def test_a_sequence_a_drafter_cannot_know_never_comes_back_to_it() -> None:
    setup = Setup()
    setup.open()
    setup.links["a"].reply(failure(setup, DraftFailureReason.UNSUPPORTED))
    setup.clock.now += 1e9
    setup.advance()
    assert setup.links["a"].held == {}


def test_a_full_drafter_gets_nothing_new_while_another_has_room() -> None:
    setup = Setup(links=("a", "b"))
    for sequence in (1, 2, 3):
        setup.open(sequence)
    full, other = sorted(setup.links.values(), key=lambda link: len(link.held))
    (refused,) = full.held
    full.reply(failure(setup, DraftFailureReason.BUSY, refused))
    setup.open(4)
    assert sorted(other.held) == sorted({1, 2, 3, 4} - {refused})


def test_a_failure_of_an_earlier_opening_is_not_this_one_s() -> None:
    setup = Setup()
    setup.open()
    setup.advance()
    late = failure(setup, DraftFailureReason.UNKNOWN_SEQUENCE)
    setup.links["a"].reply(late)
    setup.advance()
    setup.links["a"].reply(late)
    assert setup.links["a"].held == {1: [10, 11, 12, 7, 7]}


def test_a_retired_link_keeps_what_it_has() -> None:
    setup = Setup()
    setup.open()
    setup.proposer.retire_link("a")
    setup.advance()
    setup.links["a"].reply(right(setup))
    assert setup.propose() == {1: (1, 2, 3, 4)}


def test_a_retired_link_gets_nothing_new() -> None:
    setup = Setup(links=("a", "b"))
    setup.proposer.retire_link("a")
    setup.open(1)
    setup.open(2)
    assert (setup.links["a"].frames, sorted(setup.links["b"].held)) == ([], [1, 2])


def test_a_retired_link_stays_retired_after_a_rest() -> None:
    setup = Setup()
    setup.open()
    setup.proposer.retire_link("a")
    setup.be_late()
    setup.clock.now += LONGEST_REST_S
    setup.advance()
    assert setup.links["a"].held == {}


def test_a_retired_link_that_is_wanted_back_gets_sequences_again() -> None:
    setup = Setup()
    setup.proposer.retire_link("a")
    setup.proposer.restore_link("a")
    setup.open()
    assert setup.links["a"].held == {1: [10, 11, 12]}


def test_retiring_an_unknown_link_is_nothing() -> None:
    setup = Setup(links=())
    setup.proposer.retire_link("nobody")
    assert setup.proposer.link_ids == []


NAMES = st.sampled_from(["a", "b", "c"])
SEQUENCES = st.integers(1, 5)


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens in whatever order: no exception, no wrong base, nothing held for a sequence that ended."""

    @initialize()
    def begin(self) -> None:
        self.setup = Setup(links=())
        self.links: dict[str, FakeLink] = self.setup.links

    @rule(name=NAMES)
    def add(self, name: str) -> None:
        self.links[name] = FakeLink(self.setup.proposer, name)

    @rule(name=NAMES)
    def remove(self, name: str) -> None:
        if name in self.links:
            self.links.pop(name).kill()

    @rule(name=NAMES)
    def retire(self, name: str) -> None:
        self.setup.proposer.retire_link(name)

    @rule(name=NAMES)
    def restore(self, name: str) -> None:
        self.setup.proposer.restore_link(name)

    @rule(sequence=SEQUENCES, length=st.integers(1, 4))
    def open(self, sequence: int, length: int) -> None:
        if sequence not in self.setup.tokens:
            self.setup.open(sequence, tuple(range(length)))

    @rule(chosen=st.sets(SEQUENCES), n=st.integers(1, 5), depth=st.integers(0, 4))
    def advance(self, chosen: set[int], n: int, depth: int) -> None:
        if known := tuple(chosen & self.setup.tokens.keys()):
            self.setup.advance(*known, new=(7,) * n, depth=depth)

    @rule(depth=st.integers(1, 4))
    def propose(self, depth: int) -> None:
        for sequence, candidates in self.setup.propose(depth=depth).items():
            base = len(self.setup.tokens[sequence])
            assert candidates == tuple(range(base, base + len(candidates)))
            assert len(candidates) <= depth

    @rule(sequence=SEQUENCES)
    def close(self, sequence: int) -> None:
        if sequence in self.setup.tokens:
            self.setup.close(sequence)

    @rule(name=NAMES, sequence=SEQUENCES, off=st.integers(-2, 2), offset=st.integers(0, 3), n=st.integers(0, 4))
    def reply(self, name: str, sequence: int, off: int, offset: int, n: int) -> None:
        """A candidate is the position it was drafted for."""
        base = len(self.setup.tokens.get(sequence, ())) + off
        start = base + offset
        if name in self.links:
            self.links[name].reply(Candidates(sequence, base, tuple(range(start, start + n)), offset=offset))

    @rule(name=NAMES)
    def heartbeat(self, name: str) -> None:
        if name in self.links:
            self.links[name].reply()

    @rule(name=NAMES, sequence=SEQUENCES, off=st.integers(-2, 0), reason=st.sampled_from(DraftFailureReason))
    def fail(self, name: str, sequence: int, off: int, reason: DraftFailureReason) -> None:
        if name in self.links:
            base = len(self.setup.tokens.get(sequence, ())) + off
            self.links[name].reply(Candidates(sequence, base, failure=reason))

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 30.0]))
    def pass_time(self, seconds: float) -> None:
        self.setup.clock.now += seconds

    @invariant()
    def books_agree(self) -> None:
        self.setup.proposer.check()

    @invariant()
    def links_are_known(self) -> None:
        assert set(self.setup.proposer.link_ids) == set(self.links)

    def teardown(self) -> None:
        for sequence in list(self.setup.tokens):
            self.setup.close(sequence)
        self.setup.proposer.close(0)  # flushes
        self.setup.proposer.check()
        assert {name: link.held for name, link in self.links.items()} == {name: {} for name in self.links}


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=40, suppress_health_check=list(HealthCheck))
test_any_order_of_events_keeps_the_books = AnyOrder.TestCase


def test_a_drafter_is_told_whose_trace_a_sequence_belongs_to() -> None:
    setup = Setup()
    setup.proposer.open(1, (10, 11), PARAMS, TRACE)
    (frame,) = setup.links["a"].frames
    assert [opened.trace for opened in frame.opens] == [TRACE]


def test_a_line_about_a_sequence_that_failed_has_its_trace(caplog: pytest.LogCaptureFixture) -> None:
    setup = Setup()
    setup.proposer.open(1, (10, 11), PARAMS, TRACE)
    with caplog.at_level(logging.INFO):
        setup.links["a"].reply(Candidates(1, 2, failure=DraftFailureReason.BUSY))
    assert [vars(record).get("trace_id") for record in caplog.records] == [TRACE.split("-")[1]]
