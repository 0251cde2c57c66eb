"""Means, rates and quantiles of the last seconds, by a clock that is set by hand."""

from __future__ import annotations

import pytest

from paceline.engine.recent import LONGEST_PAUSE_S, Recent, RecentQuantiles, SteadyClock


class Hand:
    """A clock that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def hand() -> Hand:
    return Hand()


@pytest.fixture
def recent(hand: Hand) -> Recent:
    return Recent(SteadyClock(hand))


@pytest.fixture
def quantiles(hand: Hand) -> RecentQuantiles:
    return RecentQuantiles(SteadyClock(hand))


def test_a_level_counts_by_how_long_it_held(hand: Hand, recent: Recent) -> None:
    recent.levels(running=4)
    hand.now += 1.5
    recent.levels(running=0)
    hand.now += 4.5
    assert recent.mean("running") == pytest.approx(4 * 1.5 / 6.0)


def test_a_level_holds_while_nobody_looks(hand: Hand, recent: Recent) -> None:
    recent.levels(running=3)
    hand.now += 45.0
    assert recent.mean("running") == pytest.approx(3.0)


def test_a_level_that_was_never_told_is_not_known(hand: Hand, recent: Recent) -> None:
    hand.now += 3.0
    assert recent.mean("running") is None


def test_what_is_past_the_window_is_forgotten(hand: Hand, recent: Recent) -> None:
    recent.add(tokens=100)
    hand.now += 11.0
    assert recent.rate("tokens") == 0.0


def test_an_amount_is_a_rate_over_the_window(hand: Hand, recent: Recent) -> None:
    for _ in range(40):
        hand.now += 0.5
        recent.add(tokens=7)
    assert recent.rate("tokens") == pytest.approx(14.0, rel=0.08)


def test_at_first_the_rate_is_over_the_time_there_was(hand: Hand, recent: Recent) -> None:
    recent.add(tokens=30)
    hand.now += 3.0
    assert recent.rate("tokens") == pytest.approx(10.0)


def test_the_first_moment_is_no_infinite_rate(recent: Recent) -> None:
    recent.add(requests=1)
    assert recent.rate("requests") == 1.0


def test_of_a_counter_what_it_grew_by_counts(hand: Hand, recent: Recent) -> None:
    recent.counted(tokens=50)
    hand.now += 20.0
    recent.counted(tokens=50)
    hand.now += 1.0
    recent.counted(tokens=62)
    assert recent.sum("tokens") == 12


def test_a_counter_may_fall(hand: Hand, recent: Recent) -> None:
    recent.counted(saved=5.0)
    hand.now += 20.0
    recent.counted(saved=3.0)
    assert recent.sum("saved") == -2.0


def test_a_clock_that_goes_back_changes_nothing(hand: Hand, recent: Recent) -> None:
    recent.levels(running=2)
    recent.add(tokens=10)
    hand.now += 5.0
    before = recent.mean("running"), recent.rate("tokens")
    hand.now -= 500.0
    assert (recent.mean("running"), recent.rate("tokens")) == before


def test_a_clock_that_jumps_ahead_is_a_pause(hand: Hand) -> None:
    steady = SteadyClock(hand)
    hand.now += 1e9
    assert steady() == LONGEST_PAUSE_S


def test_time_goes_on_after_a_jump(hand: Hand, recent: Recent) -> None:
    hand.now -= 500.0
    recent.levels(running=2)
    hand.now += 4.0
    recent.levels(running=6)
    hand.now += 4.0
    assert recent.mean("running") == pytest.approx(4.0)


def test_a_quantile_is_within_its_resolution(quantiles: RecentQuantiles) -> None:
    for n in range(1, 101):
        quantiles.note(n / 100)
    assert quantiles.at(0.95) == pytest.approx(0.95, rel=0.03)


def test_a_quantile_of_nothing_is_not_known(quantiles: RecentQuantiles) -> None:
    assert quantiles.at(0.95) is None


def test_values_leave_a_quantile_after_half_a_minute(hand: Hand, quantiles: RecentQuantiles) -> None:
    quantiles.note(9.0)
    hand.now += 31.0
    quantiles.note(0.5)
    assert quantiles.at(1.0) == pytest.approx(0.5, rel=0.03)


def test_a_value_of_nothing_is_taken(quantiles: RecentQuantiles) -> None:
    quantiles.note(0.0)
    assert quantiles.at(0.5) is not None
