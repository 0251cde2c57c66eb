"""The load of a pool as one."""

from __future__ import annotations

from math import inf, nan

import pytest

from paceline.autoscaling.loads import LARGEST, draft_pool, target_pool
from paceline.autoscaling.snapshot import Snapshot
from tests.autoscaling.pools import drafters, targets


def test_what_replicas_do_adds_up():
    assert target_pool(Snapshot(0, 3, 0, targets(3, running=5))).running == 15


def test_what_a_replica_is_able_to_is_a_mean():
    assert target_pool(Snapshot(0, 2, 0, targets(1, seats=10) + targets(1, seats=20))).seats == 15


def test_those_that_say_it_speak_for_those_that_leave_it_out():
    pool = target_pool(Snapshot(0, 3, 0, targets(2, running=6) + targets(1, running=None)))
    assert pool.running == pytest.approx(18)


@pytest.mark.parametrize("nothing", [None, nan, -1.0, inf])
def test_what_is_no_number_of_sequences_is_not_known(nothing: float | None):
    assert target_pool(Snapshot(0, 1, 0, targets(1, running=nothing))).running is None


def test_a_number_out_of_all_proportion_stays_finite():
    assert target_pool(Snapshot(0, 2, 0, targets(2, running=1e300))).running == 2 * LARGEST


def test_a_cache_is_never_more_than_full():
    assert target_pool(Snapshot(0, 1, 0, targets(1, kv_in_use=7.0))).kv_in_use == 1


def test_one_slow_replica_is_not_the_pools_pace():
    seen = Snapshot(0, 3, 0, targets(2, ttft_p95_s=0.5) + targets(1, ttft_p95_s=60))
    assert target_pool(seen).ttft_p95_s == 0.5


def test_gain_is_what_is_saved_by_a_drafter():
    seen = Snapshot(0, 2, 4, targets(2, draft_saved=0.6), drafters(4))
    assert draft_pool(seen).gain == pytest.approx(0.3)


def test_drafts_may_cost_more_than_they_save():
    assert draft_pool(Snapshot(0, 1, 1, targets(1, draft_saved=-0.5), drafters(1))).gain == -0.5


def test_gain_is_unknown_while_no_drafter_runs():
    assert draft_pool(Snapshot(0, 1, 1, targets(1), ())).gain is None


def test_late_steps_count_by_the_sequences_that_wanted_drafts():
    seen = Snapshot(0, 2, 1, targets(1, draft_late=0.4, drafts_wanted=1) + targets(1, draft_late=0.0, drafts_wanted=3))
    assert draft_pool(seen).late == pytest.approx(0.1)
