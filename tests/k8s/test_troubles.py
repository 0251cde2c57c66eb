"""What keeps a release from being ready, each with its remedy."""

from __future__ import annotations

import pytest

from paceline.k8s.kinds import Obj
from paceline.k8s.snapshot import Snapshot
from paceline.k8s.troubles import Trouble, troubles
from tests.k8s import objects as made


def only(seen: Snapshot) -> Trouble:
    (found,) = troubles(seen)
    return found


def test_a_release_that_is_ready_has_none() -> None:
    assert troubles(made.snapshot(made.service(*made.READY), pods=[made.running("h", "head")])) == []


def test_what_the_operator_refuses_comes_with_its_words() -> None:
    refused = made.service(made.condition("Ready", False, "ValidationFailed", "name too long"))
    assert only(made.snapshot(refused)).what == "the KubeRay operator refuses RayService paceline: name too long"


def test_an_operator_that_takes_nothing_up_is_noticed_after_a_minute() -> None:
    unseen = made.service(made=61.0)
    del unseen["status"]["observedGeneration"]
    assert only(made.snapshot(unseen)).what == "no operator has taken up RayService paceline in 61 s"


def test_an_operator_is_given_a_minute() -> None:
    unseen = made.service(made=59.0)
    del unseen["status"]["observedGeneration"]
    assert troubles(made.snapshot(unseen)) == []


def test_a_pod_that_fits_nowhere_names_group_and_resource() -> None:
    gpu = {"resources": {"limits": {"nvidia.com/gpu": "2"}}}
    found = only(made.snapshot(pods=[made.unplaced("w1", "big", "0/2 nodes are available.", container=gpu)]))
    assert found.what == (
        "Pod w1 of group big cannot be placed: 0/2 nodes are available.; it asks for nvidia.com/gpu 2"
    )
    assert found.lasting


def test_a_pod_that_an_autoscaler_makes_room_for_is_waited_for() -> None:
    pod = made.unplaced("w1")
    found = only(made.snapshot(pods=[pod], events=[made.event(pod, "TriggeredScaleUp", "1->2", kind="Normal")]))
    assert (found.lasting, found.what.endswith("an autoscaler is adding a node")) == (False, True)


@pytest.mark.parametrize(
    ("reason", "lasting"), [("ErrImagePull", False), ("ImagePullBackOff", True), ("InvalidImageName", True)]
)
def test_an_image_that_cannot_be_pulled_is_named(reason: str, lasting: bool) -> None:
    pod = made.placed("w1", status={"containerStatuses": [made.waiting(reason, "denied")]})
    found = only(made.snapshot(pods=[pod]))
    assert found.what == f"Pod w1 of group target: image paceline:1 cannot be pulled ({reason}: denied)"
    assert found.lasting is lasting


def test_a_secret_that_is_missing_keeps_a_container_from_its_start() -> None:
    status = {"containerStatuses": [made.waiting("CreateContainerConfigError", 'secret "hub" not found')]}
    found = only(made.snapshot(pods=[made.placed("w1", status=status)]))
    assert 'container ray cannot start (CreateContainerConfigError: secret "hub" not found)' in found.what


def test_a_container_that_took_too_much_memory_names_its_group() -> None:
    status = {"containerStatuses": [made.waiting("CrashLoopBackOff", restarts=3, last={"reason": "OOMKilled"})]}
    found = only(made.snapshot(pods=[made.placed("w1", "target", status=status)]))
    assert found.what == "Pod w1 of group target: container ray was killed for memory (3 restarts)"
    assert "resources.limits.memory of group target" in found.remedy


def test_a_container_that_crashes_has_the_log_of_the_one_before() -> None:
    last = {"reason": "Error", "exitCode": 3}
    status = {"containerStatuses": [made.waiting("CrashLoopBackOff", restarts=2, last=last)]}
    found = only(made.snapshot(pods=[made.placed("w1", status=status)]))
    assert found.what == "Pod w1 of group target: container ray ended with exit code 3 (2 restarts)"
    assert (found.pod, found.log, found.previous) == ("w1", "ray", True)


def test_a_container_that_restarted_once_and_runs_is_no_trouble() -> None:
    up = {**made.container({"running": {}}, restarts=1, last={"exitCode": 1}), "ready": True}
    assert troubles(made.snapshot(pods=[made.placed("w1", status={"containerStatuses": [up]})])) == []


def test_a_pod_that_is_going_away_is_no_trouble() -> None:
    assert troubles(made.snapshot(pods=[made.unplaced("w1", deletionTimestamp=made.ago(1))])) == []


def test_a_claim_without_a_volume_has_the_provisioners_words() -> None:
    claim = made.claim(storageClassName="fast")
    event = made.event(claim, "ProvisioningFailed", 'storageclass "fast" not found')
    found = only(made.snapshot(claims=[claim], events=[event]))
    assert found.what == 'claim models has no volume: storageclass "fast" not found'
    assert "storage class fast" in found.remedy


def test_a_claim_that_waits_for_its_first_pod_is_no_trouble() -> None:
    claim = made.claim()
    event = made.event(claim, "WaitForFirstConsumer", "waiting for first consumer", kind="Normal")
    assert troubles(made.snapshot(claims=[claim], events=[event])) == []


def test_a_claim_that_does_not_exist_is_named() -> None:
    volumes = {"volumes": [{"name": "m", "persistentVolumeClaim": {"claimName": "mine"}}]}
    found = only(made.snapshot(pods=[made.placed("w1", spec=volumes)]))
    assert found.what == "claim mine is mounted and does not exist"


def test_a_download_that_failed_has_the_log_of_its_pod() -> None:
    failed = made.job("download", made.condition("Failed", True, "BackoffLimitExceeded", "too often"))
    pod = made.running("download-x1")
    pod["metadata"]["labels"] = {}
    pod["metadata"]["ownerReferences"] = [{"kind": "Job", "name": "download"}]
    found = only(made.snapshot(jobs=[failed], pods=[pod]))
    assert found.what == "Job download failed: BackoffLimitExceeded: too often"
    assert (found.pod, found.log) == ("download-x1", "ray")


SERVE: dict[str, tuple[Obj, str]] = {
    "a deployment": (
        made.apps("DEPLOYING", Target={"status": "UNHEALTHY", "message": "Traceback\n  a\nModelError: no such model"}),
        "Serve: Target is UNHEALTHY: Traceback / a / ModelError: no such model",
    ),
    "the application": (
        made.apps("DEPLOY_FAILED", "ConfigError: model: wrong"),
        "Serve: application paceline is DEPLOY_FAILED: ConfigError: model: wrong",
    ),
}


@pytest.mark.parametrize(("status", "expected"), SERVE.values(), ids=SERVE)
@pytest.mark.parametrize("part", ["activeServiceStatus", "pendingServiceStatus"])
def test_what_serve_fails_at_is_told(part: str, status: Obj, expected: str) -> None:
    found = only(made.snapshot(made.service(*made.STARTING, **{part: status})))
    assert (found.what, found.remedy) == (expected, "change the value it names, and apply again")


def test_causes_come_before_what_follows_from_them() -> None:
    failing = made.service(*made.STARTING, pendingServiceStatus=made.apps("UNHEALTHY", "no replica"))
    found = troubles(made.snapshot(failing, pods=[made.unplaced("w1")]))
    assert [each.what.split()[0] for each in found] == ["Pod", "Serve:"]


def test_the_head_comes_before_its_workers() -> None:
    found = troubles(made.snapshot(pods=[made.unplaced("w1", "draft"), made.unplaced("h1", "head")]))
    assert [each.pod for each in found] == ["h1", "w1"]
