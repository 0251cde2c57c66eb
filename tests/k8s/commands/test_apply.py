"""`apply` and `delete` against a real API server."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline.k8s.api import Api, selector
from paceline.k8s.connect import connect
from paceline.k8s.kinds import CLAIMS, JOBS, NAMESPACES, RAY_SERVICES, name_of
from paceline.k8s.release import INSTANCE
from tests.cli.conftest import Run
from tests.k8s.commands.conftest import Command
from tests.k8s.commands.operator import CRDS, UNSCHEDULABLE, Operator, condition, load_crds

pytestmark = pytest.mark.k8s

OLD = ("--set", "podDisruptionBudget.enabled=false")
"""The server of the tests may be older than policy/v1."""

APPLY = ("apply", *OLD)
QUICK = (*APPLY, "--no-wait")
NO_ACCOUNT = ("--set", "serviceAccount.create=false")
CACHE = ("--set", "modelCache.enabled=true")


def generations(api: Api) -> dict[tuple[str, str], int | None]:
    """Of everything a release has: how often what is wanted of it has changed."""
    kinds = [RAY_SERVICES, CLAIMS, JOBS, api.resource("v1", "ServiceAccount")]
    return {
        (obj["kind"], name_of(obj)): obj["metadata"].get("generation")
        for kind in kinds
        for obj in api.list_all(kind, selector({INSTANCE: "paceline"}))
    }


def test_apply_makes_every_object_that_render_prints(k8s: Command, api: Api, operator: Operator) -> None:
    assert k8s(*QUICK, *CACHE).code == 0
    assert {kind for kind, _ in generations(api)} >= {"RayService", "PersistentVolumeClaim", "Job"}


def test_the_second_apply_changes_nothing(k8s: Command, api: Api, operator: Operator) -> None:
    k8s(*QUICK, *CACHE)
    before = generations(api)
    again = k8s(*QUICK, *CACHE)
    assert (generations(api), {line.split()[-1] for line in again.out.splitlines()[1:]}) == (before, {"unchanged"})


def test_a_changed_value_changes_its_object_alone(k8s: Command, api: Api, operator: Operator) -> None:
    k8s(*QUICK, *CACHE)
    found = k8s(*QUICK, *CACHE, "--set", "upgrade.deletionDelaySeconds=77").out.splitlines()[1:]
    assert [line for line in found if not line.endswith("unchanged")] == ["RayService paceline changed"]


def test_what_is_no_longer_rendered_is_deleted(k8s: Command, api: Api, operator: Operator) -> None:
    k8s(*QUICK)
    found = k8s(*QUICK, *NO_ACCOUNT)
    assert "ServiceAccount paceline deleted" in found.out.splitlines()
    assert ("ServiceAccount", "paceline") not in generations(api)


def test_a_volume_that_is_no_longer_rendered_stays(k8s: Command, api: Api, operator: Operator) -> None:
    k8s(*QUICK, *CACHE)
    found = k8s(*QUICK, "--set", "modelCache.enabled=false")
    assert [line for line in found.out.splitlines() if line.endswith("kept")] != []
    assert [kind for kind, _ in generations(api)].count("PersistentVolumeClaim") == 1


def test_a_pruning_that_was_interrupted_is_finished_by_the_next_apply(
    k8s: Command, api: Api, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    from paceline.k8s import apply

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    k8s(*QUICK)
    with monkeypatch.context() as patched:
        patched.setattr(apply, "_pruned", interrupted)
        k8s(*QUICK, *NO_ACCOUNT)
    assert ("ServiceAccount", "paceline") in generations(api)
    k8s(*QUICK, *NO_ACCOUNT)
    assert ("ServiceAccount", "paceline") not in generations(api)


def test_a_field_of_another_manager_is_named_with_its_owner(k8s: Command, api: Api, operator: Operator) -> None:
    k8s(*QUICK)
    taken_over(api)
    found = k8s(*QUICK)
    assert found.code == 1
    assert "spec.rayClusterDeletionDelaySeconds is set by somebody; --force-conflicts takes it over" in found.err


def test_force_conflicts_takes_the_field_over(k8s: Command, api: Api, operator: Operator) -> None:
    k8s(*QUICK)
    before = api.get(RAY_SERVICES, "paceline")["spec"]
    taken_over(api)
    assert k8s(*QUICK, "--force-conflicts").code == 0
    assert api.get(RAY_SERVICES, "paceline")["spec"] == before


def taken_over(api: Api) -> None:
    """Another manager sets a field that we had applied."""
    body = {
        "apiVersion": "ray.io/v1",
        "kind": "RayService",
        "metadata": {"name": "paceline"},
        "spec": {"rayClusterDeletionDelaySeconds": 7},
    }
    path = RAY_SERVICES.path(api.namespace, "paceline")
    query = {"fieldManager": "somebody", "force": "true"}
    status, _ = api.send("PATCH", path, query=query, body=body, content_type="application/apply-patch+yaml")
    assert status == 200


def test_a_release_of_helm_is_left_to_helm(k8s: Command, api: Api, operator: Operator) -> None:
    k8s(*QUICK)
    api.patch(RAY_SERVICES, "paceline", {"metadata": {"labels": {"app.kubernetes.io/managed-by": "Helm"}}})
    assert "release paceline is Helm's: change it with `helm upgrade paceline`" in k8s(*QUICK).err
    assert "release paceline is Helm's: take it away with `helm uninstall paceline`" in k8s("delete").err


def test_without_rights_all_that_are_missing_are_named_and_nothing_is_changed(k8s: Command, api: Api) -> None:
    found = k8s(*QUICK, "--context", "viewer")
    assert found.code == 1
    assert "this account may not:" in found.err
    for right in ("create rayservices.ray.io", "patch rayservices.ray.io", "delete rayservices.ray.io"):
        assert right in found.err
    assert len(found.err.splitlines()) == 1
    assert generations(api) == {}


def test_a_namespace_that_is_not_there_is_named_with_the_remedy(kubeconfig: Path, run: Run) -> None:
    arguments = ("k8s", *QUICK, "--kubeconfig", str(kubeconfig), "-n", "paceline-test-absent")
    assert run(*arguments).err == ("error: there is no namespace paceline-test-absent; --create-namespace makes it\n")


def test_create_namespace_makes_it(k8s: Command, api: Api, operator: Operator, run: Run, kubeconfig: Path) -> None:
    name = f"{api.namespace}-new"
    arguments = ("k8s", *QUICK, "--create-namespace", "--kubeconfig", str(kubeconfig), "-n", name)
    try:
        assert run(*arguments).code == 0
        assert api.find(NAMESPACES, name) is not None
    finally:
        api.delete(NAMESPACES, name, propagation="Background")


@pytest.fixture
def without_operator(kubeconfig: Path, api: Api) -> Iterator[None]:
    """The kinds of KubeRay are taken away, and brought back at the end."""
    for name in ("rayservices.ray.io", "rayclusters.ray.io"):
        api.delete(CRDS, name)
    while {"RayService", "RayCluster"} & set(api.resources("ray.io/v1")):
        api.forget("ray.io/v1")
    yield
    with connect(kubeconfig) as anew:
        while any(anew.find(CRDS, f"ray{kind}.ray.io") for kind in ("services", "clusters")):
            pass
        load_crds(anew)


@pytest.mark.parametrize("command", ["apply", "status", "diagnose"])
def test_without_the_operator_one_line_says_so(k8s: Command, without_operator: None, command: str) -> None:
    found = k8s(*APPLY) if command == "apply" else k8s(command)
    assert found.code == 1
    assert found.err.startswith("error: RayService (ray.io/v1) is not known here: install the KubeRay operator: helm")
    assert len(found.err.splitlines()) == 1


def test_an_address_without_a_server_is_one_line(kubeconfig: Path, run: Run, tmp_path: Path) -> None:
    dead = tmp_path / "kubeconfig"
    dead.write_text(kubeconfig.read_text().replace("server: https://127.0.0.1:", "server: https://127.0.0.1:1#"))
    found = run("k8s", "status", "--kubeconfig", str(dead))
    assert (found.code, len(found.err.splitlines())) == (1, 1)
    assert "no Kubernetes API server answers at https://127.0.0.1:1" in found.err


# waiting


def test_apply_ends_when_it_is_ready(k8s: Command, operator: Operator) -> None:
    operator.come_up()
    found = k8s(*APPLY, "--timeout", "60")
    assert found.code == 0
    assert f"ready: paceline in namespace {k8s.namespace}" in found.out


def test_apply_says_what_it_waits_for(k8s: Command, operator: Operator) -> None:
    found = k8s(*APPLY, "--timeout", "1")
    assert "waiting for the KubeRay operator to take up RayService paceline" in found.out


def unschedulable(k8s: Command, operator: Operator) -> None:
    """A release of which one pod asks for what no node has."""
    k8s(*QUICK)
    operator.say("paceline", conditions=[condition("Ready", False, "Initializing")])
    operator.cluster("paceline", "paceline-abc")
    operator.pod("paceline-abc", "gpu", "w1", status=UNSCHEDULABLE, resources={"nvidia.com/gpu": "1"})


def test_a_pod_that_fits_nowhere_ends_the_wait_with_its_reason(k8s: Command, operator: Operator) -> None:
    unschedulable(k8s, operator)
    found = k8s(*APPLY, "--timeout", "1")
    assert found.code == 1
    assert found.err.startswith(
        "error: not ready after 1 s: Pod w1 of group gpu cannot be placed: "
        "0/3 nodes are available: 3 Insufficient nvidia.com/gpu."
    )
    assert len(found.err.splitlines()) == 1


def test_fail_fast_does_not_wait_for_a_node(k8s: Command, operator: Operator) -> None:
    unschedulable(k8s, operator)
    found = k8s(*APPLY, "--timeout", "600", "--fail-fast")
    assert (found.code, "cannot be placed" in found.err) == (1, True)


def test_what_the_operator_refuses_is_not_waited_for(k8s: Command, operator: Operator) -> None:
    k8s(*QUICK)
    operator.say("paceline", conditions=[condition("Ready", False, "ValidationFailed", "the name is too long")])
    found = k8s(*APPLY, "--timeout", "600")
    assert found.err == "error: the KubeRay operator refuses RayService paceline: the name is too long\n"


def test_ctrl_c_ends_the_waiting_alone(kubeconfig: Path, namespace: str, api: Api, operator: Operator) -> None:
    code = "from paceline.cli.app import main; main()"
    where = ["--kubeconfig", str(kubeconfig), "-n", namespace]
    command = [sys.executable, "-c", code, "k8s", *APPLY, *where]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ, start_new_session=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("waiting for"):
                process.send_signal(signal.SIGINT)
                break
        _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert told.startswith("stopped waiting; release paceline goes on coming up. `paceline k8s status --name paceline")
    assert ("RayService", "paceline") in generations(api)


# delete


def test_delete_leaves_nothing_but_the_volume(k8s: Command, api: Api, operator: Operator) -> None:
    k8s(*QUICK, *CACHE)
    assert k8s("delete", "--timeout", "60").code == 0
    assert [kind for kind, _ in generations(api)] == ["PersistentVolumeClaim"]


def test_delete_cache_takes_the_volume_too(k8s: Command, api: Api, operator: Operator) -> None:
    k8s(*QUICK, *CACHE)
    assert k8s("delete", "--delete-cache", "--timeout", "60").code == 0
    assert generations(api) == {}


def test_a_second_delete_does_nothing(k8s: Command, operator: Operator) -> None:
    k8s(*QUICK)
    k8s("delete", "--timeout", "60")
    found = k8s("delete", "--timeout", "60")
    assert (found.code, found.out) == (0, f"nothing of release paceline is in namespace {k8s.namespace}\n")


def test_delete_says_what_holds_an_object_back(k8s: Command, api: Api) -> None:
    k8s(*QUICK)  # nobody collects garbage here: what is deleted in the foreground stays
    found = k8s("delete", "--timeout", "1")
    assert found.code == 1
    assert "still there after 1 s: RayService paceline (held by foregroundDeletion)" in found.err


def test_another_release_is_not_touched(k8s: Command, api: Api, operator: Operator) -> None:
    k8s(*QUICK)
    k8s(*QUICK, "--name", "second")
    k8s("delete", "--name", "second", "--timeout", "60")
    assert ("RayService", "paceline") in generations(api)
