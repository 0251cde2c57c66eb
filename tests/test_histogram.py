"""Values in fixed ranges."""

from __future__ import annotations

from typing import Any

import pytest

from paceline import histogram
from paceline.histogram import Histogram, Ranges

BOUNDS = (1.0, 2.0, 4.0)


@pytest.mark.parametrize(("value", "place"), [(0.0, 0), (-1.0, 0), (1.0, 0), (1.1, 1), (4.0, 2), (4.1, 3), (1e9, 3)])
def test_a_value_counts_where_its_bound_is_the_first_not_below_it(value: float, place: int) -> None:
    noted = Histogram(BOUNDS)
    noted.note(value)
    assert noted.counts == [int(place == n) for n in range(4)]


def test_what_is_told_is_read_again() -> None:
    noted = Histogram(BOUNDS)
    for value in (0.5, 3.0, 9.0):
        noted.note(value)
    assert Ranges.read(noted.numbers()) == Ranges(BOUNDS, (1, 0, 1, 1), 12.5)


def test_prometheus_counts_what_is_at_most_a_bound() -> None:
    assert Ranges(BOUNDS, (1, 0, 1, 1), 12.5).cumulative() == [1, 1, 2, 3]


@pytest.mark.parametrize(
    "odd",
    [
        None,
        3,
        {},
        {"bounds": [1.0], "counts": [1], "sum": 0.5},
        {"bounds": [1.0], "counts": [1, "2"], "sum": 0.5},
        {"bounds": 1.0, "counts": [1, 2], "sum": 0.5},
        {"bounds": [1.0], "counts": [1, 2], "sum": None},
        {"bounds": [1.0], "counts": [1, True], "sum": 1.0},
    ],
)
def test_what_is_no_histogram_is_none(odd: Any) -> None:
    assert Ranges.read(odd) is None


@pytest.mark.parametrize("name", ["FIRST_TOKEN", "GAP", "REQUEST", "TOKENS", "STEP_TOKENS", "PHASE", "DEPTH"])
def test_bounds_rise(name: str) -> None:
    bounds = getattr(histogram, name)
    assert list(bounds) == sorted(set(bounds))
