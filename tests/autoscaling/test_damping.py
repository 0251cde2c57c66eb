"""How the number of replicas follows what is wanted."""

from __future__ import annotations

from dataclasses import replace
from math import inf, nan

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.autoscaling.damping import Damping, Peak, Stopwatch, with_room
from paceline.autoscaling.goals import Goals
from tests.autoscaling.pools import settings

QUICK = Goals.of(settings(1, 1000, upscale_delay_s=0, downscale_delay_s=60)).target


def follow(damping: Damping, wants: list[float], before: int, every: float = 1.0) -> list[int]:
    counts = []
    for want in wants:
        before = damping.settle(every, before, want).replicas
        counts.append(before)
    return counts


def test_more_come_at_once_without_a_delay():
    assert follow(Damping(QUICK), [2.5], 1) == [3]


def test_a_want_without_bound_is_a_step_like_another():
    assert Damping(QUICK).settle(1.0, 4, inf, inf).replicas == 8


def test_more_come_when_they_were_wanted_throughout_the_delay():
    damping = Damping(replace(QUICK, upscale_delay_s=3))
    assert follow(damping, [3, 3, 3, 3, 3], 1) == [1, 1, 1, 3, 3]


def test_a_moment_without_need_begins_the_delay_anew():
    damping = Damping(replace(QUICK, upscale_delay_s=3))
    assert follow(damping, [3, 3, 3, 1, 3, 3, 3, 3], 1) == [1, 1, 1, 1, 1, 1, 1, 3]


def test_fewer_come_when_they_were_enough_throughout_the_delay():
    assert follow(Damping(QUICK), [1.0] * 62, 2)[58:] == [2, 2, 1, 1]


def test_a_wave_within_the_delay_keeps_its_replicas():
    wave = ([1.0] * 40 + [1.9]) * 5
    assert set(follow(Damping(QUICK), wave, 2)) == {2}


def remembered(seen: list[tuple[float, float]]) -> float:
    """The most that is held against going down, after (want, lasting) each second."""
    damping = Damping(QUICK)
    return [damping.settle(1.0, 10, want, lasts).most for want, lasts in seen][-1]


def test_a_queue_is_not_held_against_going_down():
    assert remembered([(2.0, 2.0)] * 120 + [(9.0, 2.0)] * 20 + [(2.0, 2.0)]) == pytest.approx(2.2)


def test_a_load_of_seconds_is_held_for_its_share_of_a_minute():
    assert 2.2 < remembered([(2.0, 2.0)] * 120 + [(9.0, 9.0)] * 5 + [(2.0, 2.0)]) < 3.0


def test_a_load_that_lasted_is_held():
    assert remembered([(9.0, 9.0)] * 200 + [(2.0, 2.0)] * 30) >= 9.0


def test_nobody_goes_while_they_are_wanted_for_a_queue():
    assert remembered([(2.0, 2.0)] * 120 + [(9.0, 2.0)]) == 9.0


def test_a_little_more_than_fits_is_no_reason():
    assert follow(Damping(QUICK), [10.4] * 10, 10) == [10] * 10


def test_a_little_less_than_would_fit_on_fewer_is_no_reason():
    assert set(follow(Damping(QUICK), [8.9] * 200, 10)) == {10}


def test_a_step_up_doubles():
    assert follow(Damping(QUICK), [1000.0], 100) == [200]


def test_a_step_up_is_always_four():
    assert follow(Damping(QUICK), [1000.0], 1) == [5]


def test_looks_close_together_share_a_step():
    assert follow(Damping(QUICK), [1000.0] * 12, 100) == [200] * 11 + [400]


def test_a_step_down_is_a_share():
    assert follow(Damping(QUICK), [10.0] * 61, 100)[-1] == 75


def test_a_step_down_is_always_one():
    assert follow(Damping(QUICK), [1.0] * 61, 2)[-1] == 1


def test_there_are_never_more_than_the_settings_allow():
    settled = Damping(replace(QUICK, max_replicas=3)).settle(1.0, 2, 50.0)
    assert (settled.replicas, settled.bounded) == (3, True)


def test_a_pool_outside_its_bounds_comes_back_at_once():
    assert Damping(replace(QUICK, min_replicas=5)).settle(1.0, 2, 0.0).replicas == 5


@pytest.mark.parametrize("now", [1e9, -1e9, nan, 0.0])
def test_a_jump_of_the_clock_counts_as_one_look(now: float):
    watch = Stopwatch(interval_s=2.0)
    watch.passed(100.0)
    assert watch.passed(now) == 2.0


def test_a_clock_that_runs_is_believed():
    watch = Stopwatch(interval_s=1.0)
    watch.passed(100.0)
    assert watch.passed(103.5) == 3.5


def test_the_first_look_has_no_time_before_it():
    assert Stopwatch(1.0).passed(12345.0) == 0.0


@given(st.lists(st.tuples(st.integers(0, 20), st.integers(-50, 50)), min_size=1), st.integers(0, 60))
def test_a_peak_is_the_largest_of_its_seconds(steps: list[tuple[int, int]], seconds: int):
    peak, now, values = Peak(seconds), 0, []
    for passed, value in steps:
        now += passed
        values.append((now, value))
        largest = peak.add(now, value)
    assert largest == max(value for moment, value in values if moment >= now - seconds)


@given(st.floats(0, 1e6))
def test_what_is_left_has_room_for_what_was_wanted(want: float):
    assert want <= with_room(want) <= want + 1.3
