"""What each signal of the targets asks for."""

from __future__ import annotations

import pytest

from paceline.autoscaling import targets
from paceline.autoscaling.goals import Goals
from paceline.autoscaling.loads import TargetPool
from paceline.autoscaling.snapshot import Reason
from tests.autoscaling.pools import settings

GOALS = Goals.of(settings(utilization=0.8, ttft_s=2.0, itl_s=0.1))


def test_seats_are_those_taken_and_those_waited_for():
    assert targets.seats(TargetPool(1, 1, running=16, waiting=8, seats=10), GOALS) == pytest.approx(2.4 / 0.8)


def test_the_time_that_prompts_take_is_not_there_for_seats():
    pool = TargetPool(1, 1, running=8, seats=10, prompt_tokens_per_s=400, prefill_tokens_per_s=1000)
    assert targets.seats(pool, GOALS) == pytest.approx((0.8 + 0.4) / 0.8)


def test_prompts_alone_fill_replicas():
    pool = TargetPool(1, 1, prompt_tokens_per_s=1600, prefill_tokens_per_s=1000)
    assert targets.seats(pool, GOALS) == pytest.approx(2.0)


def test_without_seats_or_prompts_nothing_is_known():
    assert targets.seats(TargetPool(1, 1, running=8), GOALS) is None


def test_kv_is_filled_no_further_than_the_rest():
    assert targets.kv(TargetPool(3, 3, kv_in_use=2.0), GOALS) == pytest.approx(2.5)


def test_a_queue_is_computed_by_the_time_new_replicas_come():
    pool = TargetPool(1, 1, queued_prefill_tokens=60_000, prefill_tokens_per_s=1000)
    assert targets.prefill(pool, GOALS, ahead=30.0) == pytest.approx(2.0)


def test_a_queue_is_computed_within_the_objective_if_replicas_start_faster():
    pool = TargetPool(1, 1, queued_prefill_tokens=4000, prefill_tokens_per_s=1000)
    assert targets.prefill(pool, GOALS, ahead=0.5) == pytest.approx(2.0)


def test_a_queue_comes_beside_the_prompts_that_keep_coming():
    pool = TargetPool(1, 1, queued_prefill_tokens=4000, prompt_tokens_per_s=500, prefill_tokens_per_s=1000)
    assert targets.prefill(pool, GOALS, ahead=2.0) == pytest.approx(2.5)


def test_a_late_first_token_asks_for_more_in_proportion():
    assert targets.ttft(TargetPool(4, 4, waiting=3, ttft_p95_s=2.4), GOALS) == pytest.approx(4.8)


def test_a_very_late_first_token_asks_for_no_more_than_half_as_many_again():
    assert targets.ttft(TargetPool(4, 4, waiting=3, ttft_p95_s=200), GOALS) == pytest.approx(6.0)


def test_a_late_first_token_asks_of_those_that_run_not_of_those_that_start():
    assert targets.ttft(TargetPool(40, 4, waiting=3, ttft_p95_s=200), GOALS) == pytest.approx(6.0)


def test_a_late_first_token_asks_for_nothing_once_nobody_waits():
    assert targets.ttft(TargetPool(4, 4, waiting=0, ttft_p95_s=200), GOALS) == 0


def test_a_first_token_in_time_asks_for_nothing():
    assert targets.ttft(TargetPool(4, 4, waiting=3, ttft_p95_s=1.9), GOALS) == 0


@pytest.mark.parametrize(("prompt_tokens_per_s", "asked"), [(3900.0, 6.0), (4000.0, 0.0)])
def test_a_first_token_later_than_the_prompt_alone_takes_is_not_for_replicas_to_mend(
    prompt_tokens_per_s: float, asked: float
) -> None:
    """Prompts of 1950 or 2000 tokens at 1000 a second, with 2 s wanted."""
    pool = TargetPool(
        4,
        4,
        waiting=3,
        ttft_p95_s=200,
        prefill_tokens_per_s=1000.0,
        requests_per_s=2.0,
        prompt_tokens_per_s=prompt_tokens_per_s,
    )
    assert targets.ttft(pool, GOALS) == pytest.approx(asked)


def test_slow_tokens_ask_for_more_when_replicas_are_full():
    assert targets.itl(TargetPool(2, 2, running=16, seats=10, itl_p95_s=0.12), GOALS) == pytest.approx(2.4)


def test_slow_tokens_of_few_sequences_are_not_for_more_replicas_to_mend():
    assert targets.itl(TargetPool(2, 2, running=2, seats=10, itl_p95_s=0.12), GOALS) == 0


def test_growth_is_ordered_ahead():
    pool = TargetPool(1, 1, running=8, seats=10, prompt_tokens_per_s=400, prefill_tokens_per_s=1000)
    assert targets.forecast(pool, GOALS, (1.5, 1.25)) == pytest.approx((0.8 * 1.5 + 0.4 * 1.25) / 0.8)


def test_kv_grows_with_the_requests():
    assert targets.forecast(TargetPool(1, 1, kv_in_use=0.8), GOALS, (1.5, 1.0)) == pytest.approx(1.5)


def test_a_steady_load_is_the_seats_reason_not_the_forecasts():
    asked = targets.wanted(TargetPool(1, 1, running=8, seats=10), GOALS, 60.0)
    assert targets.strongest(asked) == (Reason.SEATS, pytest.approx(1.0))


def test_what_waits_does_not_last():
    pool = TargetPool(1, 1, running=8, waiting=30, seats=10)
    assert targets.lasting(pool, GOALS) == targets.seats(TargetPool(1, 1, running=8, seats=10), GOALS)


def test_replicas_that_start_bring_no_load_of_their_own():
    assert targets.filled_up(3.0, TargetPool(2, 1)) == 3.0


def test_replicas_that_are_silent_are_not_taken_for_idle():
    assert targets.filled_up(3.0, TargetPool(10, 2)) == 10.0


def test_replicas_that_are_silent_are_as_idle_as_those_that_speak():
    assert targets.filled_up(0.5, TargetPool(10, 5)) == 1.0


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_words_even_if_nothing_is_known(reason: Reason):
    assert "replica" in targets.told(reason, TargetPool(1, 1), GOALS, 60.0)


def test_seats_are_told_with_their_numbers():
    pool = TargetPool(2, 2, running=11.3, waiting=0, seats=8)
    assert targets.told(Reason.SEATS, pool, GOALS, 60.0) == "11.3 of 16 seats in use on 2 replicas, 0.8 wanted"
