"""The streams of several targets over one drafter: their frames in, what is for each of them out. No thread."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from paceline.engine.drafter import Drafter
from paceline.errors import DraftError
from paceline.speculation.frames import Candidates, DraftFrame

HEARTBEAT_S = 0.25
"""A stream that waits for an answer hears something at least this often, if only that the drafter is at work."""
IDLE_S = 120.0
"""A sequence its target has not mentioned for so long is forgotten; if the target has not, it opens it again."""
SWEEP_S = 10.0


@dataclass(eq=False, slots=True)
class _Stream:
    """`heard`: when the target last mentioned each sequence. `said`: when it was last told something."""

    said: float
    heard: dict[int, float] = field(default_factory=dict)


class DraftStreams:
    """Sequences belong to the stream that opened them and end with it; their numbers are the target's own."""

    def __init__(self, drafter: Drafter, clock: Callable[[], float] = time.monotonic) -> None:
        self.drafter = drafter
        self._clock = clock
        self._streams: dict[str, _Stream] = {}
        self._swept = clock()

    @property
    def has_work(self) -> bool:
        return self.drafter.has_work

    def connect(self, stream: str) -> None:
        """A target's stream begins."""
        self._streams[stream] = _Stream(self._clock())

    def apply(self, stream: str, frame: DraftFrame) -> None:
        """What a target says after one of its steps. Raises DraftError if its stream is not connected."""
        target = self._streams.get(stream)
        if target is None:
            raise DraftError(f"stream {stream!r} is not connected")
        now = self._clock()
        for sequence in frame.closes:
            self.drafter.close((stream, sequence))
            target.heard.pop(sequence, None)
        for opened in frame.opens:
            self.drafter.open(
                (stream, opened.sequence),
                opened.tokens,
                opened.params,
                opened.depth,
                opened.prompt_length,
                ahead=opened.ahead,
                rejection=opened.rejection,
                streaming=True,
                trace=opened.trace,
            )
            target.heard[opened.sequence] = now
        for step in frame.advances:
            self.drafter.advance((stream, step.sequence), step.base, step.tokens, step.depth)
            if step.sequence in target.heard:
                target.heard[step.sequence] = now
        self._sweep(now)

    def disconnect(self, stream: str) -> None:
        """A target's stream ended, however: forget its sequences, keep their KV as cache."""
        target = self._streams.pop(stream, None)
        for sequence in target.heard if target is not None else ():
            self.drafter.close((stream, sequence))

    def step(self) -> dict[str, list[Candidates]]:
        """One forward pass. What each stream is to be told; nothing at all is a heartbeat."""
        replies: dict[str, list[Candidates]] = {}
        for answer in self.drafter.step():
            stream, sequence = answer.key
            replies.setdefault(stream, []).append(
                Candidates(
                    sequence, answer.base, answer.tokens, answer.failure, answer.offset, answer.probs, answer.final
                )
            )
        now = self._clock()
        for stream, _ in self.drafter.owing:
            if now - self._streams[stream].said >= HEARTBEAT_S:
                replies.setdefault(stream, [])
        for stream in replies.keys() & self._streams.keys():
            self._streams[stream].said = now
        return replies

    def _sweep(self, now: float) -> None:
        if now - self._swept < SWEEP_S:
            return
        self._swept = now
        for stream, target in self._streams.items():
            for sequence in [number for number, heard in target.heard.items() if now - heard > IDLE_S]:
                self.drafter.close((stream, sequence))
                del target.heard[sequence]
