"""The Role that `paceline k8s role` prints suffices for every command, and each right in it is needed by one."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from paceline.errors import PacelineError, Unavailable
from paceline.k8s import chart, diagnosis
from paceline.k8s import delete as deleting
from paceline.k8s.api import Api
from paceline.k8s.apply import apply_objects, check, resources_of, wait_ready
from paceline.k8s.connect import connect
from paceline.k8s.drain import Drain, plan
from paceline.k8s.errors import Denied
from paceline.k8s.evict import Evictions
from paceline.k8s.kinds import NODES, RAY_SERVICES, Obj, guessed
from paceline.k8s.pace import Pace
from paceline.k8s.report import look
from paceline.k8s.role import Right, needed, roles, subject_of
from paceline.k8s.server import ServerProxy
from paceline.k8s.snapshot import take
from paceline.k8s.troubles import troubles
from tests.k8s.commands.conftest import Command
from tests.k8s.commands.operator import READY_POD, Operator, waiting_container

pytestmark = pytest.mark.k8s

VALUES = {"modelCache": {"enabled": True}, "podDisruptionBudget": {"enabled": False}}
FEWER = {**VALUES, "networkPolicy": {"enabled": False}, "serviceAccount": {"create": False}}
USER = "viewer"
"""An account of the server that has no rights of its own."""

RIGHTS = sorted(needed([guessed(o["apiVersion"], o["kind"]) for o in chart.render(VALUES, name="a", namespace="n")]))
NO_SERVER = 'services "paceline-serve-svc" not found'


def give(api: Api, held: list[Right]) -> None:
    """Exactly these rights, and no others, in the test's namespace; those of the cluster under its name."""
    subject = subject_of(USER, None, api.namespace)
    for obj in roles(held, name="under-test", namespace=api.namespace, subject=subject):
        api.apply(api.resource(obj["apiVersion"], obj["kind"]), obj, force=True)


@pytest.fixture
def restricted(api: Api, kubeconfig: Path, operator: Operator) -> Iterator[Api]:
    """The account without rights, until `give`."""
    with connect(kubeconfig, USER, api.namespace) as made:
        yield made
    for kind in ("ClusterRole", "ClusterRoleBinding"):
        resource = api.resource("rbac.authorization.k8s.io/v1", kind)
        api.delete(resource, f"under-test-{api.namespace}", propagation="Background")


def rendered(api: Api, values: Obj) -> list[Obj]:
    return chart.render(values, name="paceline", namespace=api.namespace)


def every_command(api: Api, operator: Operator) -> None:
    """What the commands do, one after the other, less the question for rights that `apply` begins with.

    A pod that crashes is there to be diagnosed. Raises Denied where a right is missing.
    """
    objects = rendered(api, VALUES)
    made = list(apply_objects(api, "paceline", objects, resources_of(api, objects)))
    assert {done.outcome for done in made} == {"created"}
    operator.cluster("paceline", "paceline-abc")
    operator.pod("paceline-abc", "head", "head-1", status=READY_POD)
    crash = {"lastState": {"terminated": {"exitCode": 1, "reason": "Error"}}, "restartCount": 3}
    operator.pod("paceline-abc", "target", "t-1", status=waiting_container("CrashLoopBackOff", "", **crash))
    operator.come_up()
    wait_ready(api, "paceline", timeout_s=60, say=lambda _: None)
    assert NO_SERVER in look(api, "paceline").silence
    seen = take(api, "paceline", nodes=True)
    logs = diagnosis.read_logs(api, troubles(seen))
    told = " ".join(line for lines in logs.values() for line in lines)
    if seen.nodes is None or "not allowed" in told:  # a diagnosis says what it may not see, and goes on
        raise Denied(f"diagnose: {told}")
    move(api, operator)
    fewer = rendered(api, FEWER)
    pruned = list(apply_objects(api, "paceline", fewer, resources_of(api, fewer)))
    assert {done.what for done in pruned if done.outcome == "deleted"} >= {"ServiceAccount paceline"}
    deleting.delete(api, "paceline", keep_cache=False, timeout_s=60, say=lambda _: None)


def move(api: Api, operator: Operator) -> None:
    """What `drain` and `upgrade` do beside that; no server answers, and the API server says so to whom it lets ask."""
    node = f"node-{uuid.uuid4().hex[:8]}"
    operator.node(node, {})
    operator.pod("paceline-abc", "target", "t-2", status=READY_POD, nodeName=node, terminationGracePeriodSeconds=0)
    try:
        found = plan(api, node, "paceline", force=False)
        server = ServerProxy.of_service(api, "paceline")
        drain = Drain(api, server, found, Pace(5.0), lambda _: None, deadline_s=60.0)
        drain.cordon(node)
        for method in ("POST", "DELETE"):
            with pytest.raises(Unavailable):
                server.ask(method, "/v1/sessions/none", {})
        Evictions(api, Pace(5.0), lambda _: None).evict(found.workers[0])
        api.get(RAY_SERVICES, "paceline")
    finally:
        operator.api.delete(NODES, node)


def test_the_role_suffices_for_every_command(api: Api, restricted: Api, operator: Operator) -> None:
    give(api, RIGHTS)
    check(restricted, "paceline", rendered(api, VALUES), wait=True)
    every_command(restricted, operator)


@pytest.mark.parametrize("right", RIGHTS, ids=str)
def test_a_command_fails_without(api: Api, restricted: Api, operator: Operator, right: Right) -> None:
    give(api, [each for each in RIGHTS if each != right])
    with pytest.raises(PacelineError, match=r"not allowed|diagnose"):
        every_command(restricted, operator)


def test_the_account_has_nothing_by_itself(restricted: Api, operator: Operator) -> None:
    """Else the tests above would prove nothing."""
    with pytest.raises(Denied):
        take(restricted, "paceline")


def test_what_the_command_prints_is_what_was_tested(k8s: Command, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump(VALUES))
    printed = k8s.run("k8s", "role", "-f", str(values), "--name", "under-test", "-n", "n", "--user", USER).out
    expected = roles(RIGHTS, name="under-test", namespace="n", subject=subject_of(USER, None, "n"))
    assert list(yaml.safe_load_all(printed)) == expected
