"""Candidates from draft replicas elsewhere: a state machine over links, with no transport in it.

    link      up ──deadlines missed, silent or failing──► resting (backoff, doubling) ──rest over──► up
    sequence  unassigned ──open──► assigned ──answered──► ready ──link lost or rests, failure, gap──► unassigned

A drafter pushes what it drafts; each sequence's `Run` keeps what it said beyond the agreed text, so that where the
target agrees with all of it the next candidates are here already. A link that lets a sequence go is told to close
it, so that no drafter holds KV for a sequence it lost.

Only `propose` waits: for sequences that are ready, on links that are heard of, until a deadline that follows the
usual round trip and is never longer than `timeout_s`. A deadline missed makes its link suspect, and a suspect link is
not waited for again before it says something. So a drafter that falls silent costs one short wait, and one that
was silent from the start costs none.

Two threads meet here: the engine's (open, propose, advance, close) and the transport's (add_link,
remove_link, retire_link, restore_link, receive). One lock guards the state; `propose` waits on its condition.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from paceline.errors import DraftError
from paceline.speculation.frames import Advance, Candidates, DraftFailureReason, Open
from paceline.speculation.links import DraftLink, LinkState, SequenceState
from paceline.speculation.proposer import Proposal, Proposer, Source, Wanted
from paceline.speculation.run import Run, RunCounts
from paceline.speculation.waiting import WaitCurve
from paceline.telemetry.tracing import trace_id
from paceline.types import SamplingParams

logger = logging.getLogger(__name__)

AHEAD = 9
"""Tokens a drafter may be ahead of what was asked for: the bonus token and the eight candidates of a next turn."""
LATE_BEFORE_REST = 3
"""Misses in a row, late or out of step with the sequence, before a link is left alone. One, if it rested before."""
FIRST_REST_S = 0.5
LONGEST_REST_S = 30.0
MAX_DOUBLINGS = 16
SILENCE_S = 2.0
"""A drafter at work says something every quarter of a second; one that says nothing for so long is not there."""
COLD_S = 30.0
"""A sequence whose opening was not answered for so long, on a link that answers others, is opened again."""
FIRST_REFUSAL_S = 0.5
"""How long a sequence stays away from a drafter that had no room for it; doubling as a rest does."""


@dataclass(slots=True)
class RemoteStats:
    """Counters since the start.

    `late`: wanted by a step that went on without any. `waits`: steps that waited, `missed`: until a deadline.
    `heard`, `confirmed`, `wasted`: tokens drafted elsewhere that arrived; that the target agreed with; that came too
    late, were not what it said, or were dropped with their link. Bytes are those of links that are gone;
    `RemoteProposer.traffic` has all.
    """

    late: int = 0
    waits: int = 0
    waited_s: float = 0.0
    longest_wait_s: float = 0.0
    missed: int = 0
    reopened: int = 0
    refused: int = 0
    links_lost: int = 0
    links_rested: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    tokens: RunCounts = field(default_factory=RunCounts)

    @property
    def wasted(self) -> int:
        return self.tokens.wasted


@dataclass(frozen=True, slots=True)
class LinkReport:
    """A link as it is now. `round_trip_s` is None until it was measured."""

    replica_id: str
    sequences: int
    resting: bool
    suspect: bool
    retired: bool
    round_trip_s: float | None
    bytes_sent: int
    bytes_received: int


class RemoteProposer(Proposer):
    """Spreads sequences over the links there are, and goes on without any.

    `timeout_s` bounds the wait for candidates, from the moment they were asked for. `ahead` is the credit given to
    the drafters. A link that misses deadlines, is silent or fails rests for 0.5 s, then 1, 2, … up to 30.
    """

    def __init__(
        self,
        timeout_s: float,
        clock: Callable[[], float] = time.monotonic,
        *,
        ahead: int = AHEAD,
        rejection: bool = False,
        wait: Callable[[threading.Condition, float], object] = threading.Condition.wait,
    ) -> None:
        self.stats = RemoteStats()
        self._timeout_s = timeout_s
        self._clock = clock
        self._ahead, self._rejection = ahead, rejection
        self._wait = wait
        self._changed = threading.Condition()
        self._links: dict[str, LinkState] = {}
        self._sequences: dict[int, SequenceState] = {}
        self._waits = WaitCurve()

    # Called by the transport.

    def add_link(self, link: DraftLink) -> None:
        """A stream is up and its drafter shares our tokenizer. One of the same replica before it is gone."""
        with self._changed:
            self._lose(link.replica_id)
            self._links[link.replica_id] = LinkState(link)

    def remove_link(self, link: DraftLink) -> None:
        """A stream is gone. Its sequences decode plainly until another drafter takes them."""
        with self._changed:
            if self._state_of(link) is not None:
                self._lose(link.replica_id)

    def retire_link(self, replica_id: str) -> None:
        """The drafter is leaving: it keeps the sequences it has while its stream lasts and gets no more."""
        self._set_retired(replica_id, True)

    def restore_link(self, replica_id: str) -> None:
        """The drafter stays after all."""
        self._set_retired(replica_id, False)

    def receive(self, link: DraftLink, replies: Iterable[Candidates]) -> None:
        """Something arrived on a link; without replies it says that the drafter is at work."""
        with self._changed:
            state = self._state_of(link)
            if state is not None:
                state.suspect, state.unanswered_since = False, None
            before = self.stats.reopened
            for reply in replies:
                self._take(state, reply)
            if state is not None and self.stats.reopened > before:
                self._miss(state)  # once, however many sequences it has forgotten
            self._changed.notify_all()

    @property
    def link_ids(self) -> list[str]:
        with self._changed:
            return list(self._links)

    def links(self) -> list[LinkReport]:
        """Every link as it is now."""
        with self._changed:
            now = self._clock()
            return [
                LinkReport(
                    name,
                    len(state.sequences),
                    state.resting_until > now,
                    state.suspect,
                    state.retired,
                    state.round_trip.mean,
                    state.link.bytes_sent,
                    state.link.bytes_received,
                )
                for name, state in self._links.items()
            ]

    def traffic(self) -> tuple[int, int]:
        """Bytes sent to and received from drafters since the start: serialized messages and gRPC's prefix."""
        with self._changed:
            links = [state.link for state in self._links.values()]
            sent, received = self.stats.bytes_sent, self.stats.bytes_received
            return (
                sent + sum(link.bytes_sent for link in links),
                received + sum(link.bytes_received for link in links),
            )

    # Called by the engine.

    def open(self, sequence: int, tokens: Sequence[int], params: SamplingParams, trace: str = "") -> None:
        with self._changed:
            self._forget(sequence)
            run = Run(list(tokens), self.stats.tokens)
            state = self._sequences[sequence] = SequenceState(run, params, len(tokens), trace)
            self._assign(sequence, state)
        self._flush()

    def advance(self, updates: Sequence[Advance]) -> None:
        with self._changed:
            now = self._clock()
            self._rest_silent(now)
            for update in updates:
                state = self._sequences.get(update.sequence)
                if state is not None:
                    self._advance_one(state, update, now)
        self._flush()

    def propose(self, wanted: Sequence[Wanted]) -> Mapping[int, Proposal]:
        with self._changed:
            began = now = self._clock()
            while (left := self._deadline(wanted) - now) > 0:
                self._wait(self._changed, left)
                now = self._clock()
            found = {want.sequence: ready for want in wanted if (ready := self._ready(want)) is not None}
            self._note_wait(wanted, now - began)
            self._judge(wanted)
            self.stats.late += len({want.sequence for want in wanted} - found.keys())
        return found

    def close(self, sequence: int) -> None:
        """The drafter hears of it with the next frame, at once if this was the last sequence."""
        with self._changed:
            self._forget(sequence)
            idle = not self._sequences
        if idle:
            self._flush()

    def serves(self, sequence: int) -> bool:
        with self._changed:
            state = self._sequences.get(sequence)
            if state is None or state.link is None:
                return False
            return bool(state.run.candidates) or (
                state.ready and not state.ends and not self._links[state.link].suspect
            )

    def latency(self, depth: int) -> float:
        with self._changed:
            return self._waits.at(depth)

    def check(self) -> None:
        """Raise DraftError unless every assigned sequence is in the books of its link, and of no other, and every
        token heard is accounted for."""
        with self._changed:
            booked = sorted((s, name) for name, link in self._links.items() for s in link.sequences)
            assigned = sorted((s, state.link) for s, state in self._sequences.items() if state.link is not None)
            if booked != assigned:
                raise DraftError(f"draft links hold {booked}, sequences say {assigned}")
            states = self._sequences.values()
            if any(state.link is None and (state.asks or state.run.candidates) for state in states):
                raise DraftError("a sequence without a link waits for candidates")
            held, tokens = sum(len(state.run.candidates) for state in states), self.stats.tokens
            if tokens.heard != tokens.confirmed + tokens.wasted + held:
                raise DraftError(f"tokens heard do not add up: {tokens}, {held} held")

    # State changes, under the lock.

    def _state_of(self, link: DraftLink) -> LinkState | None:
        """None of a link that was replaced or removed."""
        state = self._links.get(link.replica_id)
        return state if state is not None and state.link is link else None

    def _lose(self, replica_id: str) -> None:
        if replica_id in self._links:
            self.stats.links_lost += 1
            self._unassign_all(replica_id)
            link = self._links.pop(replica_id).link
            self.stats.bytes_sent += link.bytes_sent
            self.stats.bytes_received += link.bytes_received
            self._waits = WaitCurve()
            self._changed.notify_all()

    def _set_retired(self, replica_id: str, retired: bool) -> None:
        with self._changed:
            if (link := self._links.get(replica_id)) is not None:
                link.retired = retired

    def _forget(self, sequence: int) -> None:
        if (state := self._sequences.pop(sequence, None)) is not None:
            self._unassign(sequence, state)

    def _advance_one(self, state: SequenceState, update: Advance, now: float) -> None:
        state.depth = update.depth
        if update.base != state.run.length:
            self._unassign(update.sequence, state)
            del state.run.tokens[update.base :]
        if state.link is not None and not state.ready and now - state.opened_at > COLD_S:
            self._unassign(update.sequence, state)
        state.run.commit(update.tokens)
        if state.link is None:
            self._assign(update.sequence, state)
            return
        link = self._links[state.link]
        link.advances.append(update)
        if state.hungry:
            link.asked_at = now
            link.ask(now)
            state.asks.append((state.run.length, now))

    def _assign(self, sequence: int, state: SequenceState) -> None:
        """Give a sequence to the link with the fewest, of those that may have it; rather to one that has room.

        Among equals the text's beginning decides.
        """
        now = self._clock()
        awake = [
            link
            for name, link in self._links.items()
            if not link.retired and link.resting_until <= now and state.refused.get(name, 0.0) <= now
        ]
        if not awake:
            return
        link = min(
            awake,
            key=lambda each: (each.full_until > now, len(each.sequences), -each.affinity(state.run.tokens)),
        )
        state.run.restart()
        state.link, state.opened, state.opened_at = link.link.replica_id, state.run.length, now
        link.sequences.add(sequence)
        link.ask(now)
        history = tuple(state.run.tokens)
        link.opens.append(
            Open(
                sequence,
                history,
                state.params,
                state.depth,
                state.prompt_length,
                self._ahead,
                self._rejection,
                state.trace,
            )
        )

    def _take(self, link: LinkState | None, reply: Candidates) -> None:
        state = self._sequences.get(reply.sequence)
        mine = link is not None and state is not None and state.link == link.link.replica_id
        if link is None or state is None or not mine or reply.base < state.opened:
            self.stats.tokens.heard += len(reply.tokens)
            self.stats.tokens.wasted += len(reply.tokens)
        elif reply.failure is not None:
            self._fail(link, state, reply)
        elif len(reply.probs) != (len(reply.tokens) if self._rejection else 0):
            # A candidate without its distribution would bias what rejection sampling draws.
            self._fail(link, state, Candidates(reply.sequence, reply.base, failure=DraftFailureReason.INTERNAL))
        else:
            state.ready = True
            state.ends = state.ends or reply.final
            self._note_round_trip(link, state, reply.base)
            if not state.run.take(reply):
                self._reopen(reply.sequence, state)

    def _fail(self, link: LinkState, state: SequenceState, reply: Candidates) -> None:
        name = link.link.replica_id
        known = {"trace_id": found} if (found := trace_id(state.trace)) is not None else {}
        logger.info("drafter %s: sequence %d: %s", name, reply.sequence, reply.failure, extra=known)
        if reply.failure is not None and reply.failure.reopen:
            self._reopen(reply.sequence, state)
            return
        self._unassign(reply.sequence, state)
        if reply.failure is DraftFailureReason.BUSY:
            pause = _backoff(FIRST_REFUSAL_S, state.refusals)
            state.refused[name] = self._clock() + pause
            state.refusals += 1
            link.full_until = self._clock() + FIRST_REFUSAL_S
            self.stats.refused += 1
        elif reply.failure is DraftFailureReason.UNSUPPORTED:
            state.refused[name] = float("inf")
            self.stats.refused += 1
        else:
            self._rest(link)

    def _reopen(self, sequence: int, state: SequenceState) -> None:
        """Out of step: the next advance opens it again, with the whole history."""
        self.stats.reopened += 1
        self._unassign(sequence, state)

    def _unassign(self, sequence: int, state: SequenceState) -> None:
        if state.link is not None:
            self._links[state.link].forget(sequence)
        state.unassign()

    def _unassign_all(self, replica_id: str) -> None:
        for sequence in list(self._links[replica_id].sequences):
            self._unassign(sequence, self._sequences[sequence])

    # Waiting.

    def _waited_for(self, want: Wanted) -> LinkState | None:
        """The link from which candidates are missing that may still come in time."""
        state = self._sequences.get(want.sequence)
        if state is None or state.link is None or state.run.length != want.base:
            return None
        link = self._links[state.link]
        missing = state.hungry and len(state.run.candidates) < want.depth
        return link if missing and state.ready and not link.suspect else None

    def _deadline(self, wanted: Sequence[Wanted]) -> float:
        """Until when to wait for them all; the past if nothing is missing."""
        links = {link for want in wanted if (link := self._waited_for(want)) is not None}
        return max((link.asked_at + link.round_trip.patience(self._timeout_s) for link in links), default=0.0)

    def _ready(self, want: Wanted) -> Proposal | None:
        state = self._sequences.get(want.sequence)
        if state is None or state.run.length != want.base or not state.run.candidates:
            return None
        return Proposal(tuple(state.run.candidates[: want.depth]), Source.REMOTE, tuple(state.run.probs[: want.depth]))

    def _note_wait(self, wanted: Sequence[Wanted], seconds: float) -> None:
        states = [self._sequences.get(want.sequence) for want in wanted]
        served = [w.depth for w, state in zip(wanted, states, strict=True) if state is not None and state.ready]
        if served:
            self._waits.note(max(served), seconds)
        if seconds > 0:
            self.stats.waits += 1
            self.stats.waited_s += seconds
            self.stats.longest_wait_s = max(self.stats.longest_wait_s, seconds)

    def _judge(self, wanted: Sequence[Wanted]) -> None:
        """After the wait: links that had nothing missed a deadline, links that had everything are forgiven."""
        late, prompt = set(), set()
        for want in wanted:
            state = self._sequences.get(want.sequence)
            if state is None or state.link is None:
                continue
            link = self._links[state.link]
            if self._waited_for(want) is None:
                if state.run.candidates and not link.suspect:
                    prompt.add(link)
            elif not state.run.candidates:
                late.add(link)
        for link in prompt - late:
            link.misses = link.rests = 0
        for link in late:
            self.stats.missed += 1
            link.suspect = True
            self._miss(link)

    def _note_round_trip(self, link: LinkState, state: SequenceState, base: int) -> None:
        while state.asks and state.asks[0][0] <= base:
            length, asked_at = state.asks.popleft()
            if length == base:
                link.round_trip.note(self._clock() - asked_at)

    def _rest_silent(self, now: float) -> None:
        for link in self._links.values():
            since = link.unanswered_since
            if since is not None and now - since > max(self._timeout_s, SILENCE_S):
                self._rest(link)

    def _miss(self, link: LinkState) -> None:
        if link.resting_until > self._clock():
            return
        link.misses += 1
        if link.misses >= (LATE_BEFORE_REST if link.rests == 0 else 1):
            self._rest(link)

    def _rest(self, link: LinkState) -> None:
        """Leave a drafter alone for a while; it forgets our sequences, so that it catches up on nothing stale."""
        self._unassign_all(link.link.replica_id)
        pause = _backoff(FIRST_REST_S, link.rests)
        link.resting_until = self._clock() + pause
        link.rests += 1
        link.misses, link.suspect, link.unanswered_since = 0, False, None
        link.round_trip.back_off()
        self._waits = WaitCurve()
        self.stats.links_rested += 1
        logger.warning("drafter %s is too slow, silent or failing: left alone for %.1f s", link.link.replica_id, pause)

    def _flush(self) -> None:
        """Send every link what it has to hear. Outside the lock: a link may answer at once."""
        with self._changed:
            outgoing = [(state.link, frame) for state in self._links.values() for frame in state.take_frames()]
        for link, frame in outgoing:
            link.send(frame)


def _backoff(first_s: float, times: int) -> float:
    pause: float = first_s * 2 ** min(times, MAX_DOUBLINGS)
    return min(LONGEST_REST_S, pause)
