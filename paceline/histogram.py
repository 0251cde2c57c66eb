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

BOUNDS: Mapping[str, tuple[float, ...]] = {
    "first_token": (
        *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0),
        *(80.0, 160.0, 640.0, 2560.0),
    ),
    "gap": (
        *(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5),
        *(10.0, 20.0, 40.0, 80.0),
    ),
    "request": (
        *(0.01, 0.03, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0),
        *(240.0, 480.0, 960.0, 1920.0, 7680.0),
    ),
    "tokens": tuple(float(digit * 10**power) for power in range(6) for digit in (1, 2, 5)),
    "step_tokens": tuple(float(n) for n in (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)),
    "phase": (1e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0),
    "depth": tuple(float(n) for n in (1, 2, 3, 4, 5, 6, 8, 10, 12, 16)),
}
"""By a name that stands for them in a status. Replicas of several versions may be asked at once: the bounds of a name
never change, others get another name."""


class Histogram:
    """`counts[i]` values were at most `bounds[i]` and above the bound before it; the last count is of the rest.

    `bounds` are one of BOUNDS, by its name. One thread notes; any thread may read, as every count stands for itself.
    """

    __slots__ = ("_bounds", "counts", "name", "total")

    def __init__(self, bounds: str) -> None:
        self.name = bounds
        self._bounds = BOUNDS[bounds]
        self.counts = [0] * (len(self._bounds) + 1)
        self.total = 0.0

    def note(self, value: float) -> None:
        self.counts[bisect_left(self._bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def numbers(self) -> dict[str, Any]:
        """Ready for JSON; counts up to the last that is not 0."""
        counts = list(self.counts)
        while counts and not counts[-1]:
            counts.pop()
        return {"bounds": self.name, "counts": counts, "sum": self.total}


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
        bounds, counts, total = BOUNDS.get(str(told.get("bounds"))), told.get("counts"), told.get("sum")
        if bounds is None or not isinstance(counts, Sequence) or not all(map(_is_number, (*counts, total))):
            return None
        if (missing := len(bounds) + 1 - len(counts)) < 0:
            return None
        return cls(bounds, (*counts, *[0] * missing), total)  # type: ignore[arg-type]

    def cumulative(self) -> list[float]:
        """As Prometheus counts: how many were at most each bound; last, how many there were."""
        return list(itertools.accumulate(self.counts))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)
