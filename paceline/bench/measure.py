"""Timing by interleaved rounds: what is compared runs in turn, so that a slow minute hits all of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Figure:
    """Repeated measurements of one thing, in `unit`."""

    name: str
    unit: str
    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)


def seconds(run: Callable[[], object]) -> float:
    """Wall-clock seconds of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rounds(
    subjects: Mapping[str, Callable[[], float]], unit: str, repeats: int, on_round: Callable[[], None] = lambda: None
) -> dict[str, Figure]:
    """Call every subject once a round, `repeats` rounds after one that does not count. A subject returns its figure."""
    values: dict[str, list[float]] = {name: [] for name in subjects}
    for n in range(repeats + 1):
        for name, subject in subjects.items():
            value = subject()
            if n > 0:
                values[name].append(value)
        on_round()
    return {name: Figure(name, unit, tuple(found)) for name, found in values.items()}
