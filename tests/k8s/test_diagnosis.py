"""A diagnosis: the verdict first, then causes, then what Kubernetes said; and refusals of the API server as lines."""

from __future__ import annotations

import io
import json
from typing import Any

import pytest
from rich.console import Console

from paceline.cli.k8s_view import diagnosis_view
from paceline.errors import ClusterError
from paceline.k8s.diagnosis import EventGroup, diagnose, grouped
from paceline.k8s.errors import Conflict, Denied, Gone, NotFound, TooMany
from paceline.k8s.refusals import Asked, refusal
from tests.k8s import objects as made

CRASHED = made.placed(
    "w1", status={"containerStatuses": [made.waiting("CrashLoopBackOff", restarts=2, last={"exitCode": 1})]}
)


def test_a_release_that_is_ready_is_healthy() -> None:
    found = diagnose(made.snapshot(made.service(*made.READY), pods=[made.running("h", "head")]))
    assert (found.healthy, found.verdict) == (True, "paceline is ready")


def test_one_that_comes_up_is_not_healthy_yet_and_says_what_it_waits_for() -> None:
    found = diagnose(made.snapshot())
    assert (found.healthy, found.verdict) == (False, "paceline is coming up: it waits for the head's pod to be made")


def test_the_verdict_is_the_first_cause() -> None:
    found = diagnose(made.snapshot(pods=[CRASHED]))
    assert found.verdict == f"paceline is not ready: {found.causes[0].what}"


def test_one_that_serves_with_a_pod_in_trouble_is_not_healthy() -> None:
    found = diagnose(made.snapshot(made.service(*made.READY), pods=[CRASHED]))
    assert (found.healthy, found.verdict.partition(":")[0]) == (False, "paceline serves, and has troubles")


def test_events_that_say_the_same_are_one_newest_first() -> None:
    pod = made.unplaced("w")
    events = [
        made.event(pod, "Failed", "no", count=2, age=50.0),
        made.event(pod, "Failed", "no", age=20.0),
        made.event(pod, "BackOff", "later", age=5.0),
    ]
    assert grouped(made.snapshot(pods=[pod], events=events)) == [
        EventGroup("Pod w", "BackOff", "later", 1, 5.0),
        EventGroup("Pod w", "Failed", "no", 3, 20.0),
    ]


def test_what_went_well_is_no_warning() -> None:
    pod = made.unplaced("w")
    events = [made.event(pod, "Pulled", "done", kind="Normal")]
    assert grouped(made.snapshot(pods=[pod], events=events), warnings_only=True) == []


def test_it_shows_the_remedy_and_the_last_lines_of_the_log() -> None:
    console = Console(width=100, file=io.StringIO(), record=True)
    console.print(diagnosis_view(diagnose(made.snapshot(pods=[CRASHED]), {0: ["boom \x1b[2J"]})))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines[:4] == [
        "paceline is not ready: Pod w1 of group target: container ray ended with exit code 1 (2 restarts)",
        "1. Pod w1 of group target: container ray ended with exit code 1 (2 restarts)",
        "   do: its last lines are below",
        "   | boom [2J",
    ]


# refusals

ASKED = Asked("patch", "rayservices.ray.io", "paceline", "llm")
CONFLICT = {
    "details": {
        "causes": [
            {
                "reason": "FieldManagerConflict",
                "message": 'conflict with "helm" using ray.io/v1',
                "field": ".spec.suspend",
            }
        ]
    }
}
FORBIDDEN = 'rayservices.ray.io is forbidden: User "bob" cannot patch resource "rayservices"'
REFUSALS: dict[str, tuple[int, dict[str, Any], type[ClusterError], str]] = {
    "no account": (401, {"message": "Unauthorized"}, Denied, "does not know this account (401): log in again"),
    "no right": (403, {"message": FORBIDDEN}, Denied, "not allowed to bob; `paceline k8s role` prints the Role"),
    "a quota": (403, {"message": "pods is forbidden: exceeded quota"}, Denied, "exceeded quota"),
    "nothing there": (404, {"message": "not found"}, NotFound, "not found"),
    "a manager": (409, CONFLICT, Conflict, "spec.suspend is set by helm; --force-conflicts takes it over"),
    "a version": (409, {"message": "the object has been modified"}, Conflict, "the object has been modified"),
    "forgotten": (410, {"message": "too old resource version"}, Gone, "too old"),
    "a budget": (429, {"message": "violate the pod's disruption budget"}, TooMany, "disruption budget"),
    "a wrong field": (422, {"message": "spec.x: Invalid value"}, ClusterError, "refused as it is written: spec.x"),
    "a failure": (500, {"message": "etcd"}, ClusterError, "the API server answered 500: etcd"),
}


@pytest.mark.parametrize(("status", "told", "kind", "words"), REFUSALS.values(), ids=REFUSALS)
def test_a_refusal_is_one_line_that_names_what_was_asked(
    status: int, told: dict[str, Any], kind: type[ClusterError], words: str
) -> None:
    found = refusal(ASKED, status, json.dumps({"kind": "Status", **told}).encode())
    assert (type(found), "\n" in found.message) == (kind, False)
    assert found.message.startswith("patch rayservices.ray.io paceline in namespace llm: ")
    assert words in found.message


def test_an_apply_that_may_not_create_says_so() -> None:
    body = json.dumps({"kind": "Status", "message": 'secrets "a" is forbidden: '}).encode()
    assert refusal(Asked("patch", "secrets", "a", "llm"), 403, body).message.startswith(
        "create secrets a in namespace llm: not allowed"
    )


def test_an_answer_that_is_no_status_is_quoted() -> None:
    assert "502 Bad Gateway" in refusal(ASKED, 502, b"<html>502 Bad Gateway</html>").message
