"""How long to wait for a drafter, and how long a step has waited."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

SLACK_S = 0.02
"""What a scheduler, a garbage collection or a long batch may add to a round trip without being a failure."""
LATEST = 16
"""Measurements that count."""
ONE_IN = 8
"""Of so many, one may be an accident."""


@dataclass(slots=True)
class RoundTrip:
    """From a question to the answer with the candidates asked for: mean and mean deviation, as RFC 6298 has them."""

    mean: float | None = None
    deviation: float = 0.0

    def note(self, seconds: float) -> None:
        if self.mean is None:
            self.mean, self.deviation = seconds, seconds / 2
            return
        self.deviation += (abs(seconds - self.mean) - self.deviation) / 4
        self.mean += (seconds - self.mean) / 8

    def back_off(self) -> None:
        """The answers stayed away: next time wait longer."""
        if self.mean is not None:
            self.mean *= 2

    def patience(self, limit_s: float) -> float:
        """How long to wait for an answer: well beyond what is usual, never longer than the limit."""
        if self.mean is None:
            return limit_s
        return min(limit_s, 2 * self.mean + 4 * self.deviation + SLACK_S)


class Typical:
    """The mean of the latest measurements without the largest ones, one in ONE_IN and at least one.

    Kernels load at first use, which takes up to a second, and processes are preempted: what happens now and then must
    not look like what happens always. Not the median: a wait is often one of two, none and a whole draft's.
    """

    def __init__(self) -> None:
        self._latest: deque[float] = deque(maxlen=LATEST)
        self.mean: float | None = None
        """None until there are two."""

    def note(self, value: float) -> None:
        self._latest.append(value)
        kept = sorted(self._latest)[: len(self._latest) - -(-len(self._latest) // ONE_IN)]
        self.mean = sum(kept) / len(kept) if kept else None


class WaitCurve:
    """Seconds a step waited until it had its candidates, by depth. A step that found them there waited 0.

    A wait is believed to be nothing until one is known, so that drafts are asked.
    """

    def __init__(self) -> None:
        self._waits: dict[int, Typical] = {}

    def note(self, depth: int, seconds: float) -> None:
        self._waits.setdefault(depth, Typical()).note(seconds)

    def at(self, depth: int) -> float:
        """Of a depth never tried: that of the nearest one tried, in proportion."""
        known = {tried: wait.mean for tried, wait in self._waits.items() if wait.mean is not None}
        if depth == 0 or not known:
            return 0.0
        if depth in known:
            return known[depth]
        nearest = min(known, key=lambda tried: (abs(tried - depth), tried))
        return known[nearest] * depth / nearest
