from __future__ import annotations

import pytest

from paceline.cli.scrape import Interval, Scrape
from paceline.errors import Unavailable


def counters(**values: float) -> str:
    return "".join(f'asked_total{{replica="{name}"}} {value}\n' for name, value in values.items())


def between(before: str, after: str, seconds: float = 2.0) -> Interval:
    return Interval(Scrape.read(before, 10.0), Scrape.read(after, 10.0 + seconds))


def test_a_rate_is_growth_by_time_over_all_replicas() -> None:
    assert between(counters(a=1, b=5), counters(a=2, b=8)).rate("asked_total") == 2.0


def test_a_rate_may_be_of_one_replica() -> None:
    assert between(counters(a=1, b=5), counters(a=2, b=8)).rate("asked_total", replica="a") == 0.5


def test_a_counter_that_began_anew_grew_by_what_it_has() -> None:
    assert between(counters(a=100), counters(a=3)).grown("asked_total") == 3


def test_of_a_replica_that_was_not_there_nothing_is_known() -> None:
    """It may have counted for a day and not have answered the look before."""
    assert between(counters(a=1), counters(a=2, b=1000)).grown("asked_total") == 1


def test_a_series_that_is_new_on_a_known_replica_began_in_between() -> None:
    late = 'late_total{replica="a"} 4\n'
    assert between(counters(a=1), counters(a=1) + late).grown("late_total") == 4


def test_a_replica_that_left_counts_no_more() -> None:
    assert between(counters(a=1, b=5), counters(a=2)).grown("asked_total") == 1


def test_before_the_second_look_no_rate_is_known() -> None:
    assert Interval(None, Scrape.read(counters(a=1), 1.0)).rate("asked_total") is None


def test_a_metric_that_nobody_has_is_not_known() -> None:
    assert between(counters(a=1), counters(a=2)).rate("told_total") is None


def test_a_ratio_over_nothing_is_not_known() -> None:
    assert between(counters(a=1), counters(a=1)).ratio("asked_total", "asked_total") is None


def buckets(fast: int, slow: int, beyond: int = 0, replica: str = "a") -> str:
    return (
        "# TYPE wait histogram\n"
        f'wait_bucket{{replica="{replica}",le="1.0"}} {fast}\n'
        f'wait_bucket{{replica="{replica}",le="3.0"}} {fast + slow}\n'
        f'wait_bucket{{replica="{replica}",le="+Inf"}} {fast + slow + beyond}\n'
        f'wait_count{{replica="{replica}"}} {fast + slow + beyond}\n'
        f'wait_sum{{replica="{replica}"}} {fast + 2 * slow}\n'
    )


def test_a_quantile_is_of_what_came_in_between() -> None:
    assert between(buckets(1000, 0), buckets(1000, 10)).quantile(0.5, "wait") == 2.0


def test_a_quantile_is_linear_within_its_bucket() -> None:
    assert between(buckets(0, 0), buckets(10, 10)).quantile(0.95, "wait") == pytest.approx(2.8)


def test_a_quantile_beyond_the_last_bound_is_the_last_bound() -> None:
    assert between(buckets(0, 0), buckets(1, 0, beyond=9)).quantile(0.5, "wait") == 3.0


def test_a_quantile_of_nothing_is_not_known() -> None:
    assert between(buckets(5, 5), buckets(5, 5)).quantile(0.5, "wait") is None


def test_a_mean_is_of_what_came_in_between() -> None:
    assert between(buckets(7, 0), buckets(7, 4)).mean("wait") == 2.0


def test_what_is_no_prometheus_text_is_refused() -> None:
    with pytest.raises(Unavailable, match="no Prometheus text"):
        Scrape.read("<html>{</html>", 0.0)
