from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from paceline.autoscaling.load_policy import LoadPolicy
from paceline.autoscaling.policy import Policy
from paceline.autoscaling.simulate import looks
from paceline.autoscaling.simulate.cluster import Conditions, Simulation
from paceline.autoscaling.simulate.generators import Sessions, generate
from paceline.autoscaling.simulate.policies import Fixed
from paceline.autoscaling.simulate.profile import load
from paceline.autoscaling.simulate.record import Record
from paceline.autoscaling.simulate.report import Outcome, against, lower_edge, outcome
from paceline.autoscaling.snapshot import Decision, Decisions, Pool, Reason, Snapshot
from paceline.config_autoscaling import AutoscalingSettings, TargetScaling

GPU = load("llama-8b-h100").model_copy(update={"start_s": 30.0, "start_spread": 0.0})
PLAIN = GPU.model_copy(update={"drafts": None})
CONDITIONS = Conditions(PLAIN, 1.0, 0.1, initial=2, max_replicas=50)


class Scripted(Policy):
    """Decides what a function of the time says; keeps what it saw."""

    def __init__(self, targets: Callable[[float], int], drafts: int = 0) -> None:
        self._targets, self._drafts = targets, drafts
        self.seen: list[Snapshot] = []

    def decide(self, seen: Snapshot) -> Decisions:
        self.seen.append(seen)
        return Decisions(
            Decision(Pool.TARGET, seen.num_targets, self._targets(seen.now), Reason.SEATS, "as the script says"),
            Decision(Pool.DRAFT, seen.num_drafts, self._drafts, Reason.DEMAND, "as the script says"),
        )


def run(policy: Policy, rate: float = 10.0, hours: float = 0.1, tick: float = 1.0, **conditions: Any) -> Record:
    arrivals = generate("poisson", rate, hours, 1, tick)
    return Simulation(replace(CONDITIONS, **conditions), arrivals, policy).run()


def test_every_request_is_served() -> None:
    found = run(Scripted(lambda now: 1 + int(now / 30) % 4))
    assert found["completed"].sum() == pytest.approx(found["requests"].sum(), rel=1e-4)


def test_a_replica_serves_after_its_start() -> None:
    policy = Scripted(lambda now: 3 if now >= 100 else 2)
    run(policy)
    first = next(seen.now for seen in policy.seen if len(seen.targets) == 3)
    assert first == pytest.approx(100 + 30, abs=1.0)


def test_a_replica_that_starts_is_wanted_but_not_seen() -> None:
    policy = Scripted(lambda _: 3)
    run(policy)
    assert (policy.seen[1].num_targets, len(policy.seen[1].targets)) == (3, 2)


def test_a_replica_that_starts_is_paid_for() -> None:
    found = run(Scripted(lambda _: 3), hours=0.1)
    assert found["replica_s"].sum() == pytest.approx(3 * 360, rel=0.01)


def test_a_leaving_replica_takes_nothing_and_is_paid_for_until_it_is_done() -> None:
    found = run(Scripted(lambda now: 1 if now >= 100 else 2), rate=15.0)
    assert 100 * 2 + 260 < found["replica_s"].sum() < 100 * 2 + 260 + 30


def test_a_start_is_cancelled_before_a_replica_leaves() -> None:
    found = run(Scripted(lambda now: 4 if now < 10 else 2))
    assert found["leaving"].sum() == 0.0


def test_those_with_the_fewest_sessions_leave() -> None:
    arrivals = generate("poisson", 10.0, 0.05, 1, 1.0, Sessions(0.8, 0.5))
    simulation = Simulation(CONDITIONS, arrivals, Scripted(lambda now: 3 if now < 100 else 2))
    simulation.run()
    assert sorted(simulation.replicas.number) == [0, 1]


def test_an_overload_waits_in_front_and_is_served_by_those_that_start() -> None:
    found = run(Scripted(lambda now: 6 if now > 60 else 1), rate=30.0, initial=1)
    assert (found["refused"].max() > 0, found["completed"].sum()) == (
        True,
        pytest.approx(found["requests"].sum(), rel=1e-4),
    )


def test_the_policy_sees_the_load_it_caused() -> None:
    policy = Scripted(lambda _: 2)
    run(policy, rate=10.0)
    seen = policy.seen[-1].targets
    assert sum(load.requests_per_s or 0.0 for load in seen) == pytest.approx(10.0, rel=0.5)


def test_many_replicas_report_in_groups_of_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = []
    for few in (512, 8):
        monkeypatch.setattr(looks, "FEW", few)
        monkeypatch.setattr(looks, "GROUPS", 4)
        policy = Scripted(lambda _: 20)
        run(policy, rate=60.0, initial=20, hours=0.02)
        sums.append([len(policy.seen[-1].targets), sum(load.running or 0.0 for load in policy.seen[-1].targets)])
    assert sums[0] == pytest.approx(sums[1])


def test_drafters_that_are_busy_leave_steps_without_drafts() -> None:
    policy = Scripted(lambda _: 2, drafts=0)
    run(policy, profile=GPU)
    assert {load.draft_late for load in policy.seen[-1].targets} == {1.0}


def test_drafters_save_targets_seconds() -> None:
    policy = Scripted(lambda _: 2, drafts=2)
    run(policy, profile=GPU, initial_drafts=2)
    assert sum(load.draft_saved or 0.0 for load in policy.seen[-1].targets) > 0.1


def test_the_presets_follow_a_days_load() -> None:
    arrivals = generate("diurnal", 40.0, 24.0, 0, 30.0)
    settings = AutoscalingSettings(target=TargetScaling(max_replicas=50), interval_s=30.0)
    found = Simulation(replace(CONDITIONS, look_s=30.0), arrivals, LoadPolicy(settings)).run()
    running = found.over_time("running")[:-1]
    night, evening = running[int(len(running) * 3.5 / 24)], running[int(len(running) * 20 / 24)]
    assert night < evening / 1.8


def point(p95: float, cost: float) -> Outcome:
    record = run(Fixed(1), rate=0.1, hours=0.01)
    return replace(outcome("x", "ray:1", record, 0.25), ttft_p95_s=p95, cost=cost)


FRONTIER = [(1.0, 100.0), (4.0, 50.0), (2.0, 90.0)]


def test_a_frontier_is_read_on_the_line_between_its_points() -> None:
    found = against([point(*each) for each in FRONTIER], point(2.0, 60.0))
    assert found.cost_at_same_p95 == pytest.approx(np.sqrt(50 * 100))


def test_a_frontier_that_is_slower_has_no_cost() -> None:
    assert against([point(*each) for each in FRONTIER], point(0.5, 60.0)).cost_at_same_p95 is None


def test_a_frontier_that_is_faster_is_read_at_its_cheapest() -> None:
    assert against([point(*each) for each in FRONTIER], point(9.0, 40.0)).saved == pytest.approx(0.2)


def test_the_edge_leaves_out_what_is_worse_than_a_mixture() -> None:
    assert lower_edge([(0, 10), (1, 9), (2, 2), (3, 5)]) == [(0, 10), (2, 2)]


def test_goodput_counts_those_within_the_objective() -> None:
    quick = outcome("x", "y", run(Fixed(4), initial=4), 0.25).goodput
    slow = outcome("x", "y", run(Fixed(4), initial=4, ttft_s=0.002), 0.25).goodput
    assert (quick, slow) == (pytest.approx(1.0, abs=1e-6), 0.0)


def test_a_drafter_costs_its_price() -> None:
    found = outcome("x", "y", run(Scripted(lambda _: 2, drafts=2), profile=GPU, initial_drafts=2), 0.5)
    assert found.cost == pytest.approx(found.target_hours + 0.5 * found.draft_hours)
