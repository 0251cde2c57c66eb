"""Candidates from draft replicas elsewhere: a state machine over links, with no transport in it.

    link      up ──lost or late too often──► resting (backoff, doubling) ──rest over──► up
    sequence  unassigned ──open──► assigned to one link ──link lost, rests or failed──► unassigned

Two threads meet here: the engine's (open, propose, advance, close) and the transport's (add_link,
remove_link, receive). One lock guards the state; only `propose` waits, on a condition, until a deadline.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from paceline.speculation.frames import Advance, Candidates, DraftFrame, Open
from paceline.speculation.proposer import Proposer, Wanted
from paceline.types import SamplingParams

logger = logging.getLogger(__name__)

LATE_BEFORE_REST = 3
"""Steps in a row a link may miss before it is left alone."""
FIRST_REST_S = 0.5
LONGEST_REST_S = 30.0


class DraftLink(ABC):
    """One stream to one draft replica."""

    replica_id: str

    @abstractmethod
    def send(self, frame: DraftFrame) -> None:
        """Hand a frame to the transport. Never blocks, never raises; a broken link is reported by `remove_link`."""


@dataclass(slots=True)
class RemoteStats:
    """Counters since the start."""

    late: int = 0
    wasted: int = 0
    reopened: int = 0
    links_lost: int = 0
    links_rested: int = 0


@dataclass(eq=False, slots=True)
class _LinkState:
    link: DraftLink
    sequences: set[int] = field(default_factory=set)
    late_in_a_row: int = 0
    rests: int = 0
    resting_until: float = 0.0
    opens: list[Open] = field(default_factory=list)
    advances: list[Advance] = field(default_factory=list)
    closes: list[int] = field(default_factory=list)

    def take_frame(self) -> DraftFrame | None:
        if not (self.opens or self.advances or self.closes):
            return None
        frame = DraftFrame(tuple(self.opens), tuple(self.advances), tuple(self.closes))
        self.opens, self.advances, self.closes = [], [], []
        return frame


@dataclass(eq=False, slots=True)
class _SequenceState:
    """`asked` is the base position candidates were last asked for; `candidates` answers it."""

    tokens: list[int]
    params: SamplingParams
    link: str | None = None
    asked: int | None = None
    candidates: Candidates | None = None


class RemoteProposer(Proposer):
    """Spreads sequences over the links there are, and goes on without any.

    `timeout_s` bounds the wait for candidates, from the moment they were asked for. A link that is late
    LATE_BEFORE_REST times in a row rests for 0.5 s, then 1, 2, … up to 30.
    """

    def __init__(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.stats = RemoteStats()
        self._timeout_s = timeout_s
        self._clock = clock
        self._changed = threading.Condition()
        self._links: dict[str, _LinkState] = {}
        self._sequences: dict[int, _SequenceState] = {}
        self._asked_at = 0.0

    # Called by the transport.

    def add_link(self, link: DraftLink) -> None:
        """A stream is up and its drafter shares our tokenizer."""
        with self._changed:
            self._links[link.replica_id] = _LinkState(link)

    def remove_link(self, replica_id: str) -> None:
        """A stream is gone. Its sequences decode plainly until another drafter takes them."""
        with self._changed:
            if self._links.get(replica_id) is not None:
                self.stats.links_lost += 1
                self._unassign_all(replica_id)
                del self._links[replica_id]
                self._changed.notify_all()

    def retire_link(self, replica_id: str) -> None:
        """The drafter is leaving: it keeps the sequences it has while its stream lasts and gets no more."""
        with self._changed:
            if (state := self._links.get(replica_id)) is not None:
                state.resting_until = math.inf

    def receive(self, replica_id: str, replies: Iterable[Candidates]) -> None:
        """Replies arrived on a link."""
        with self._changed:
            for reply in replies:
                self._take_reply(replica_id, reply)
            self._changed.notify_all()

    @property
    def link_ids(self) -> list[str]:
        with self._changed:
            return list(self._links)

    # Called by the engine.

    def open(self, sequence: int, tokens: Sequence[int], params: SamplingParams) -> None:
        with self._changed:
            state = self._sequences[sequence] = _SequenceState(list(tokens), params)
            self._assign(sequence, state, depth=0)
        self._flush()

    def advance(self, updates: Sequence[Advance]) -> None:
        with self._changed:
            self._asked_at = self._clock()
            for update in updates:
                state = self._sequences.get(update.sequence)
                if state is not None:
                    self._advance_one(state, update)
        self._flush()

    def propose(self, wanted: Sequence[Wanted]) -> Mapping[int, tuple[int, ...]]:
        deadline = self._asked_at + self._timeout_s
        with self._changed:
            while self._any_missing(wanted) and (left := deadline - self._clock()) > 0:
                self._changed.wait(left)
            found = {want.sequence: ready for want in wanted if (ready := self._ready(want)) is not None}
            self._note_lateness(wanted, found.keys())
        return found

    def close(self, sequence: int) -> None:
        with self._changed:
            state = self._sequences.pop(sequence, None)
            if state is not None and state.link is not None:
                link = self._links[state.link]
                link.sequences.discard(sequence)
                link.closes.append(sequence)
        self._flush()

    # State changes, under the lock.

    def _advance_one(self, state: _SequenceState, update: Advance) -> None:
        state.tokens[update.base :] = update.tokens
        state.candidates = None
        state.asked = len(state.tokens) if update.depth > 0 else None
        if state.link is None:
            self._assign(update.sequence, state, update.depth)
        else:
            self._links[state.link].advances.append(update)

    def _assign(self, sequence: int, state: _SequenceState, depth: int) -> None:
        """Give a sequence to the link with the fewest, among those not resting."""
        now = self._clock()
        awake = [(replica_id, link) for replica_id, link in self._links.items() if link.resting_until <= now]
        if not awake:
            return
        replica_id, link = min(awake, key=lambda item: len(item[1].sequences))
        link.sequences.add(sequence)
        link.opens.append(Open(sequence, tuple(state.tokens), state.params, depth))
        state.link = replica_id
        state.asked = len(state.tokens) if depth > 0 else None

    def _take_reply(self, replica_id: str, reply: Candidates) -> None:
        state = self._sequences.get(reply.sequence)
        if state is None or state.link != replica_id or (reply.failure is None and reply.base != state.asked):
            self.stats.wasted += len(reply.tokens)
            return
        if reply.failure is None:
            state.candidates = reply
            link = self._links[replica_id]
            link.late_in_a_row = link.rests = 0
            return
        logger.info("drafter %s: sequence %d: %s", replica_id, reply.sequence, reply.failure)
        self.stats.reopened += reply.failure.reopen
        self._unassign(reply.sequence, state)
        if not reply.failure.reopen:
            self._rest(replica_id)

    def _unassign(self, sequence: int, state: _SequenceState) -> None:
        if state.link is not None:
            self._links[state.link].sequences.discard(sequence)
        state.link = state.asked = state.candidates = None

    def _unassign_all(self, replica_id: str) -> None:
        for sequence in list(self._links[replica_id].sequences):
            self._unassign(sequence, self._sequences[sequence])

    def _any_missing(self, wanted: Sequence[Wanted]) -> bool:
        """Whether waiting may still bring something."""
        for want in wanted:
            state = self._sequences.get(want.sequence)
            if state is not None and state.asked == want.base and state.candidates is None:
                return True
        return False

    def _ready(self, want: Wanted) -> tuple[int, ...] | None:
        state = self._sequences.get(want.sequence)
        if state is None or state.candidates is None or state.candidates.base != want.base:
            return None
        return state.candidates.tokens[: want.depth]

    def _note_lateness(self, wanted: Sequence[Wanted], found: Iterable[int]) -> None:
        late = {want.sequence for want in wanted} - set(found)
        self.stats.late += len(late)
        for replica_id in {s.link for q in late if (s := self._sequences.get(q)) is not None and s.asked is not None}:
            if replica_id is None:
                continue
            link = self._links[replica_id]
            link.late_in_a_row += 1
            if link.late_in_a_row >= LATE_BEFORE_REST:
                self._rest(replica_id)

    def _rest(self, replica_id: str) -> None:
        """Leave a drafter alone for a while; it forgets our sequences, so that it catches up on nothing stale."""
        link = self._links[replica_id]
        link.closes.extend(link.sequences)
        self._unassign_all(replica_id)
        pause = min(LONGEST_REST_S, FIRST_REST_S * 2**link.rests)
        link.resting_until = self._clock() + pause
        link.rests += 1
        link.late_in_a_row = 0
        self.stats.links_rested += 1
        logger.warning("drafter %s is too slow or failing: left alone for %.1f s", replica_id, pause)

    def _flush(self) -> None:
        """Send one frame to every link that has something to hear. Outside the lock: a link may answer at once."""
        with self._changed:
            frames = [(state.link, frame) for state in self._links.values() if (frame := state.take_frame())]
        for link, frame in frames:
            link.send(frame)
