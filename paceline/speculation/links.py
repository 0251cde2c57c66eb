"""What the target's side knows of a stream to a drafter, and of a sequence on it."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from array import array
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from paceline.speculation.frames import Advance, DraftFrame, Open
from paceline.speculation.run import Run
from paceline.speculation.waiting import RoundTrip
from paceline.types import SamplingParams

MAX_OPENING_TOKENS = 1 << 18
"""Histories in one frame, in tokens: at most 1.3 MB of them, unless one alone is longer."""
MAX_ASKS = 16
AFFINITY_TOKENS = 48
"""First tokens of a text by which it prefers a drafter."""


class DraftLink(ABC):
    """One stream to one draft replica. The transport counts what crosses."""

    replica_id: str
    bytes_sent: int = 0
    bytes_received: int = 0

    @abstractmethod
    def send(self, frame: DraftFrame) -> None:
        """Hand a frame to the transport. Never blocks, never raises; a broken link is reported by `remove_link`."""


@dataclass(eq=False, slots=True)
class LinkState:
    """`unanswered_since`: a question was sent then and nothing at all was heard after it."""

    link: DraftLink
    sequences: set[int] = field(default_factory=set)
    round_trip: RoundTrip = field(default_factory=RoundTrip)
    asked_at: float = 0.0
    unanswered_since: float | None = None
    suspect: bool = False
    misses: int = 0
    rests: int = 0
    resting_until: float = 0.0
    full_until: float = 0.0
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
        if not self.sequences:
            self.unanswered_since = None

    def affinity(self, tokens: Sequence[int]) -> int:
        """How much this link is for a text that begins so: the next turn of a session finds the draft KV of the last
        (rendezvous hashing, Thaler and Ravishankar 1998)."""
        beginning = array("i", tokens[:AFFINITY_TOKENS]).tobytes()
        return zlib.crc32(beginning + self.link.replica_id.encode())

    def ask(self, now: float) -> None:
        if self.unanswered_since is None:
            self.unanswered_since = now

    def take_frames(self) -> list[DraftFrame]:
        """Everything there is to say, in one frame unless that were too long."""
        if not (self.opens or self.advances or self.closes):
            return []
        bundles: list[list[Open]] = [[]]
        tokens = 0
        for opened in self.opens:
            if bundles[-1] and tokens + len(opened.tokens) > MAX_OPENING_TOKENS:
                bundles.append([])
                tokens = 0
            bundles[-1].append(opened)
            tokens += len(opened.tokens)
        # Advances come last: one of them may follow an opening.
        *before, last = [tuple(bundle) for bundle in bundles]
        closes, advances = tuple(self.closes), tuple(self.advances)
        self.opens, self.advances, self.closes = [], [], []
        frames = [DraftFrame(opens=bundle) for bundle in before] + [DraftFrame(last, advances)]
        frames[0] = DraftFrame(frames[0].opens, frames[0].advances, closes)
        return frames


@dataclass(eq=False, slots=True)
class SequenceState:
    """`opened` and `opened_at`: the agreed length its link was told, and when. `ready`: the link answered that.

    `depth` candidates are wanted now. `ends`: the drafter's context is full. `asks` are the agreed lengths at which
    its drafter was asked for more, and when.
    """

    run: Run
    params: SamplingParams
    prompt_length: int
    trace: str = ""
    link: str | None = None
    opened: int = 0
    opened_at: float = 0.0
    ready: bool = False
    ends: bool = False
    depth: int = 0
    asks: deque[tuple[int, float]] = field(default_factory=lambda: deque(maxlen=MAX_ASKS))
    refused: dict[str, float] = field(default_factory=dict)
    refusals: int = 0

    @property
    def hungry(self) -> bool:
        return not self.ends and len(self.run.candidates) < self.depth

    def unassign(self) -> None:
        self.link, self.ready, self.ends = None, False, False
        self.asks.clear()
        self.run.restart()
