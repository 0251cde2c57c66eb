"""How the number of replicas follows what is wanted: delays, a dead band, steps and bounds.

Up when more was wanted throughout the delay; down to the most that was wanted during the other, longer one, so that a
wave in the load is not followed into its trough. Between the two lies a band in which nothing happens.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from math import ceil, exp

from paceline.autoscaling.goals import PoolGoals

UP_BAND = 0.05
"""Replicas run fuller than they should by this share before there are more of them."""
DOWN_BAND, DOWN_REPLICAS = 0.1, 0.3
"""Fewer replicas must have this share to spare, of those beyond the first, or this many if that is less."""
LEAST_DROP = 0.03
"""A pool that would become smaller by less than this share stays."""
REMEMBERED_S, NOISE = 60.0, 1.1
"""What is held against going down is the mean of the load over so many seconds, so many times as much for its noise:
the few seconds in which new replicas work off a queue are no load to keep them for."""
STEP_S = 10.0
"""Of time that one step is for."""
ALWAYS_UP, ALWAYS_DOWN = 4, 1
"""Replicas that a step may always bring or take."""
MOST_WANTED = 1e9
"""Replicas: a load over next to no seats would want any number of them."""
JUMP = 10.0
"""Intervals; a difference of time longer than this is no time that passed."""


class Stopwatch:
    """Seconds from look to look, by a clock that may jump: then one interval has passed."""

    def __init__(self, interval_s: float) -> None:
        self._interval = interval_s
        self._last: float | None = None

    def passed(self, now: float) -> float:
        before, self._last = self._last, now
        if before is None:
            return 0.0
        seconds = now - before
        return seconds if 0 <= seconds <= JUMP * self._interval else self._interval


class Peak:
    """The largest value of the last seconds, in constant time; of the negated ones it is the smallest."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._since: float | None = None
        self._now = 0.0
        self._falling: deque[tuple[float, float]] = deque()

    def add(self, now: float, value: float) -> float:
        """The largest, this value included."""
        self._since = now if self._since is None else self._since
        self._now = now
        while self._falling and self._falling[-1][1] <= value:
            self._falling.pop()
        self._falling.append((now, value))
        while self._falling[0][0] < now - self._seconds:
            self._falling.popleft()
        return self._falling[0][1]

    @property
    def is_full(self) -> bool:
        """Whether it has looked for all of its seconds."""
        return self._since is not None and self._now - self._since >= self._seconds


@dataclass(frozen=True, slots=True)
class Settled:
    """`replicas`, because `most` were wanted of late; `bounded` if the settings' fewest or most stood in the way."""

    replicas: int
    most: float
    bounded: bool = False


class Damping:
    """Of one pool. Its time stands still while nobody knows what is wanted."""

    def __init__(self, goals: PoolGoals) -> None:
        self._goals = goals
        self._time = 0.0
        self._lasting: float | None = None
        self._lows = Peak(goals.upscale_delay_s)
        self._highs = Peak(goals.downscale_delay_s)
        self._fewest, self._most = Peak(STEP_S), Peak(STEP_S)

    def settle(self, passed: float, before: int, want: float, lasting: float | None = None) -> Settled:
        """How many in place of `before`, `passed` seconds after the last look, if `want` would do now.

        `lasting` is what of it is remembered, as its mean over a while and some noise; without it that is all.
        """
        self._time += passed
        want, lasting = min(want, MOST_WANTED), None if lasting is None else min(lasting, MOST_WANTED)
        kept = want if lasting is None else NOISE * self._mean(passed, lasting)
        low, high = -self._lows.add(self._time, -want), max(want, self._highs.add(self._time, kept))
        fewest, most = -int(self._fewest.add(self._time, -before)), int(self._most.add(self._time, before))
        aim = before
        if self._lows.is_full and low > before * (1 + UP_BAND):
            aim = min(ceil(low), self._up_from(fewest, before))
        elif self._highs.is_full and (enough := with_room(high)) <= before - max(1.0, LEAST_DROP * before):
            aim = max(enough, self._down_from(most, before))
        replicas = bounded(aim, self._goals)
        return Settled(replicas, high, replicas != aim)

    def _mean(self, passed: float, lasting: float) -> float:
        before = lasting if self._lasting is None else self._lasting
        self._lasting = lasting + (before - lasting) * exp(-passed / REMEMBERED_S)
        return self._lasting

    def _up_from(self, fewest: int, before: int) -> int:
        return max(before, fewest + ALWAYS_UP, int(fewest * min(self._goals.max_upscale, 1e6)))

    def _down_from(self, most: int, before: int) -> int:
        return min(before, most - down_step(most, self._goals))


def bounded(replicas: int, goals: PoolGoals) -> int:
    """As many as the settings allow."""
    return min(max(replicas, goals.min_replicas), goals.max_replicas)


def down_step(replicas: int, goals: PoolGoals) -> int:
    """How many of them may go at once."""
    return max(ALWAYS_DOWN, int(replicas * goals.max_downscale))


def with_room(want: float) -> int:
    """Whole replicas for so much, with some to spare, so that a little more does not bring back what just went."""
    return ceil(want + min(DOWN_BAND * max(0.0, want - 1), DOWN_REPLICAS))
