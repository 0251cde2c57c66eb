"""`status` and `diagnose` of a release on a real API server, Paceline behind its proxy."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from threading import Thread

import pytest
import uvicorn

from paceline.api import create_app
from paceline.api.gateway import Gateway
from paceline.k8s.api import Api
from paceline.k8s.kinds import NODES, PODS, SERVICES, Resource
from paceline.k8s.server import ServerProxy
from tests.console.served import tiny_gateway, tiny_targets
from tests.k8s.commands.conftest import Command
from tests.k8s.commands.operator import (
    READY_POD,
    UNSCHEDULABLE,
    Operator,
    condition,
    ready,
    waiting_container,
)

pytestmark = pytest.mark.k8s

QUICK = ("apply", "--set", "podDisruptionBudget.enabled=false", "--no-wait")
ENDPOINTS = Resource("", "v1", "endpoints", "Endpoints")


@pytest.fixture
def release(k8s: Command, operator: Operator) -> str:
    """Applied, its cluster made, head up, nothing else."""
    assert k8s(*QUICK).code == 0
    operator.say("paceline", conditions=[condition("Ready", False, "Initializing", "no pods yet")])
    operator.cluster("paceline", "paceline-abc")
    operator.pod("paceline-abc", "head", "head-1", status=READY_POD)
    return "paceline"


def own_address() -> str:
    """One by which this machine is reached from itself, but not the loopback: an API server proxies to no such."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing
        return str(probe.getsockname()[0])


@pytest.fixture
def gateway() -> Iterator[Gateway]:
    targets = tiny_targets("target-1", "target-2")
    yield tiny_gateway(targets)
    targets.stop()


@pytest.fixture
def served(api: Api, gateway: Gateway, release: str) -> Iterator[None]:
    """Paceline's own application over two engines, as the head's pod and the endpoint of the release's service."""
    address = own_address()
    api.patch(PODS, "head-1", {"status": {"podIP": address, "podIPs": [{"ip": address}]}}, "status")
    with socket.create_server((address, 0)) as listener:
        port = listener.getsockname()[1]
        server = uvicorn.Server(uvicorn.Config(create_app(gateway), log_level="error", lifespan="off"))
        thread = Thread(target=server.run, args=([listener],))
        thread.start()
        name = {"name": "paceline-serve-svc"}
        spec = {"ports": [{"name": "serve", "port": 8000}]}
        api.create(SERVICES, {"apiVersion": "v1", "kind": "Service", "metadata": name, "spec": spec})
        pod = {"kind": "Pod", "name": "head-1", "namespace": api.namespace}  # a proxy goes to no address but a pod's
        subsets = [{"addresses": [{"ip": address, "targetRef": pod}], "ports": [{"name": "serve", "port": port}]}]
        api.create(ENDPOINTS, {"apiVersion": "v1", "kind": "Endpoints", "metadata": name, "subsets": subsets})
        yield
        server.should_exit = True
        thread.join()


def test_status_shows_pods_and_why_the_server_is_silent(k8s: Command, release: str) -> None:
    found = k8s("status")
    assert found.code == 0
    assert "paceline in namespace" in found.out
    assert "head-1" in found.out
    assert 'services "paceline-serve-svc" not found' in " ".join(found.out.split())


def test_status_shows_the_replicas_and_sessions_of_a_real_server(
    k8s: Command, api: Api, operator: Operator, release: str, served: None
) -> None:
    ready(api, operator.service())
    ServerProxy.of_service(api, release).chat([{"role": "user", "content": "w5 w6"}], seed=1, session_id="kept")
    found = k8s("status").out
    for word in ("ready", "target-1", "target-2", "kept"):
        assert word in found


def test_a_chat_through_the_proxy_is_fixed_by_its_seed(api: Api, release: str, served: None) -> None:
    server = ServerProxy.of_service(api, release)
    answers = [server.chat([{"role": "user", "content": "w5 w6"}], seed=7, temperature=1.0) for _ in range(2)]
    first, second = (answer["paceline"]["token_ids"] for answer in answers)
    assert first == second != []


def test_status_for_programs_has_pods_and_the_server(
    k8s: Command, api: Api, operator: Operator, release: str, served: None
) -> None:
    ready(api, operator.service())
    told = json.loads(k8s("status", "--json").out)
    assert (told["ready"], [pod["name"] for pod in told["pods"]]) == (True, ["head-1"])
    assert [target["replica_id"] for target in told["server"]["targets"]] == ["target-1", "target-2"]


def test_status_without_a_release_says_how_to_make_one(k8s: Command) -> None:
    found = k8s("status")
    assert found.err.startswith(f"error: no Paceline in namespace {k8s.namespace}; `paceline k8s apply` makes one")


def test_of_several_releases_one_must_be_named(k8s: Command, release: str) -> None:
    k8s(*QUICK, "--name", "second")
    assert k8s("status").err == f"error: --name: namespace {k8s.namespace} has paceline, second: say which\n"
    assert k8s("status", "--name", "second").code == 0


def test_a_healthy_release_is_diagnosed_so(k8s: Command, api: Api, operator: Operator, release: str) -> None:
    ready(api, operator.service())
    found = k8s("diagnose")
    assert (found.code, found.out.splitlines()[0]) == (0, "paceline is ready")


def test_a_pod_that_fits_nowhere_is_explained_by_what_the_nodes_lack(
    k8s: Command, api: Api, operator: Operator, release: str
) -> None:
    operator.pod(
        "paceline-abc", "gpu", "w1", status=UNSCHEDULABLE, resources={"nvidia.com/gpu": "1"}, nodeSelector={"zone": "b"}
    )
    node = f"{api.namespace}-node"
    operator.node(node, {"zone": "a"}, cpu="4", memory="8Gi")
    try:
        found = k8s("diagnose")
    finally:
        api.delete(NODES, node)
    assert found.code == 1
    assert "Pod w1 of group gpu cannot be placed" in found.out
    assert "no node offers nvidia.com/gpu, it asks for 1" in found.out
    assert "no node has label zone=b (there is a)" in found.out


def test_an_image_that_cannot_be_pulled_is_named(k8s: Command, operator: Operator, release: str) -> None:
    status = waiting_container("ImagePullBackOff", "Back-off pulling image")
    pod = operator.pod("paceline-abc", "target", "w1", status=status)
    operator.event(pod, "Failed", "pull access denied for example.com/paceline", count=4)
    found = k8s("diagnose")
    assert found.code == 1
    assert found.out.splitlines()[0].startswith(
        "paceline is not ready: Pod w1 of group target: image example.com/paceline:1 cannot be pulled (ImagePullBackOff"
    )
    assert "do: check image.repository and image.tag, and image.pullSecrets" in found.out
    assert "Pod w1: Failed: pull access denied for example.com/paceline (4 times)" in found.out
