"""Who leaves when the targets become fewer: Serve's scheduler asks ours."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve._private.deployment_scheduler import DeploymentScheduler

from paceline.serving.victims import METHOD, SessionsHeld, install

TARGET, DRAFT = DeploymentID(name="Target", app_name="app"), DeploymentID(name="Draft", app_name="app")


class Scheduler:
    """Serve's books, and Serve's choice: the newest."""

    _head_node_id = "head"

    def __init__(self, nodes: dict[ReplicaID, str], starting: tuple[ReplicaID, ...] = ()) -> None:
        self._running_replicas = {replica.deployment_id: nodes for replica in nodes}
        self._starting = starting

    def _get_node_to_running_replicas(self) -> dict[str, set[ReplicaID]]:
        found: dict[str, set[ReplicaID]] = {}
        for nodes in self._running_replicas.values():
            for replica, node in nodes.items():
                found.setdefault(node, set()).add(replica)
        return found

    def _get_replicas_to_stop(self, deployment_id: DeploymentID, max_num_to_stop: int, **_: Any) -> set[ReplicaID]:
        newest = [*self._starting, *reversed(self._running_replicas[deployment_id])]
        return set(newest[:max_num_to_stop])


def replicas(of: DeploymentID, *names: str) -> list[ReplicaID]:
    return [ReplicaID(name, of) for name in names]


@pytest.fixture
def held() -> SessionsHeld:
    kind = type("Fresh", (Scheduler,), {METHOD: Scheduler._get_replicas_to_stop})
    held = install(kind)
    held.kind = kind  # type: ignore[attr-defined]
    return held


def stopped(held: SessionsHeld, nodes: dict[ReplicaID, str], count: int, *starting: ReplicaID) -> set[str]:
    scheduler = held.kind(nodes, starting)  # type: ignore[attr-defined]
    (of,) = scheduler._running_replicas
    return {replica.unique_id for replica in scheduler._get_replicas_to_stop(of, count)}


def test_ray_still_has_the_method_that_is_wrapped() -> None:
    parameters = list(inspect.signature(getattr(DeploymentScheduler, METHOD)).parameters)
    assert parameters[:3] == ["self", "deployment_id", "max_num_to_stop"]


def test_the_target_with_the_fewest_sessions_goes(held: SessionsHeld) -> None:
    a, b, c = replicas(TARGET, "a", "b", "c")
    held.put({"a": 3, "b": 1, "c": 2})
    assert stopped(held, {a: "n1", b: "n2", c: "n3"}, 1) == {"b"}
    assert stopped(held, {a: "n1", b: "n2", c: "n3"}, 2) == {"b", "c"}


def test_one_that_is_starting_goes_before_any_session(held: SessionsHeld) -> None:
    a, b = replicas(TARGET, "a", "b")
    held.put({"a": 0})
    assert stopped(held, {a: "n1"}, 1, b) == {"b"}


def test_the_head_node_stays_so_its_replica_does(held: SessionsHeld) -> None:
    a, b = replicas(TARGET, "a", "b")
    held.put({"a": 0, "b": 5})
    assert stopped(held, {a: "head", b: "n1"}, 1) == {"b"}


def test_drafts_are_left_to_serve(held: SessionsHeld) -> None:
    a, b = replicas(DRAFT, "a", "b")
    held.put({"a": 0, "b": 5})
    assert stopped(held, {a: "n1", b: "n2"}, 1) == {"b"}


def test_books_that_are_not_as_expected_leave_it_to_serve(held: SessionsHeld) -> None:
    a, b = replicas(TARGET, "a", "b")
    held.put({"a": 0, "b": 5})
    scheduler = held.kind({a: "n1", b: "n2"})  # type: ignore[attr-defined]
    scheduler._get_node_to_running_replicas = None
    assert scheduler._get_replicas_to_stop(TARGET, 1) == {b}


def test_it_is_wrapped_once(held: SessionsHeld) -> None:
    assert install(held.kind) is held  # type: ignore[attr-defined]


def test_a_ray_without_the_method_goes_on() -> None:
    assert install(type("Other", (), {})).get("a") is None
