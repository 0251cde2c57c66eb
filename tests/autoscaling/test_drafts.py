"""How many drafters are asked for, whether they pay, and when they are tried again."""

from __future__ import annotations

from itertools import pairwise

import pytest

from paceline.autoscaling import drafts
from paceline.autoscaling.goals import Goals
from paceline.autoscaling.load_policy import LoadPolicy
from paceline.autoscaling.loads import DraftPool
from paceline.autoscaling.snapshot import Pool, Reason, Snapshot
from paceline.autoscaling.worth import LONGEST_RETRY_S, Retry
from tests.autoscaling.pools import Load, Pools, drafters, sequences, settings, targets

GOALS = Goals.of(settings(utilization=0.8, min_gain=0.25))


def pools(*, num_drafts: int = 0, fewest: int = 0, most: int = 10, delay: float = 60.0) -> Pools:
    chosen = settings(1, 4, (fewest, most), upscale_delay_s=0, downscale_delay_s=delay)
    return Pools(LoadPolicy(chosen), num_drafts=num_drafts)


def changes(run: Pools) -> list[tuple[int, int, Reason]]:
    return [(each.draft.before, each.draft.replicas, each.draft.reason) for each in run.made if each.draft.changes]


def test_demand_is_what_drafters_compute():
    assert drafts.demand(DraftPool(2, 2, busy=1.6, wanted=9), GOALS) == pytest.approx(2.0)


def test_demand_is_one_as_long_as_anybody_wants_drafts():
    assert drafts.demand(DraftPool(2, 2, busy=0.1, wanted=1), GOALS) == 1.0


def test_no_sequence_no_demand():
    assert drafts.demand(DraftPool(2, 2, busy=0.1, wanted=0), GOALS) == 0.0


def test_late_drafts_ask_for_one_more():
    assert drafts.late(DraftPool(2, 2, wanted=9, late=0.2), GOALS) == 3.0


def test_late_drafts_ask_for_nothing_while_a_drafter_starts():
    assert drafts.late(DraftPool(3, 2, wanted=9, late=0.2), GOALS) is None


def test_a_few_late_drafts_ask_for_nothing():
    assert drafts.late(DraftPool(2, 2, wanted=9, late=0.1), GOALS) == 0.0


def test_the_first_sequence_that_wants_drafts_gets_a_drafter():
    run = pools()
    run.look(sequences(4, wanted=4))
    assert changes(run) == [(0, 1, Reason.RETRY)]


def test_without_a_sequence_that_wants_drafts_there_is_no_drafter():
    run = pools()
    run.run(100, sequences(4, wanted=0))
    assert changes(run) == []


def test_a_drafter_that_does_not_pay_goes():
    run = pools()
    run.run(100, sequences(4, wanted=4, saved=0.2, computed=0.9))
    assert changes(run) == [(0, 1, Reason.RETRY), (1, 0, Reason.GAIN)]


def test_a_drafter_that_pays_stays():
    run = pools()
    run.run(700, sequences(4, wanted=4, saved=0.3, computed=0.5))
    assert changes(run) == [(0, 1, Reason.RETRY)]


def test_a_drafter_that_pays_and_is_busy_gets_company():
    run = pools()
    run.run(300, sequences(12, wanted=12, saved=1.0, computed=1.5))
    assert run.num_drafts == 2


def test_a_drafter_that_does_not_pay_gets_no_company():
    run = pools(num_drafts=1, fewest=1)
    run.run(300, sequences(12, wanted=12, saved=0.1, computed=5))
    assert changes(run) == []


def test_drafters_that_do_not_pay_go_to_the_settings_fewest():
    run = pools(num_drafts=6, fewest=2)
    run.run(1200, sequences(12, wanted=12, saved=0.1, computed=5))
    assert run.num_drafts == 2


def test_they_go_one_by_one_as_long_as_the_rest_may_pay():
    run = pools(num_drafts=4)
    run.run(400, sequences(12, wanted=12, saved=0.8, computed=4))
    assert changes(run)[0] == (4, 3, Reason.GAIN)


def test_the_crossover_is_at_the_least_gain():
    def drafters_at(saved: float) -> int:
        run = pools(most=1)
        run.run(600, sequences(4, wanted=4, saved=saved, computed=0.8))
        return run.num_drafts

    assert [drafters_at(saved) for saved in (0.24, 0.26)] == [0, 1]


def test_a_try_in_vain_is_repeated_twice_as_late_each_time():
    run = pools()
    run.run(6000, sequences(4, wanted=4, saved=0.1))
    tried = [each for each, made in enumerate(run.made) if made.draft.reason is Reason.RETRY]
    gaps = [later - sooner for sooner, later in pairwise(tried)]
    assert gaps == [pytest.approx(wait + 41, abs=2) for wait in (600, 1200, 2400)]


def test_a_try_that_pays_forgets_those_in_vain():
    run = pools()
    run.run(2500, sequences(4, wanted=4, saved=0.1))  # two tries in vain, and a third has begun to wait
    run.run(2500, sequences(4, wanted=4, saved=0.5))
    assert run.num_drafts == 1
    run.run(100, sequences(4, wanted=4, saved=0.1))
    gone = run.now
    while run.num_drafts == 0:
        run.look(sequences(4, wanted=4, saved=0.1))
    assert run.now - gone < 605


def test_the_wait_ends_at_a_day():
    retry = Retry(600.0)
    for _ in range(2000):
        retry.in_vain(0, 1.0)
    assert retry.seconds == LONGEST_RETRY_S


def test_idle_drafters_go_and_come_back_at_once():
    run = pools()
    run.run(100, sequences(4, wanted=4, saved=0.5))
    run.run(100, sequences(0))
    run.look(sequences(4, wanted=4))
    assert changes(run) == [(0, 1, Reason.RETRY), (1, 0, Reason.IDLE), (0, 1, Reason.RETRY)]


def test_idle_time_says_nothing_of_what_drafters_are_worth():
    run = pools(num_drafts=1, fewest=1)
    run.run(100, sequences(4, wanted=4, saved=0.5))
    run.run(1000, sequences(0))
    assert Reason.GAIN not in {each.draft.reason for each in run.made}


def test_a_drafter_that_still_starts_is_not_judged():
    run = pools()

    def load(_: Pools) -> tuple[tuple, tuple]:
        return targets(1, draft_saved=0.0), ()

    run.run(2000, load)
    assert changes(run) == [(0, 1, Reason.RETRY)]


def test_where_nobody_knows_the_gain_drafters_follow_demand():
    run = pools(num_drafts=1)

    def load(pools: Pools) -> tuple[tuple, tuple]:
        return targets(1, draft_saved=None), drafters(pools.num_drafts, busy=min(1.0, 2.0 / pools.num_drafts))

    run.run(200, load)
    assert run.num_drafts == 3


def shared(saved: dict[int, float], *, late: float = 0.5) -> Load:
    """What so many drafters save together; drafts are late whatever their number."""

    def load(pools: Pools) -> tuple[tuple, tuple]:
        return targets(1, draft_saved=saved[pools.num_drafts], draft_late=late), drafters(pools.num_drafts, busy=0.1)

    return load


def test_late_drafts_bring_drafters_as_long_as_each_one_pays():
    run = pools(num_drafts=1)
    run.run(550, shared({1: 0.6, 2: 1.2, 3: 1.3, 4: 1.3}))
    assert [change[:2] for change in changes(run)] == [(1, 2), (2, 3)]


def test_the_drafter_too_many_goes_when_they_no_longer_pay_together():
    run = pools(num_drafts=1)
    run.run(300, shared({1: 0.4, 2: 0.41}))
    assert changes(run) == [(1, 2, Reason.LATE), (2, 1, Reason.GAIN)]


def test_a_drafter_that_keeps_drafts_in_time_stays():
    run = pools(num_drafts=1)

    def load(pools: Pools) -> tuple[tuple, tuple]:
        late = 0.5 if pools.num_drafts == 1 else 0.0
        return targets(1, draft_saved=0.5 * pools.num_drafts, draft_late=late), drafters(pools.num_drafts, busy=0.2)

    run.run(1000, load)
    assert changes(run) == [(1, 2, Reason.LATE)]


def test_without_a_pool_of_drafters_nothing_is_said_of_it():
    made = LoadPolicy(settings()).decide(Snapshot(0, 1, 0, targets(1), has_drafts=False))
    assert made.draft.replicas == 0
    assert not [pool for pool, _ in made.signals if pool is Pool.DRAFT]


def test_a_drafter_that_goes_is_told_with_its_numbers():
    run = pools()
    run.run(100, sequences(4, wanted=4, saved=0.2))
    texts = [each.draft.text for each in run.made if each.draft.reason is Reason.GAIN]
    assert texts[0] == "a second of a drafter saves 0.2 s of targets, 0.25 s would pay: 0"
