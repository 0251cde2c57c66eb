"""Ray's own autoscaling behind our interface: its delays and its factors, by the snapshots' clock."""

from __future__ import annotations

from paceline.autoscaling.snapshot import Snapshot, TargetLoad
from paceline.serving.ray_policy import RayQueueLength


def wanted(policy: RayQueueLength, now: float, requests: float, replicas: int = 2, starting: int = 0) -> int:
    loads = tuple(TargetLoad(f"t{n}", running=requests / replicas, waiting=0.0) for n in range(replicas))
    return policy.decide(Snapshot(now, replicas + starting, 0, loads)).target.replicas


def over(policy: RayQueueLength, seconds: int, requests: float, replicas: int = 2) -> list[int]:
    return [wanted(policy, float(now), requests, replicas) for now in range(seconds)]


def test_more_are_wanted_after_30_seconds() -> None:
    assert over(RayQueueLength(10, 1, 100), 40, requests=50.0) == [2] * 30 + [5] + [2] * 9


def test_fewer_are_wanted_after_10_minutes() -> None:
    found = over(RayQueueLength(10, 1, 100), 601, requests=2.0)
    assert (set(found[:600]), found[600]) == ({2}, 1)


def test_its_most_is_kept() -> None:
    assert max(over(RayQueueLength(1, 1, 7), 40, requests=50.0)) == 7


def test_what_starts_is_not_asked_for_again() -> None:
    policy = RayQueueLength(10, 1, 100, upscale_delay_s=0)
    assert wanted(policy, 0.0, 50.0, replicas=2, starting=3) == 5


def test_requests_are_those_of_its_period_on_average() -> None:
    policy = RayQueueLength(10, 1, 100, upscale_delay_s=0)
    for now in range(30):
        wanted(policy, float(now), 20.0)
    assert wanted(policy, 30.0, 1000.0) == 2


def test_drafters_stay_as_they_are() -> None:
    decision = RayQueueLength(10, 1, 100).decide(Snapshot(0.0, 1, 3, (TargetLoad("t", running=1.0),)))
    assert decision.draft.replicas == 3
