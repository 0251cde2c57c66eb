"""Candidates from draft replicas elsewhere: a state machine over links, with no transport in it.

    link      up ──missed too often or failing──► resting (backoff, doubling) ──rest over──► up
    sequence  unassigned ──open──► assigned to one link ──link lost, rests or failed──► unassigned

A link that lets a sequence go is told to close it, so that no drafter holds KV for a sequence it lost.

Two threads meet here: the engine's (open, propose, advance, close) and the transport's (add_link,
remove_link, retire_link, restore_link, receive). One lock guards the state; only `propose` waits, on a
condition, until a deadline.
"""

from __future__ import annotations

import logging
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from paceline.errors import DraftError
from paceline.speculation.frames import Advance, Candidates, DraftFrame, Open
from paceline.speculation.proposer import Proposal, Proposer, Source, Wanted
from paceline.types import SamplingParams

logger = logging.getLogger(__name__)

LATE_BEFORE_REST = 3
"""Misses in a row, late or out of step with the sequence, before a link is left alone."""
FIRST_REST_S = 0.5
LONGEST_REST_S = 30.0
MAX_DOUBLINGS = 16


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
    misses: int = 0
    rests: int = 0
    resting_until: float = 0.0
    retired: bool = False
    opens: list[Open] = field(default_factory=list)
    advances: list[Advance] = field(default_factory=list)
    closes: list[int] = field(default_factory=list)

    def forget(self, sequence: int) -> None:
        """Take back what was not sent yet, since a frame's closes come first, and have it closed there."""
        self.sequences.discard(sequence)
        self.opens = [opened for opened in self.opens if opened.sequence != sequence]
        self.advances = [step for step in self.advances if step.sequence != sequence]
        self.closes.append(sequence)

    def take_frame(self) -> DraftFrame | None:
        if not (self.opens or self.advances or self.closes):
            return None
        frame = DraftFrame(tuple(self.opens), tuple(self.advances), tuple(self.closes))
        self.opens, self.advances, self.closes = [], [], []
        return frame


@dataclass(eq=False, slots=True)
class _SequenceState:
    """`tokens` begin with the prompt, of `prompt_length`.

    `asked` is the base position its link was last asked for, None if it was not; `candidates` answers it.
    """

    tokens: list[int]
    params: SamplingParams
    prompt_length: int
    link: str | None = None
    asked: int | None = None
    candidates: Candidates | None = None

    def ask(self, depth: int) -> None:
        self.asked = len(self.tokens) if depth > 0 else None


class RemoteProposer(Proposer):
    """Spreads sequences over the links there are, and goes on without any.

    `timeout_s` bounds the wait for candidates, from the moment they were asked for. A link that misses
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
        self._latency_s = 0.0

    # Called by the transport.

    def add_link(self, link: DraftLink) -> None:
        """A stream is up and its drafter shares our tokenizer. One of the same replica before it is gone."""
        with self._changed:
            self._lose(link.replica_id)
            self._links[link.replica_id] = _LinkState(link)

    def remove_link(self, replica_id: str) -> None:
        """A stream is gone. Its sequences decode plainly until another drafter takes them."""
        with self._changed:
            self._lose(replica_id)

    def retire_link(self, replica_id: str) -> None:
        """The drafter is leaving: it keeps the sequences it has while its stream lasts and gets no more."""
        self._set_retired(replica_id, True)

    def restore_link(self, replica_id: str) -> None:
        """The drafter stays after all."""
        self._set_retired(replica_id, False)

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
            self._forget(sequence)
            state = self._sequences[sequence] = _SequenceState(list(tokens), params, len(tokens))
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

    def propose(self, wanted: Sequence[Wanted]) -> Mapping[int, Proposal]:
        deadline = self._asked_at + self._timeout_s
        with self._changed:
            while self._any_missing(wanted) and (left := deadline - self._clock()) > 0:
                self._changed.wait(left)
            found = {want.sequence: ready for want in wanted if (ready := self._ready(want)) is not None}
            self._note_lateness(wanted, found.keys())
        return found

    def close(self, sequence: int) -> None:
        with self._changed:
            self._forget(sequence)
        self._flush()

    def serves(self, sequence: int) -> bool:
        with self._changed:
            state = self._sequences.get(sequence)
            return state is not None and state.link is not None

    def latency(self, depth: int) -> float:
        return 0.0 if depth == 0 else self._latency_s

    def check(self) -> None:
        """Raise DraftError unless every assigned sequence is in the books of its link, and of no other."""
        with self._changed:
            booked = sorted((s, name) for name, link in self._links.items() for s in link.sequences)
            assigned = sorted((s, state.link) for s, state in self._sequences.items() if state.link is not None)
            if booked != assigned:
                raise DraftError(f"draft links hold {booked}, sequences say {assigned}")
            if any(state.link is None and state.asked is not None for state in self._sequences.values()):
                raise DraftError("a sequence without a link waits for candidates")

    # State changes, under the lock.

    def _lose(self, replica_id: str) -> None:
        if replica_id in self._links:
            self.stats.links_lost += 1
            self._unassign_all(replica_id)
            del self._links[replica_id]
            self._changed.notify_all()

    def _set_retired(self, replica_id: str, retired: bool) -> None:
        with self._changed:
            if (link := self._links.get(replica_id)) is not None:
                link.retired = retired

    def _forget(self, sequence: int) -> None:
        if (state := self._sequences.pop(sequence, None)) is not None:
            self._unassign(sequence, state)

    def _advance_one(self, state: _SequenceState, update: Advance) -> None:
        state.tokens[update.base :] = update.tokens
        state.candidates = None
        if state.link is None:
            self._assign(update.sequence, state, update.depth)
        else:
            self._links[state.link].advances.append(update)
            state.ask(update.depth)

    def _assign(self, sequence: int, state: _SequenceState, depth: int) -> None:
        """Give a sequence to the link with the fewest, among those neither resting nor retired."""
        now = self._clock()
        awake = [link for link in self._links.values() if not link.retired and link.resting_until <= now]
        if not awake:
            return
        link = min(awake, key=lambda link: len(link.sequences))
        link.sequences.add(sequence)
        link.opens.append(Open(sequence, tuple(state.tokens), state.params, depth, state.prompt_length))
        state.link = link.link.replica_id
        state.ask(depth)

    def _take_reply(self, replica_id: str, reply: Candidates) -> None:
        state = self._sequences.get(reply.sequence)
        if state is None or state.link != replica_id or (reply.failure is None and reply.base != state.asked):
            self.stats.wasted += len(reply.tokens)
            return
        if reply.failure is None:
            state.candidates = reply
            link = self._links[replica_id]
            link.misses = link.rests = 0
            return
        logger.info("drafter %s: sequence %d: %s", replica_id, reply.sequence, reply.failure)
        self._unassign(reply.sequence, state)
        if reply.failure.reopen:
            self.stats.reopened += 1
            self._miss(replica_id)
        else:
            self._rest(replica_id)

    def _unassign(self, sequence: int, state: _SequenceState) -> None:
        if state.link is not None:
            self._links[state.link].forget(sequence)
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

    def _ready(self, want: Wanted) -> Proposal | None:
        state = self._sequences.get(want.sequence)
        if state is None or state.candidates is None or state.candidates.base != want.base:
            return None
        return Proposal(state.candidates.tokens[: want.depth], Source.REMOTE)

    def _note_lateness(self, wanted: Sequence[Wanted], found: Iterable[int]) -> None:
        late = {want.sequence for want in wanted} - set(found)
        self.stats.late += len(late)
        known = [state for sequence in late if (state := self._sequences.get(sequence)) is not None]
        for replica_id in {state.link for state in known if state.link is not None and state.asked is not None}:
            self._miss(replica_id)

    def _miss(self, replica_id: str) -> None:
        link = self._links[replica_id]
        link.misses += 1
        if link.misses >= LATE_BEFORE_REST:
            self._rest(replica_id)

    def _rest(self, replica_id: str) -> None:
        """Leave a drafter alone for a while; it forgets our sequences, so that it catches up on nothing stale."""
        link = self._links[replica_id]
        self._unassign_all(replica_id)
        pause = min(LONGEST_REST_S, FIRST_REST_S * 2 ** min(link.rests, MAX_DOUBLINGS))
        link.resting_until = self._clock() + pause
        link.rests += 1
        link.misses = 0
        self.stats.links_rested += 1
        logger.warning("drafter %s is too slow or failing: left alone for %.1f s", replica_id, pause)

    def _flush(self) -> None:
        """Send one frame to every link that has something to hear. Outside the lock: a link may answer at once."""
        with self._changed:
            frames = [(state.link, frame) for state in self._links.values() if (frame := state.take_frame())]
        for link, frame in frames:
            link.send(frame)
