"""How much more load there will be by the time a replica that starts now is ready."""

from __future__ import annotations

from math import exp, sqrt

from paceline.autoscaling.goals import Goals
from paceline.autoscaling.loads import TargetPool

START_S = 60.0
"""What a start takes before one was measured."""
SHORTEST_S, LONGEST_S = 30.0, 600.0
"""Memory of the trend; as long as the start, between these."""
MOST_GROWTH = 1.5
"""A trend is followed no further than this."""


class Trend:
    """Brown's double exponential smoothing: a level and its slope, with one memory and looks at any distance."""

    def __init__(self) -> None:
        self._once: float | None = None
        self._twice = 0.0

    def note(self, passed: float, value: float, memory: float) -> None:
        if self._once is None:
            self._once = self._twice = value
            return
        weight = 1.0 - exp(-passed / memory)
        self._once += weight * (value - self._once)
        self._twice += weight * (self._once - self._twice)

    def growth(self, value: float, ahead: float, memory: float, noise: float) -> float:
        """How many times `value`, which is what there is now, there will be `ahead` seconds from now; at least 1.

        `noise` is how much of the level a rise has to be to be more than chance.
        """
        if self._once is None:
            return 1.0
        level = 2 * self._once - self._twice
        rise = (self._once - self._twice) / memory * ahead - noise * level
        base = max(level, value)
        return min(1.0 + max(0.0, rise) / base, MOST_GROWTH) if base > 0 else 1.0


class Forecast:
    """Of the requests and of the tokens in their prompts."""

    def __init__(self, goals: Goals) -> None:
        self._start = goals.start_s
        self._measured: float | None = None
        self._requests, self._prompts = Trend(), Trend()

    @property
    def ahead(self) -> float:
        """Seconds until a replica that starts now is ready."""
        return self._start or self._measured or START_S

    def note(self, passed: float, pool: TargetPool) -> tuple[float, float]:
        """How many times as many requests, and prompt tokens, there will be."""
        self._measured = pool.start_s or self._measured
        memory = min(max(self.ahead, SHORTEST_S), LONGEST_S)
        rate, prompts = pool.requests_per_s, pool.prompt_tokens_per_s
        if rate is None:
            return 1.0, 1.0
        # Where `rate` requests come in a second by chance, the slope makes a rise out of it whose deviation is half of
        # this share (the variance of once - twice is rate / 4 memory). Two deviations are no chance any more. Prompts
        # are of many lengths besides.
        noise = 1.0 / sqrt(rate * memory) * self.ahead / memory if rate > 0 else 1.0
        grown = _follow(self._requests, passed, rate, self.ahead, memory, noise)
        return grown, 1.0 if prompts is None else _follow(self._prompts, passed, prompts, self.ahead, memory, 2 * noise)


def _follow(trend: Trend, passed: float, value: float, ahead: float, memory: float, noise: float) -> float:
    trend.note(passed, value, memory)
    return trend.growth(value, ahead, memory, noise)
