"""What a release that comes up waits for, and when it is ready."""

from __future__ import annotations

import pytest

from paceline.k8s.kinds import Obj
from paceline.k8s.snapshot import Snapshot
from paceline.k8s.waiting import waits_for
from tests.k8s import objects as made

HEAD = made.running("h", "head")
DEPLOYING = made.apps("DEPLOYING", Target={"status": "UPDATING"}, Router={"status": "HEALTHY"})
SWITCHING = (
    made.condition("Ready", True, "NonZeroServeEndpoints"),
    made.condition("UpgradeInProgress", True, "BothActivePendingClustersExist"),
)


def unseen() -> Obj:
    found = made.service(generation=2)
    found["status"]["observedGeneration"] = 1
    return found


def init_container(name: str, state: Obj) -> Obj:
    return {"initContainerStatuses": [made.container(state, name=name)]}


CASES: dict[str, tuple[Snapshot, str]] = {
    "the operator": (made.snapshot(unseen()), "the KubeRay operator to take up RayService paceline"),
    "a volume": (made.snapshot(claims=[made.claim("models")]), "a volume for claim models"),
    "a download": (made.snapshot(jobs=[made.job("download")]), "the model's download: Job download, 35 s by now"),
    "no head": (made.snapshot(), "the head's pod to be made"),
    "a node": (
        made.snapshot(pods=[HEAD, made.pod("w", "draft")]),
        "a node for Pod w of group draft; pods ready: 1 of 2",
    ),
    "an image": (
        made.snapshot(pods=[HEAD, made.placed("w", status={"containerStatuses": [made.waiting("ContainerCreating")]})]),
        "Pod w of group target: pulling image paceline:1 or mounting volumes; pods ready: 1 of 2",
    ),
    "the head to answer": (
        made.snapshot(pods=[HEAD, made.placed("w", status=init_container("wait-gcs-ready", {"running": {}}))]),
        "Pod w of group target: the head to answer; pods ready: 1 of 2",
    ),
    "ray": (
        made.snapshot(pods=[made.placed("h", "head", status={"containerStatuses": [made.container({"running": {}})]})]),
        "Pod h of group head to start Ray; pods ready: 0 of 1",
    ),
    "no application": (made.snapshot(pods=[HEAD]), "Serve to be given the application"),
    "serve": (
        made.snapshot(made.service(*made.STARTING, pendingServiceStatus=DEPLOYING), pods=[HEAD]),
        "Serve, paceline deploying: Target updating, Router healthy",
    ),
    "the switch": (
        made.snapshot(
            made.service(
                *SWITCHING,
                activeServiceStatus=made.apps("RUNNING"),
                pendingServiceStatus={"rayClusterName": "new", "trafficRoutedPercent": 40},
            ),
            pods=[HEAD],
        ),
        "the switch to RayCluster new, 40 % of requests go there",
    ),
    "endpoints": (
        made.snapshot(
            made.service(
                made.condition("Ready", False, "ZeroServeEndpoints"), activeServiceStatus=made.apps("RUNNING")
            ),
            pods=[HEAD],
        ),
        "a pod whose Serve proxy is ready",
    ),
}


@pytest.mark.parametrize(("seen", "expected"), CASES.values(), ids=CASES)
def test_it_says_what_it_waits_for(seen: Snapshot, expected: str) -> None:
    assert waits_for(seen) == expected


def test_a_trouble_is_said_before_what_is_merely_slow() -> None:
    seen = made.snapshot(jobs=[made.job()], pods=[made.unplaced("a"), made.unplaced("b")])
    assert waits_for(seen).startswith("Pod a of group target cannot be placed")
    assert waits_for(seen).endswith("(and 1 more)")


RUNNING = made.apps("RUNNING")


def test_it_is_ready_when_all_that_was_asked_for_serves() -> None:
    assert made.snapshot(made.service(*made.READY, activeServiceStatus=RUNNING)).ready


@pytest.mark.parametrize(
    "service",
    [
        made.service(*made.STARTING, activeServiceStatus=RUNNING),
        made.service(*SWITCHING, activeServiceStatus=RUNNING),
        made.service(*made.READY, activeServiceStatus=made.apps("DEPLOYING")),
        {**made.service(*made.READY), "metadata": {"name": "paceline", "generation": 2}},
    ],
    ids=["not ready", "switching", "deploying in place", "not yet seen by the operator"],
)
def test_it_is_not_ready_before(service: Obj) -> None:
    assert not made.snapshot(service).ready
