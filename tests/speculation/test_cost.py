"""The cost of rows: the measured curve, and what steps teach beyond it."""

from __future__ import annotations

import random

import pytest

from paceline.speculation.cost import VerifyCost

POINTS = {1: 0.010, 4: 0.012, 8: 0.020}


def test_measured_points_come_back() -> None:
    cost = VerifyCost(POINTS)
    assert [cost.seconds(rows) for rows in POINTS] == list(POINTS.values())


def test_between_points_it_interpolates_and_beyond_it_goes_on() -> None:
    cost = VerifyCost(POINTS)
    assert (cost.curve(6), cost.curve(12)) == (pytest.approx(0.016), pytest.approx(0.028))


def test_more_rows_are_never_cheaper() -> None:
    assert VerifyCost({1: 0.01, 4: 0.03, 8: 0.02}).curve(8) == 0.03


def test_one_point_is_a_flat_floor_that_grows_in_proportion() -> None:
    assert (VerifyCost({4: 0.01}).curve(1), VerifyCost({4: 0.01}).curve(8)) == (0.01, 0.02)


def test_windows_cost_what_was_measured() -> None:
    assert VerifyCost(POINTS, window_s=0.001).curve(8, windows=5) == pytest.approx(0.024)


def test_prompt_tokens_are_rows() -> None:
    assert VerifyCost(POINTS).seconds(1, prefill=7) == VerifyCost(POINTS).seconds(8)


@pytest.mark.parametrize("points", [{}, {0: 1.0}, {1: 0.0}])
def test_a_curve_needs_positive_points(points: dict[int, float]) -> None:
    with pytest.raises(ValueError, match="points"):
        VerifyCost(points)


def test_it_learns_that_everything_is_slower() -> None:
    cost = VerifyCost(POINTS)
    for rows in (1, 4, 8) * 40:
        cost.observe(rows, 1, 0, 1.5 * POINTS[rows])
    assert cost.seconds(4) == pytest.approx(1.5 * 0.012, rel=0.02)


def test_it_learns_that_drawing_a_row_costs() -> None:
    cost = VerifyCost(POINTS)
    for rows in (1, 4, 8) * 60:
        cost.observe(rows, 1, 0, POINTS[rows] + rows * 0.001)
    assert cost.seconds(8) - cost.seconds(1) == pytest.approx(0.010 + 0.007, rel=0.05)


def test_a_hiccup_moves_little() -> None:
    cost, noise = VerifyCost(POINTS), random.Random(1)
    for _ in range(100):
        cost.observe(4, 1, 0, 0.012 * noise.uniform(0.95, 1.05))
    cost.observe(4, 1, 0, 1.0)
    assert cost.seconds(4) == pytest.approx(0.012, rel=0.05)


def test_a_row_of_costs_is_what_each_of_them_is() -> None:
    cost = VerifyCost(POINTS, window_s=0.001)
    cost.observe(4, 1, 0, 0.02)
    assert cost.upwards(2, 9, 5) == [cost.seconds(drawn, 2, 5) for drawn in range(2, 12)]


def test_sequences_within_a_time_are_those_of_the_last_step_that_keeps_it() -> None:
    cost = VerifyCost({1: 0.01, 11: 0.02})
    assert cost.windows_within(0.0151, 64) == 6


def test_at_least_one_sequence_decodes_and_at_most_so_many() -> None:
    cost = VerifyCost({1: 0.01, 11: 0.02})
    assert (cost.windows_within(0.001, 64), cost.windows_within(1.0, 64)) == (1, 64)
