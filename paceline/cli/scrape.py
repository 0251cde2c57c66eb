"""What lies between two looks at /metrics: growth of counters, rates, quantiles, as Prometheus computes them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

from paceline.errors import Unavailable

Labels = frozenset[tuple[str, str]]
REPLICA = "replica"


@dataclass(frozen=True, slots=True)
class Scrape:
    """/metrics at one time, in seconds of a clock that never goes back."""

    at: float
    series: Mapping[str, Mapping[Labels, float]] = field(default_factory=dict)

    @classmethod
    def read(cls, text: str, at: float) -> Scrape:
        """Raises Unavailable for what is no Prometheus text."""
        series: dict[str, dict[Labels, float]] = {}
        try:
            for family in text_string_to_metric_families(text):
                for sample in family.samples:
                    series.setdefault(sample.name, {})[frozenset(sample.labels.items())] = sample.value
        except ValueError as error:
            raise Unavailable(f"/metrics is no Prometheus text: {error}; check --url") from None
        return cls(at, series)

    def replicas(self) -> set[str]:
        """Those that reported anything."""
        return {
            value for series in self.series.values() for labels in series for name, value in labels if name == REPLICA
        }


class Interval:
    """From one look to the next. What cannot be known is None."""

    def __init__(self, before: Scrape | None, after: Scrape) -> None:
        self.seconds = 0.0 if before is None else after.at - before.at
        self._before = before
        self._after = after
        self._known = set() if before is None else before.replicas()

    def grown(self, name: str, **labels: str) -> float | None:
        """By how much the counters with these labels grew, together."""
        found = [grown for has, grown in self._each(name, labels)]
        return sum(found) if found else None

    def rate(self, name: str, **labels: str) -> float | None:
        """In a second."""
        grown = self.grown(name, **labels)
        return None if grown is None or self.seconds <= 0 else grown / self.seconds

    def ratio(self, part: str, whole: str, **labels: str) -> float | None:
        """What one counter grew for each time that another did."""
        grown, of = self.grown(part, **labels), self.grown(whole, **labels)
        return None if grown is None or not of else grown / of

    def mean(self, histogram: str, **labels: str) -> float | None:
        return self.ratio(f"{histogram}_sum", f"{histogram}_count", **labels)

    def quantile(self, q: float, histogram: str, **labels: str) -> float | None:
        """Of the values noted in between, linear within a bucket; None if there were none."""
        buckets: dict[float, float] = {}
        for has, grown in self._each(f"{histogram}_bucket", labels):
            bound = float(dict(has).get("le", "nan"))
            buckets[bound] = buckets.get(bound, 0.0) + grown
        return _quantile(q, sorted(buckets.items()))

    def _each(self, name: str, labels: Mapping[str, str]) -> list[tuple[Labels, float]]:
        if self._before is None:
            return []
        wanted = labels.items()
        earlier = self._before.series.get(name, {})
        found = []
        for has, value in self._after.series.get(name, {}).items():
            if wanted <= set(has) and (grown := self._growth(has, earlier.get(has), value)) is not None:
                found.append((has, grown))
        return found

    def _growth(self, has: Labels, before: float | None, after: float) -> float | None:
        """A counter below what it was began anew. One that was not there began in between, unless its replica was not
        there either: then that had not answered, or has only come, and nobody knows since when it counts."""
        if before is None:
            replica = dict(has).get(REPLICA)
            return after if replica is None or replica in self._known else None
        return after - before if after >= before else after


def _quantile(q: float, buckets: list[tuple[float, float]]) -> float | None:
    """Of cumulative counts by upper bound."""
    if not buckets or not buckets[-1][1] > 0:
        return None
    rank, lower, below = q * buckets[-1][1], 0.0, 0.0
    for bound, count in buckets:
        if count >= rank and count > below:
            return lower if math.isinf(bound) else lower + (bound - lower) * (rank - below) / (count - below)
        lower, below = lower if math.isinf(bound) else bound, count
    return lower
