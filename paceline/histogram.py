"""How often values fell into fixed ranges: noted where they arise, told in a status, read by /metrics.

    Histogram ── numbers() ──► plain JSON in a replica's status ── Ranges.read() ──► lines of /metrics

The bounds of what vLLM has too are vLLM's, with finer ones below where a small model is faster than its first.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

FIRST_TOKEN = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
    *(160.0, 640.0, 2560.0),
)
GAP = (
    *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0),
    *(20.0, 40.0, 80.0),
)
REQUEST = (
    *(0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0),
    *(480.0, 960.0, 1920.0, 7680.0),
)
TOKENS = tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5))
STEP_TOKENS = tuple(float(n) for n in (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384))
PHASE = (1e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
DEPTH = tuple(float(n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16))


class Histogram:
    """`counts[i]` values were at most `bounds[i]` and above the bound before it; the last count is of the rest.

    One thread notes; any thread may read, as every count stands for itself.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.total = 0.0

    def note(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def numbers(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {"bounds": list(self.bounds), "counts": list(self.counts), "sum": self.total}


@dataclass(frozen=True, slots=True)
class Ranges:
    """A histogram as somebody told it."""

    bounds: tuple[float, ...]
    counts: tuple[float, ...]
    total: float

    @classmethod
    def read(cls, told: Any) -> Self | None:
        """None of what is no histogram: who tells it may be of another version."""
        if not isinstance(told, Mapping):
            return None
        bounds, counts, total = _numbers(told.get("bounds")), _numbers(told.get("counts")), _numbers([told.get("sum")])
        if not total or len(counts) != len(bounds) + 1:
            return None
        return cls(bounds, counts, total[0])

    def cumulative(self) -> list[float]:
        """As Prometheus counts: how many were at most each bound; last, how many there were."""
        return list(itertools.accumulate(self.counts))


def _numbers(values: Any) -> tuple[float, ...]:
    """None of them if one is no number."""
    known = isinstance(values, Sequence) and all(type(value) in (int, float) for value in values)
    return tuple(values) if known else ()
