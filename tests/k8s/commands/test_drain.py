"""`drain` against a real API server and a real Paceline HTTP server; the test is the Ray cluster behind it."""

from __future__ import annotations

import re
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import pytest

from paceline.api import create_app
from paceline.api.nodes import Machines, Node, Nodes, Placed
from paceline.k8s import pace
from paceline.k8s.api import Api
from paceline.k8s.connect import connect
from paceline.k8s.kinds import NODES, PODS, RAY_SERVICES, Resource, name_of
from tests.api.scripted import ScriptedTargets, gateway
from tests.k8s.commands.conftest import Command
from tests.k8s.commands.fronts import own_address, point, running
from tests.k8s.commands.operator import READY_POD, Operator

pytestmark = pytest.mark.k8s

BUDGETS = Resource("policy", "v1beta1", "poddisruptionbudgets", "PodDisruptionBudget")
LABELS = {"app.kubernetes.io/instance": "paceline", "app.kubernetes.io/part-of": "paceline"}
GROUP = {
    "rayStartParams": {},
    "template": {"spec": {"containers": [{"name": "ray", "image": "example.com/paceline:1"}]}},
}
SERVICE = {
    "apiVersion": "ray.io/v1",
    "kind": "RayService",
    "metadata": {"name": "paceline", "labels": LABELS},
    "spec": {"rayClusterConfig": {"headGroupSpec": GROUP}},
}
STEPS = 6
"""Looks until a node that drains is empty."""


class Yard(Nodes):
    """A head and workers, one for each pod. A worker that drains has less at every look, and ends when it has nothing.

    `early` names the pods that were gone before.
    """

    def __init__(self, api: Api, pods: Mapping[str, str]) -> None:
        self._api = api
        self.pods = dict(pods)
        self.left: dict[str, int] = {}
        self.deadlines: dict[str, float] = {}
        self.early: set[str] = set()

    @property
    def target_needs(self) -> Mapping[str, float]:
        return {"CPU": 1.0}

    @property
    def leaving_s(self) -> float:
        return 1.0

    @property
    def histories_stay(self) -> bool:
        return True

    async def look(self) -> Machines:
        there = {name_of(pod) for pod in self._api.list_all(PODS)}
        nodes, replicas = [Node("head", "10.9.0.100", "head", head=True)], []
        for pod, ip in self.pods.items():
            left = self.left.get(pod, STEPS)
            nodes.append(Node(f"ray-{pod}", ip, pod, alive=left > 0, deadline=self.deadlines.get(pod)))
            if left:
                state = "STOPPING" if pod in self.left else "RUNNING"
                replicas.append(Placed("target", f"target-{pod}", f"ray-{pod}", state, left if pod in self.left else 0))
                self.early |= {pod} - there
            if pod in self.left:
                self.left[pod] = max(0, left - 1)
        return Machines(tuple(nodes), tuple(replicas))

    async def drain(self, node_id: str, deadline: float) -> None:
        pod = node_id.removeprefix("ray-")
        self.left.setdefault(pod, STEPS)
        self.deadlines[pod] = deadline


@dataclass
class Place:
    """A release with a head and a worker on one node and two workers on another."""

    api: Api
    yard: Yard
    head_node: str
    node: str
    said: list[str] = field(default_factory=list)

    @property
    def pods(self) -> set[str]:
        return {name_of(pod) for pod in self.api.list_all(PODS)}

    @property
    def cordoned(self) -> bool:
        return bool(self.api.get(NODES, self.node)["spec"].get("unschedulable"))


@pytest.fixture
def place(k8s: Command, api: Api, operator: Operator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setattr("paceline.k8s.drain.LOOK_S", 0.05)
    monkeypatch.setattr("paceline.k8s.evict.RETRY_S", 0.05)
    api.create(RAY_SERVICES, SERVICE)
    operator.cluster("paceline", "paceline-a")
    first, second = (f"node-{uuid.uuid4().hex[:8]}" for _ in range(2))
    pods = {"w0": ("10.9.0.1", first), "w1": ("10.9.0.2", second), "w2": ("10.9.0.3", second)}
    for name in (first, second):
        operator.node(name, {}, cpu="8")
    for name, (ip, node) in ({"head": (own_address(), first)} | pods).items():
        group = "head" if name == "head" else "targets"
        operator.pod(
            "paceline-a",
            group,
            name,
            status={**READY_POD, "podIP": ip, "podIPs": [{"ip": ip}]},
            nodeName=node,
            terminationGracePeriodSeconds=0,
        )
    with connect(k8s.kubeconfig, namespace=k8s.namespace) as own:
        yard = Yard(own, {name: ip for name, (ip, _) in pods.items()})
        targets = ScriptedTargets()
        targets.held = []
        with running(create_app(gateway(targets, nodes=yard))) as address:
            point(api, "paceline-serve-svc", address)
            yield Place(api, yard, first, second)
    for name in (first, second):
        api.delete(NODES, name)


def test_a_drained_node_is_cordoned_and_its_pods_are_gone(k8s: Command, place: Place) -> None:
    found = k8s("drain", place.node)
    assert (found.code, found.err) == (0, "")
    assert (place.cordoned, place.pods) == (True, {"head", "w0"})


def test_no_pod_goes_before_its_sessions(k8s: Command, place: Place) -> None:
    k8s("drain", place.node)
    assert place.yard.early == set()


def test_all_of_a_node_drain_at_once_and_nothing_else(k8s: Command, place: Place) -> None:
    k8s("drain", place.node)
    assert set(place.yard.deadlines) == {"w1", "w2"}


def test_progress_tells_the_sessions_that_are_left(k8s: Command, place: Place) -> None:
    found = k8s("drain", place.node)
    assert re.search(r"^w1: [1-5] sessions, 1 target left$", found.out, re.MULTILINE)


def test_a_drained_pod_leaves_its_node_open(k8s: Command, place: Place) -> None:
    found = k8s("drain", "w1")
    assert (found.code, place.pods, place.cordoned) == (0, {"head", "w0", "w2"}, False)


def test_a_dry_run_changes_nothing(k8s: Command, place: Place) -> None:
    found = k8s("drain", place.node, "--dry-run")
    assert found.out.splitlines() == [
        f"cordon node {place.node}",
        "drain, then evict pod w1",
        "drain, then evict pod w2",
    ]
    assert (place.cordoned, place.pods, place.yard.deadlines) == (False, {"head", "w0", "w1", "w2"}, {})


def test_the_second_drain_finds_nothing_to_do(k8s: Command, place: Place) -> None:
    k8s("drain", place.node)
    before = dict(place.yard.deadlines)
    assert k8s("drain", place.node).code == 0
    assert place.yard.deadlines == before


def test_the_head_is_refused_with_what_it_would_cost(k8s: Command, place: Place) -> None:
    found = k8s("drain", place.head_node)
    assert (found.code, place.pods) == (1, {"head", "w0", "w1", "w2"})
    assert found.err.startswith("error: head is the head pod, its Ray cluster ends with it")


def test_the_head_goes_by_force_and_last(k8s: Command, place: Place) -> None:
    found = k8s("drain", place.head_node, "--force")
    done = [line for line in found.out.splitlines() if line.endswith("is evicted")]
    assert done == ["pod w0 is evicted", "pod head is evicted"]


def test_what_the_server_refuses_is_said_and_nothing_is_evicted(k8s: Command, place: Place) -> None:
    place.yard.pods = {"w1": "10.9.0.2"}
    found = k8s("drain", "w1")
    assert found.code == 1
    assert "has the only target replicas, and no other node has room for one (CPU 1)" in found.err
    assert "w1" in place.pods


def test_a_pod_that_never_joined_ray_is_evicted(k8s: Command, place: Place) -> None:
    del place.yard.pods["w1"]
    assert k8s("drain", "w1").code == 0
    assert "w1" not in place.pods


@pytest.mark.parametrize("name", ["nobody", "other"])
def test_what_is_not_the_release_s_is_refused_in_one_line(
    k8s: Command, place: Place, operator: Operator, name: str
) -> None:
    operator.pod("another-cluster", "targets", "other")
    found = k8s("drain", name)
    assert (found.code, len(found.err.splitlines())) == (1, 1)
    assert found.err.startswith(f"error: {name}: neither a pod" if name == "nobody" else "error: pod other runs no Ray")


def test_other_pods_of_the_node_are_left_alone_and_told(k8s: Command, place: Place, operator: Operator) -> None:
    operator.pod("another-cluster", "targets", "other", nodeName=place.node)
    found = k8s("drain", place.node)
    assert "left alone, since they are not the release's: other" in found.out
    assert "other" in place.pods


def budget(api: Api, allowed: int) -> None:
    """A budget over the targets that allows so many disruptions, as Kubernetes' controller writes it."""
    spec = {"minAvailable": 1, "selector": {"matchLabels": {"ray.io/group": "targets"}}}
    made = api.apply(
        BUDGETS,
        {"apiVersion": "policy/v1beta1", "kind": "PodDisruptionBudget", "metadata": {"name": "keep"}, "spec": spec},
    )
    status = {
        "observedGeneration": made["metadata"]["generation"],
        "disruptionsAllowed": allowed,
        "currentHealthy": 3,
        "desiredHealthy": 3 - allowed,
        "expectedPods": 3,
    }
    api.patch(BUDGETS, "keep", {"status": status}, "status")


def test_a_disruption_budget_is_waited_for_and_named(
    k8s: Command, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget(place.api, 0)
    sleeps = []

    def sleep(self: pace.Pace, seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 10:
            budget(place.api, 1)

    monkeypatch.setattr(pace.Pace, "sleep", sleep)
    found = k8s("drain", "w1")
    assert (found.code, "w1" in place.pods) == (0, False)
    assert "w1: waiting for a disruption budget" in found.out
    assert "keep" in found.out


def test_a_budget_that_never_gives_way_ends_it_with_its_name(
    k8s: Command, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    budget(place.api, 0)
    sleeps: list[float] = []
    monkeypatch.setattr(pace.Pace, "sleep", lambda _, seconds: sleeps.append(seconds))
    monkeypatch.setattr(pace.Pace, "over", property(lambda _: len(sleeps) > 3 * STEPS))
    found = k8s("drain", "w1")
    assert (found.code, "w1" in place.pods) == (1, True)
    assert found.err.startswith("error: pod w1 is not evicted")
    assert "keep" in found.err


def test_ctrl_c_says_how_far_it_is_and_the_same_command_goes_on(
    k8s: Command, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: pace.Pace, seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(pace.Pace, "sleep", interrupt)
        found = k8s("drain", place.node)
    assert found.code == 130
    assert found.err.splitlines()[:4] == [
        "interrupted",
        f"node {place.node} is cordoned",
        "pod w1 drains",
        "pod w2 drains",
    ]
    assert (k8s("drain", place.node).code, place.pods) == (0, {"head", "w0"})
