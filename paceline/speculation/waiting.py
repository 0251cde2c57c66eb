"""How long to wait for a drafter, and how long a step has waited."""

from __future__ import annotations

from dataclasses import dataclass, field

SLACK_S = 0.02
"""What a scheduler, a garbage collection or a long batch may add to a round trip without being a failure."""
SMOOTHING = 0.2
"""Weight of the latest wait."""
WARM_UP = 2
"""Steps with drafts that say nothing about those to come: kernels load at first use, which takes up to a second."""


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


@dataclass(slots=True)
class WaitCurve:
    """Seconds a step waited until it had its candidates, by depth. A step that found them there waited 0.

    The first WARM_UP are not counted: until then a wait is believed to be nothing, so that drafts are asked again.
    """

    means: dict[int, float] = field(default_factory=dict)
    noted: int = 0

    def note(self, depth: int, seconds: float) -> None:
        self.noted += 1
        if self.noted > WARM_UP:
            before = self.means.get(depth, seconds)
            self.means[depth] = before + SMOOTHING * (seconds - before)

    def at(self, depth: int) -> float:
        """Of a depth never tried: that of the nearest one tried, in proportion."""
        if depth == 0 or not self.means:
            return 0.0
        if depth in self.means:
            return self.means[depth]
        nearest = min(self.means, key=lambda tried: (abs(tried - depth), tried))
        return self.means[nearest] * depth / nearest
