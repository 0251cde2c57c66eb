"""What happened in the last seconds: means, rates and quantiles, of one thread. A look costs microseconds."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

BUCKET_S = 1.0
LONGEST_PAUSE_S = 60.0
PER_OCTAVE = 16
"""Values within 4.4% of each other are the same to a quantile."""


class SteadyClock:
    """Seconds that never go back. A jump ahead, as after a suspended machine, is a pause of a minute at most."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._last, self._now = clock(), 0.0

    def __call__(self) -> float:
        now = self._clock()
        self._now += min(max(0.0, now - self._last), LONGEST_PAUSE_S)
        self._last = now
        return self._now


@dataclass(slots=True)
class _Bucket:
    number: int
    seconds: float = 0.0
    areas: dict[str, float] = field(default_factory=dict)
    sums: dict[str, float] = field(default_factory=dict)


class Recent:
    """Levels, which are what they were last said to be, and amounts, which are added up."""

    def __init__(self, clock: SteadyClock, window_s: int = 10) -> None:
        self._clock, self._window = clock, round(window_s / BUCKET_S)
        self._buckets: deque[_Bucket] = deque()
        self._levels: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._until = clock()

    def levels(self, **values: float) -> None:
        """From now on."""
        self._advance()
        self._levels.update(values)

    def add(self, **amounts: float) -> None:
        self._advance()
        for name, amount in amounts.items():
            self._add(name, amount)

    def counted(self, **totals: float) -> None:
        """Of counters since the start: what they grew by since they were told last."""
        self._advance()
        for name, total in totals.items():
            self._add(name, total - self._counts.get(name, 0.0))
            self._counts[name] = total

    def mean(self, name: str) -> float | None:
        """Of a level; None if it was never told, or only just."""
        self._advance()
        seconds = sum(bucket.seconds for bucket in self._buckets if name in bucket.areas)
        return sum(bucket.areas.get(name, 0.0) for bucket in self._buckets) / seconds if seconds else None

    def sum(self, name: str) -> float:
        self._advance()
        return sum(bucket.sums.get(name, 0.0) for bucket in self._buckets)

    def rate(self, name: str) -> float:
        """Of an amount, a second. The first second counts as a whole one."""
        total = self.sum(name)
        return total / max(BUCKET_S, sum(bucket.seconds for bucket in self._buckets))

    def _add(self, name: str, amount: float) -> None:
        sums = self._bucket(self._until).sums
        sums[name] = sums.get(name, 0.0) + amount

    def _advance(self) -> None:
        """The levels held until now."""
        now = self._clock()
        begin = max(self._until, now - self._window * BUCKET_S)
        while begin < now:
            bucket = self._bucket(begin)
            seconds = min(now, (bucket.number + 1) * BUCKET_S) - begin
            bucket.seconds += seconds
            for name, value in self._levels.items():
                bucket.areas[name] = bucket.areas.get(name, 0.0) + value * seconds
            begin = min(now, (bucket.number + 1) * BUCKET_S)
        self._until = now
        while self._buckets and self._buckets[0].number <= now // BUCKET_S - self._window:
            self._buckets.popleft()

    def _bucket(self, moment: float) -> _Bucket:
        number = int(moment // BUCKET_S)
        if not self._buckets or self._buckets[-1].number != number:
            self._buckets.append(_Bucket(number))
        return self._buckets[-1]


class RecentQuantiles:
    """Of positive values, by the logarithm."""

    def __init__(self, clock: SteadyClock, window_s: int = 30) -> None:
        self._clock, self._window = clock, round(window_s / BUCKET_S)
        self._buckets: deque[tuple[int, Counter[int]]] = deque()

    def note(self, value: float, times: int = 1) -> None:
        self._current()[round(PER_OCTAVE * math.log2(max(value, 1e-6)))] += times

    def at(self, share: float) -> float | None:
        """The value that so many are not above; None if there were none."""
        self._current()
        counts: Counter[int] = Counter()
        for _, found in self._buckets:
            counts.update(found)
        left = share * counts.total()
        for place in sorted(counts):
            left -= counts[place]
            if left <= 0:
                return float(2.0 ** (place / PER_OCTAVE))
        return None

    def _current(self) -> Counter[int]:
        number = int(self._clock() // BUCKET_S)
        if not self._buckets or self._buckets[-1][0] != number:
            self._buckets.append((number, Counter()))
        while self._buckets[0][0] <= number - self._window:
            self._buckets.popleft()
        return self._buckets[-1][1]
