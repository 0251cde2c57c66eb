"""`upgrade` against a real API server, between two real servers that share a store; the test is KubeRay."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from paceline.api import ClusterStatus, create_app
from paceline.errors import ClusterError
from paceline.k8s.api import Api
from paceline.k8s.connect import connect
from paceline.k8s.kinds import RAY_SERVICES, Obj, name_of
from paceline.sessions.stores import open_store
from tests.api.scripted import gateway
from tests.k8s.commands.conftest import Command
from tests.k8s.commands.fronts import own_address, point, running
from tests.k8s.commands.operator import READY_POD, Operator, condition
from tests.rpc.engine_target import EngineTarget

pytestmark = pytest.mark.k8s

STORE = ("--set", "config.sessions.store=redis://shared:6379", "--set", "podDisruptionBudget.enabled=false")
OLD, NEW = ("--set", "image.tag=1.0.0"), ("--set", "image.tag=2.0.0")


class KubeRay:
    """Brings every RayService up in its thread: a canary leads to the new server, the release to the old one, and to
    the new one once its pods are to have the new image. `fail` has Serve refuse the canary."""

    def __init__(self, kubeconfig: Path, namespace: str, old: tuple[str, int], new: tuple[str, int]) -> None:
        self._api = connect(kubeconfig, namespace=namespace)
        self._old, self._new, self.fail = old, new, False
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._play)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._end.set()
        self._thread.join()
        self._api.close()

    def _play(self) -> None:
        while not self._end.wait(0.2):
            for service in self._api.list_all(RAY_SERVICES):
                if (service.get("status") or {}).get("observedGeneration") != service["metadata"]["generation"]:
                    self._settle(service)

    def _settle(self, service: Obj) -> None:
        name, canary = name_of(service), name_of(service).endswith("-canary")
        newer = "2.0.0" in str(service["spec"]["rayClusterConfig"])
        point(self._api, f"{name}-serve-svc", self._new if newer else self._old)
        app = {"status": "DEPLOY_FAILED" if self.fail and canary else "RUNNING", "message": "ValueError: no such model"}
        status: dict[str, Any] = {
            "observedGeneration": service["metadata"]["generation"],
            "numServeEndpoints": 1,
            "conditions": [
                condition("Ready", True, "NonZeroServeEndpoints"),
                condition("UpgradeInProgress", False, "NoPendingCluster"),
            ],
            "activeServiceStatus": {
                "rayClusterName": f"{name}-{'b' if newer else 'a'}",
                "applicationStatuses": {"paceline": app},
            },
        }
        try:
            self._api.patch(RAY_SERVICES, name, {"status": status}, "status")
        except ClusterError:
            return  # gone meanwhile


class Told(EngineTarget):
    """One that says that it is there."""

    async def status(self) -> ClusterStatus:
        return ClusterStatus(targets=({"replica_id": "target-1"},))


@dataclass
class World:
    api: Api
    kuberay: KubeRay
    old: str
    new: str

    @property
    def names(self) -> list[str]:
        return sorted(name_of(each) for each in self.api.list_all(RAY_SERVICES))

    @property
    def image(self) -> str:
        return str(self.api.get(RAY_SERVICES, "paceline")["spec"]["rayClusterConfig"])


@pytest.fixture
def other_weights(request: pytest.FixtureRequest) -> bool:
    """Whether the new version has another model's; only where a test says so."""
    return bool(getattr(request, "param", False))


@pytest.fixture
def world(
    k8s: Command,
    api: Api,
    operator: Operator,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    other_weights: bool,
) -> Iterator[World]:
    monkeypatch.setattr("paceline.k8s.upgrade.LOOK_S", 0.1)
    with ExitStack() as until:
        addresses = []
        for seed in (0, int(other_weights)):
            targets = Told(seed)
            until.callback(targets.loop.stop)
            store = open_store(f"sqlite:///{tmp_path}/sessions.db", 600.0)
            addresses.append(until.enter_context(running(create_app(gateway(targets, store=store)))))
        status = {**READY_POD, "podIP": own_address(), "podIPs": [{"ip": own_address()}]}
        operator.pod("paceline-a", "head", "head", status=status, terminationGracePeriodSeconds=0)
        kuberay = KubeRay(k8s.kubeconfig, k8s.namespace, addresses[0], addresses[1])
        kuberay.start()
        until.callback(kuberay.stop)
        found = k8s("apply", *STORE, *OLD)
        assert found.code == 0, found.err
        old, new = (f"http://{host}:{port}" for host, port in addresses)
        yield World(api, kuberay, old, new)


def begun(url: str) -> None:
    """A session with a turn."""
    httpx.post(f"{url}/v1/sessions", json={"session_id": "mine", "seed": 3}).raise_for_status()
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    httpx.post(f"{url}/v1/sessions/mine/turns", json=body, timeout=60).raise_for_status()


def test_sessions_begun_on_the_old_version_go_on_on_the_new_one(k8s: Command, world: World) -> None:
    begun(world.old)
    found = k8s("upgrade", *STORE, *NEW)
    assert (found.code, found.err) == (0, "")
    body = {"messages": [{"role": "user", "content": "and?"}], "max_tokens": 4}
    answer = httpx.post(f"{world.new}/v1/sessions/mine/turns", json=body, timeout=60)
    assert answer.status_code == 200
    assert httpx.get(f"{world.new}/v1/sessions/mine").json()["turns"] == 2


def test_the_canary_is_looked_at_and_gone_at_the_end(k8s: Command, world: World) -> None:
    found = k8s("upgrade", *STORE, *NEW)
    assert "canary: 3 of 3 seeded answers are the same, token for token" in found.out
    assert "canary: sees the sessions of the running version" in found.out
    assert "a session begun before the switch goes on from its history" in found.out
    assert (world.names, "2.0.0" in world.image) == (["paceline"], True)


def test_a_canary_that_fails_leaves_the_release_as_it_is(k8s: Command, world: World) -> None:
    world.kuberay.fail = True
    found = k8s("upgrade", *STORE, *NEW)
    assert found.code == 1
    assert "the canary failed, and nothing was changed: Serve: application paceline is DEPLOY_FAILED" in found.err
    assert (world.names, "2.0.0" in world.image) == (["paceline"], False)


@pytest.mark.parametrize("other_weights", [True], indirect=True)
def test_other_answers_of_another_image_are_told(k8s: Command, world: World) -> None:
    found = k8s("upgrade", *STORE, *NEW)
    assert (found.code, found.err) == (0, "")
    assert "canary: 0 of 3 seeded answers are the same, token for token" in found.out


@pytest.mark.parametrize("other_weights", [True], indirect=True)
def test_other_answers_fail_where_the_same_are_asked_for(k8s: Command, world: World) -> None:
    found = k8s("upgrade", *STORE, *NEW, "--same-output")
    assert found.code == 1
    assert "the canary failed, and nothing was changed: 0 of 3 seeded answers are the same" in found.err
    assert (world.names, "2.0.0" in world.image) == (["paceline"], False)


def test_the_same_values_have_nothing_to_do(k8s: Command, world: World) -> None:
    found = k8s("upgrade", *STORE, *OLD)
    assert (found.code, found.out.splitlines()[-1]) == (0, "paceline is so already: nothing to do")


def test_a_dry_run_shows_the_changes_and_makes_none(k8s: Command, world: World) -> None:
    found = k8s("upgrade", *STORE, *NEW, "--dry-run")
    assert found.out.startswith("new cluster:")
    assert "1.0.0 -> " in found.out
    assert (world.names, "2.0.0" in world.image) == (["paceline"], False)


def test_sessions_in_memory_are_not_lost_unasked(k8s: Command, world: World) -> None:
    found = k8s("upgrade", *STORE[2:], *NEW)
    assert (found.code, world.names) == (1, ["paceline"])
    assert found.err.startswith("error: sessions.store: ")
