"""The policy in Serve's controller, over Serve's own contexts; no cluster."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID, TimeStampedValue
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from paceline.autoscaling.policy import Policy
from paceline.autoscaling.snapshot import Decision, Decisions, Pool, Reason, Snapshot
from paceline.config import AutoscalingSettings
from paceline.serving.capacity import Capacity
from paceline.serving.journal import Journal, read_journal
from paceline.serving.scaling import STALE_S, WAITING_S, Scaling

ARGS = {"autoscaling": {"enabled": True, "preset": "cost"}, "target": {"num_cpus": 4}}
TARGET, DRAFT = DeploymentID(name="Target", app_name="app"), DeploymentID(name="Draft", app_name="app")
HELD = "paceline.serving.autoscaling:Held"


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


class Scripted(Policy):
    """Wants what it is told, and keeps what it saw."""

    def __init__(self, target: int = 2, draft: int = 1) -> None:
        self.target, self.draft = target, draft
        self.seen: list[Snapshot] = []
        self.failure: Exception | None = None

    def decide(self, seen: Snapshot) -> Decisions:
        self.seen.append(seen)
        if self.failure is not None:
            raise self.failure
        return Decisions(
            Decision(Pool.TARGET, seen.num_targets, self.target, Reason.SEATS, "11 of 4 seats"),
            Decision(Pool.DRAFT, seen.num_drafts, self.draft, Reason.DEMAND, "busy"),
            {(Pool.TARGET, Reason.SEATS): 2.75},
        )


class Store:
    """A key-value store in a dict, which may be out of order."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.failure: Exception | None = None
        self.puts = 0

    def get(self, key: str) -> bytes | None:
        return self.values.get(key)

    def put(self, key: str, value: bytes) -> None:
        if self.failure is not None:
            raise self.failure
        self.puts += 1
        self.values[key] = value


def context(
    of: DeploymentID, wanted: int, reports: Mapping[str, Mapping[str, float]] | None = None, *, at: float = 1.0
) -> AutoscalingContext:
    """Serve's, of a deployment whose replicas `reports` named at the time `at`."""
    reports = reports or {}
    ids = {name: ReplicaID(name, of) for name in reports}
    raw: dict[str, dict[ReplicaID, list[TimeStampedValue]]] = {}
    for name, numbers in reports.items():
        for key, value in numbers.items():
            raw.setdefault(key, {})[ids[name]] = [TimeStampedValue(at - 1, -1.0), TimeStampedValue(at, value)]
    return AutoscalingContext(
        deployment_id=of,
        deployment_name=of.name,
        app_name=of.app_name,
        current_num_replicas=len(reports),
        target_num_replicas=wanted,
        running_replicas=list(ids.values()),
        total_num_requests=0.0,
        total_queued_requests=0.0,
        aggregated_metrics={},
        raw_metrics=raw,
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
        policy_state={},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=0.0,
        config=AutoscalingConfig(policy={"policy_function": HELD, "policy_kwargs": ARGS}),
    )


class Rig:
    """Scaling with a policy, a store, a clock and a cluster of one node that a test can turn."""

    def __init__(self) -> None:
        self.clock, self.policy, self.store = Clock(), Scripted(), Store()
        self.settings: list[AutoscalingSettings] = []
        self.sessions: dict[str, float] = {}
        self.pending: tuple[dict[str, float], ...] = ()
        self.scaling = Scaling(
            self._make,
            lambda app: Journal(app, self.store, self.clock),
            on_sessions=self.sessions.update,
            clock=self.clock,
            capacity=lambda: Capacity(({"CPU": 8.0},), self.pending),
        )

    def _make(self, settings: AutoscalingSettings) -> Policy:
        self.settings.append(settings)
        return self.policy

    def look(self, target: AutoscalingContext, draft: AutoscalingContext | None = None) -> dict[Any, int]:
        """Some seconds later."""
        self.clock.now += 2.0
        return self.scaling.decide({TARGET: target} | ({} if draft is None else {DRAFT: draft}))

    @property
    def journal(self) -> dict[str, Any]:
        return read_journal("app", self.store)


@pytest.fixture
def rig() -> Rig:
    return Rig()


def test_the_policy_says_how_many_replicas_each_pool_has(rig: Rig) -> None:
    assert rig.look(context(TARGET, 1), context(DRAFT, 0)) == {TARGET: 2, DRAFT: 1}


def test_a_pool_that_is_not_deployed_is_not_scaled(rig: Rig) -> None:
    assert rig.look(context(TARGET, 1)) == {TARGET: 2}


def test_other_deployments_are_left_alone(rig: Rig) -> None:
    router = DeploymentID(name="Router", app_name="app")
    rig.clock.now += 2
    assert rig.scaling.decide({router: context(router, 1), TARGET: context(TARGET, 1)}) == {TARGET: 2}


def test_the_policy_has_the_settings_of_the_deployment_resolved(rig: Rig) -> None:
    rig.look(context(TARGET, 1))
    (settings,) = rig.settings
    assert (settings.preset, settings.ttft_s, settings.itl_s) == ("cost", 8.0, 0.8)  # four times 0.2 on a CPU


def test_it_is_asked_once_an_interval_and_its_answer_holds_in_between(rig: Rig) -> None:
    rig.look(context(TARGET, 1))
    rig.policy.target = 3
    assert rig.scaling.decide({TARGET: context(TARGET, 1)}) == {TARGET: 2}
    assert len(rig.policy.seen) == 1
    assert rig.look(context(TARGET, 1)) == {TARGET: 3}


def test_it_sees_what_each_replica_reported_last(rig: Rig) -> None:
    rig.look(context(TARGET, 2, {"a": {"running": 3.0, "sessions": 5.0}}), context(DRAFT, 1, {"d": {"busy": 0.5}}))
    (seen,) = rig.policy.seen
    assert [(each.replica, each.running, each.kv_in_use) for each in seen.targets] == [("a", 3.0, None)]
    assert [(each.replica, each.busy) for each in seen.drafts] == [("d", 0.5)]
    assert (seen.num_targets, seen.num_drafts) == (2, 1)


def test_a_number_that_the_last_report_lacks_is_not_known(rig: Rig) -> None:
    told = context(TARGET, 1, {"a": {"running": 3.0, "ttft_p95_s": 2.0}})
    (replica,) = told.raw_metrics["ttft_p95_s"]
    told.raw_metrics["ttft_p95_s"][replica].pop()
    rig.look(told)
    assert rig.policy.seen[0].targets[0].ttft_p95_s is None


def test_a_replica_that_says_nothing_new_for_long_is_not_known(rig: Rig) -> None:
    told = context(TARGET, 1, {"a": {"running": 3.0}})
    rig.look(told)
    rig.clock.now += STALE_S
    rig.look(told)
    assert [len(seen.targets) for seen in rig.policy.seen] == [1, 0]


def test_the_clocks_of_replicas_may_jump(rig: Rig) -> None:
    for at in (5.0, 5e9, 2.0):
        rig.look(context(TARGET, 1, {"a": {"running": 3.0}}, at=at))
    assert [len(seen.targets) for seen in rig.policy.seen] == [1, 1, 1]


def test_sessions_of_each_replica_are_known_to_who_picks_victims(rig: Rig) -> None:
    rig.look(context(TARGET, 1, {"a": {"sessions": 5.0}, "b": {"running": 1.0}}))
    assert rig.sessions == {"a": 5.0}


def test_a_policy_that_raises_leaves_the_pools_as_they_are(rig: Rig) -> None:
    rig.policy.failure = ZeroDivisionError("of nothing")
    assert rig.look(context(TARGET, 3), context(DRAFT, 1)) == {TARGET: 3, DRAFT: 1}
    assert (rig.journal["errors"], rig.journal["error"]) == (1, "ZeroDivisionError: of nothing")


def test_it_goes_on_when_the_policy_does(rig: Rig) -> None:
    rig.policy.failure = ZeroDivisionError("of nothing")
    rig.look(context(TARGET, 3))
    rig.policy.failure = None
    assert rig.look(context(TARGET, 3)) == {TARGET: 2}


def test_metrics_that_cannot_be_read_leave_the_pools_as_they_are(rig: Rig) -> None:
    broken = context(TARGET, 3)
    broken._raw_metrics_value = lambda: 1 / 0
    assert rig.look(broken) == {TARGET: 3}


def test_settings_that_cannot_be_read_leave_the_pools_as_they_are(rig: Rig) -> None:
    wrong = context(TARGET, 3)
    wrong.config.policy.policy_kwargs["autoscaling"] = {"presets": "none"}
    assert rig.look(wrong) == {TARGET: 3}


def test_a_store_that_fails_stops_nothing(rig: Rig) -> None:
    rig.store.failure = OSError("gone")
    assert rig.look(context(TARGET, 1)) == {TARGET: 2}


def test_a_change_is_a_log_line_with_its_reason(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "ray.serve"):
        rig.look(context(TARGET, 1), context(DRAFT, 1))
    assert [record.message for record in caplog.records] == ["autoscaling: target 1 -> 2, seats: 11 of 4 seats"]


def test_a_change_that_takes_a_moment_is_one_change(rig: Rig) -> None:
    for _ in range(3):
        rig.look(context(TARGET, 1), context(DRAFT, 1))
    assert rig.journal["counts"] == {"target/up/seats": 1}


def test_the_policy_knows_whether_there_are_drafters_at_all(rig: Rig) -> None:
    rig.look(context(TARGET, 1))
    assert not rig.policy.seen[-1].has_drafts


def test_a_pool_that_is_not_deployed_is_not_told_of(rig: Rig) -> None:
    rig.look(context(TARGET, 1))
    assert "draft" not in rig.journal


def test_a_change_is_counted_by_its_reason(rig: Rig) -> None:
    rig.look(context(TARGET, 1), context(DRAFT, 2))
    assert rig.journal["counts"] == {"target/up/seats": 1, "draft/down/demand": 1}
    assert [(each["pool"], each["before"], each["replicas"]) for each in rig.journal["decisions"]] == [
        ("target", 1, 2),
        ("draft", 2, 1),
    ]


def test_what_each_signal_asks_for_is_told(rig: Rig) -> None:
    rig.look(context(TARGET, 1))
    assert rig.journal["target"]["signals"] == {"seats": 2.75}
    assert rig.journal["target"]["wanted"] == 2


def test_what_does_not_change_is_not_written_with_every_look(rig: Rig) -> None:
    for _ in range(4):
        rig.look(context(TARGET, 2), context(DRAFT, 1))
    assert rig.store.puts == 2  # at once, and after five seconds


def test_a_controller_that_was_replaced_goes_on_counting(rig: Rig) -> None:
    rig.look(context(TARGET, 1))
    other = Rig()
    other.store = rig.store
    other.look(context(TARGET, 1))
    assert other.journal["counts"] == {"target/up/seats": 2}


def test_a_journal_that_is_no_json_is_empty() -> None:
    store = Store()
    store.values["autoscaling/app"] = b"{"
    assert read_journal("app", store) == {}


def test_a_replica_that_no_node_can_hold_is_told_with_the_remedy(rig: Rig) -> None:
    rig.pending = ({"CPU": 16.0},)
    wide = json.loads(json.dumps(ARGS)) | {"target": {"num_cpus": 16}}
    for _ in range(int(WAITING_S)):
        told = context(TARGET, 2, {"a": {"running": 1.0}})
        told.config.policy.policy_kwargs.update(wide)
        rig.look(told)
    (text,) = rig.journal["waiting"]
    assert text == (
        "1 of 2 target replicas run, and one more needs 16 CPUs: no node of the cluster has that; lower "
        "target.num_cpus or add such nodes"
    )


def test_a_replica_that_finds_every_node_full_is_told(rig: Rig) -> None:
    rig.pending = ({"CPU": 4.0},)
    for _ in range(int(WAITING_S)):
        rig.look(context(TARGET, 2, {"a": {"running": 1.0}}))
    (text,) = rig.journal["waiting"]
    assert "every node that has that is full" in text


def test_a_replica_that_takes_long_to_start_is_no_news(rig: Rig) -> None:
    for _ in range(int(WAITING_S)):
        rig.look(context(TARGET, 2, {"a": {"running": 1.0}}))
    assert rig.journal["waiting"] == []


def test_a_replica_that_waits_for_a_moment_is_no_news(rig: Rig) -> None:
    rig.pending = ({"CPU": 4.0},)
    rig.look(context(TARGET, 2, {"a": {"running": 1.0}}))
    assert rig.journal["waiting"] == []
