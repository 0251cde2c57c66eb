"""Load that is expected by the time a replica has started."""

from __future__ import annotations

import random

import pytest

from paceline.autoscaling.forecast import MOST_GROWTH, START_S, Forecast
from paceline.autoscaling.goals import Goals
from paceline.autoscaling.loads import TargetPool
from tests.autoscaling.pools import settings


def forecast(**others: object) -> Forecast:
    return Forecast(Goals.of(settings(**others)))


def follow(watched: Forecast, rates: list[float], every: float = 1.0) -> tuple[float, float]:
    for rate in rates:
        grown = watched.note(every, TargetPool(1, 1, requests_per_s=rate, prompt_tokens_per_s=100 * rate))
    return grown


def test_a_steady_load_does_not_grow():
    assert follow(forecast(), [50.0] * 600) == (1.0, 1.0)


def test_a_load_that_rises_is_seen_a_start_ahead():
    rates = [100.0 + second for second in range(900)]
    assert follow(forecast(start_s=120.0), rates)[0] == pytest.approx((999 + 120) / 999, rel=0.02)


def test_a_load_that_falls_does_not_grow():
    assert follow(forecast(), [1000.0 - second for second in range(900)]) == (1.0, 1.0)


def test_chance_is_no_trend():
    dice = random.Random(5)
    watched = forecast()
    follow(watched, [2.0] * 100)
    grown = [follow(watched, [dice.gauss(2.0, 0.4)])[0] for _ in range(1000)]
    assert max(grown) < 1.05


def test_a_trend_is_followed_only_so_far():
    assert follow(forecast(start_s=3000.0), [float(second) for second in range(600)])[0] == MOST_GROWTH


def test_without_arrivals_known_nothing_grows():
    assert forecast().note(1.0, TargetPool(1, 1)) == (1.0, 1.0)


def test_from_nothing_to_something_is_bounded():
    assert follow(forecast(), [0.0] * 100 + [10.0])[0] <= MOST_GROWTH


def test_prompts_may_grow_alone():
    watched = forecast(start_s=120.0)
    for second in range(600):
        grown = watched.note(1.0, TargetPool(1, 1, requests_per_s=100.0, prompt_tokens_per_s=1e4 + 100 * second))
    assert grown[0] == 1.0 < grown[1]


def test_a_start_takes_what_was_measured():
    watched = forecast()
    watched.note(1.0, TargetPool(1, 1, start_s=17.0))
    watched.note(1.0, TargetPool(1, 1))
    assert watched.ahead == 17.0


def test_a_start_takes_what_the_settings_say():
    watched = forecast(start_s=5.0)
    watched.note(1.0, TargetPool(1, 1, start_s=17.0))
    assert watched.ahead == 5.0


def test_before_any_measurement_a_start_takes_a_minute():
    assert forecast().ahead == START_S
