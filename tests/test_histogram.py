"""Values in fixed ranges."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.histogram import BOUNDS, Histogram, Ranges

DEPTHS = BOUNDS["depth"]


@pytest.mark.parametrize(
    ("value", "place"), [(0.0, 0), (-1.0, 0), (1.0, 0), (1.1, 1), (16.0, 9), (16.1, 10), (1e9, 10)]
)
def test_a_value_counts_where_its_bound_is_the_first_not_below_it(value: float, place: int) -> None:
    noted = Histogram("depth")
    noted.note(value)
    assert noted.counts == [int(place == n) for n in range(len(DEPTHS) + 1)]


@pytest.mark.parametrize("values", [(), (1.0,), (0.5, 3.0, 99.0)])
def test_what_is_told_is_read_again(values: tuple[float, ...]) -> None:
    noted = Histogram("depth")
    for value in values:
        noted.note(value)
    assert Ranges.read(noted.numbers()) == Ranges(DEPTHS, tuple(noted.counts), sum(values))


def test_prometheus_counts_what_is_at_most_a_bound() -> None:
    assert Ranges((1.0, 2.0, 4.0), (1, 0, 1, 1), 12.5).cumulative() == [1, 1, 2, 3]


@pytest.mark.parametrize(
    "odd",
    [
        None,
        3,
        {},
        {"bounds": "unheard of", "counts": [1], "sum": 0.5},
        {"bounds": "depth", "counts": [1, "2"], "sum": 0.5},
        {"bounds": "depth", "counts": 3, "sum": 0.5},
        {"bounds": "depth", "counts": [1, 2], "sum": None},
        {"bounds": "depth", "counts": [1, True], "sum": 1.0},
        {"bounds": "depth", "counts": [1] * 12, "sum": 12.0},
    ],
)
def test_what_is_no_histogram_is_none(odd: Any) -> None:
    assert Ranges.read(odd) is None


@pytest.mark.parametrize("name", BOUNDS)
def test_bounds_rise(name: str) -> None:
    assert list(BOUNDS[name]) == sorted(set(BOUNDS[name]))
