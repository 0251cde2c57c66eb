"""A release's life with the real `helm` and a real API server: install, upgrade, rollback, uninstall.

What needs a newer server than the one there is (PodDisruptionBudget: 1.21) stays off by the values below.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from paceline.k8s.api import Api
from tests.k8s import charts

pytestmark = pytest.mark.k8s

NAME = "demo-paceline"
VALUES: dict[str, Any] = {
    "modelCache": {"enabled": True},
    "redis": {"enabled": True, "install": True, "existingSecret": "redis-password"},
    "ingress": {"enabled": True, "hosts": ["llm.example.org"]},
    "dashboards": {"enabled": True},
}
KINDS = [
    ("ray.io/v1", "RayService"),
    ("v1", "ServiceAccount"),
    ("v1", "Service"),
    ("v1", "PersistentVolumeClaim"),
    ("v1", "ConfigMap"),
    ("v1", "Secret"),  # of which Helm keeps its releases
    ("apps/v1", "StatefulSet"),
    ("batch/v1", "Job"),
    ("networking.k8s.io/v1", "NetworkPolicy"),
    ("networking.k8s.io/v1", "Ingress"),
]


@dataclass(frozen=True)
class Helm:
    """`helm` in the test's namespace."""

    kubeconfig: Path
    namespace: str
    chart: Path
    folder: Path

    def __call__(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        where = ["--kubeconfig", str(self.kubeconfig), "--namespace", self.namespace]
        home = {"HOME": str(self.folder), "PATH": ""}  # nobody's plugins, caches and repositories
        return subprocess.run([_helm(), *arguments, *where], capture_output=True, text=True, env=home, timeout=120)

    def install(self, values: dict[str, Any], name: str = "demo") -> subprocess.CompletedProcess[str]:
        return self("install", name, str(self.chart), "--values", self._file(values))

    def upgrade(self, values: dict[str, Any], name: str = "demo") -> subprocess.CompletedProcess[str]:
        return self("upgrade", name, str(self.chart), "--values", self._file(values))

    def _file(self, values: dict[str, Any]) -> str:
        path = self.folder / "values.yaml"
        path.write_text(yaml.safe_dump(values))
        return str(path)


def _helm() -> str:
    found = shutil.which("helm")
    if found is None:
        pytest.skip("NOT RUN: helm is not on PATH; see https://helm.sh/docs/intro/install")
    return found


@pytest.fixture
def helm(kubeconfig: Path, api: Api, tmp_path: Path) -> Iterator[Helm]:
    """With the chart as it is, but for the version it asks for if the server is older than that."""
    version = json.loads(api.send("GET", "/version")[1])
    chart = tmp_path / "chart"
    shutil.copytree(charts.CHART, chart)
    if int(re.sub(r"\D", "", version["minor"])) < 28:
        about = chart / "Chart.yaml"
        about.write_text(re.sub(r"(?m)^kubeVersion:.*\n", "", about.read_text()))
    yield Helm(kubeconfig, api.namespace, chart, tmp_path)


def _objects(api: Api) -> set[str]:
    """What is in the namespace and stays, but for what every namespace has."""
    found = {
        f"{kind}/{obj['metadata']['name']}"
        for version, kind in KINDS
        for obj in api.list_all(api.resource(version, kind))
        if "deletionTimestamp" not in obj["metadata"]  # a claim ends when a controller, not there, lets it
    }
    return {each for each in found if each not in ("ServiceAccount/default", "ConfigMap/kube-root-ca.crt")}


def _get(api: Api, kind: str, name: str = NAME) -> dict[str, Any]:
    (version,) = (version for version, each in KINDS if each == kind)
    return api.get(api.resource(version, kind), name)


def _rendered(api: Api, values: dict[str, Any]) -> list[dict[str, Any]]:
    return charts.render(values, namespace=api.namespace)


def _missing(wanted: Any, found: Any, path: str = "") -> list[str]:
    """Fields of `wanted` that `found` has not, or has otherwise: an API server drops what its schema does not know."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        return [each for key in wanted for each in _missing(wanted[key], found.get(key), f"{path}.{key}")]
    if isinstance(wanted, list) and isinstance(found, list) and len(wanted) == len(found):
        return [
            each for n, (a, b) in enumerate(zip(wanted, found, strict=True)) for each in _missing(a, b, f"{path}[{n}]")
        ]
    return [] if wanted == found else [f"{path}: {wanted!r} is {found!r}"]


def test_install_makes_every_object_that_is_rendered(helm: Helm, api: Api) -> None:
    assert helm.install(VALUES).returncode == 0
    wanted = {f"{each['kind']}/{each['metadata']['name']}" for each in _rendered(api, VALUES)}
    assert _objects(api) == wanted | {"Secret/sh.helm.release.v1.demo.v1"}


@pytest.mark.parametrize("preset", ["cpu", "gpu", "xeon"])
def test_the_server_keeps_every_field_of_a_preset_s_rayservice(preset: str, helm: Helm, api: Api) -> None:
    values = charts.preset(preset)
    assert helm.install(values).returncode == 0
    wanted = charts.find(_rendered(api, values), "RayService")
    assert _missing(wanted["spec"], _get(api, "RayService")["spec"]) == []


def test_the_server_keeps_every_field_of_the_other_objects(helm: Helm, api: Api) -> None:
    assert helm.install(VALUES).returncode == 0
    for wanted in _rendered(api, VALUES):
        if wanted["kind"] in ("NetworkPolicy", "Ingress", "Job", "ConfigMap", "ServiceAccount"):
            found = _get(api, wanted["kind"], wanted["metadata"]["name"])
            assert _missing({key: wanted[key] for key in wanted if key != "metadata"}, found) == []


def test_install_tells_the_next_two_commands(helm: Helm, api: Api) -> None:
    told = helm.install({}).stdout
    assert f"kubectl -n {api.namespace} wait --for=condition=Ready" in told and "paceline chat --url" in told


def test_an_upgrade_that_changes_nothing_touches_nothing(helm: Helm, api: Api) -> None:
    helm.install(VALUES)
    before = [_get(api, kind, name)["metadata"] for kind, name in (("RayService", NAME), ("StatefulSet", "demo-redis"))]
    assert helm.upgrade(VALUES).returncode == 0
    after = [_get(api, kind, name)["metadata"] for kind, name in (("RayService", NAME), ("StatefulSet", "demo-redis"))]
    assert [each["generation"] for each in after] == [each["generation"] for each in before]


def test_an_upgrade_changes_what_the_values_change(helm: Helm, api: Api) -> None:
    helm.install(VALUES)
    assert helm.upgrade(VALUES | {"servedModelName": "house"}).returncode == 0
    config = charts.serve_config(_get(api, "RayService"))
    assert config["applications"][0]["args"]["served_model_name"] == "house"


def test_another_model_is_fetched_by_another_job(helm: Helm, api: Api) -> None:
    jobs = api.resource("batch/v1", "Job")
    helm.install(VALUES)
    (before,) = api.list_all(jobs)
    assert helm.upgrade(VALUES | {"model": "org/other"}).returncode == 0
    (after,) = [each for each in api.list_all(jobs) if "deletionTimestamp" not in each["metadata"]]
    assert after["metadata"]["name"] != before["metadata"]["name"]
    (container, *_) = after["spec"]["template"]["spec"]["containers"]
    assert container["command"][-1] == "org/other"


def test_the_same_model_is_not_fetched_again(helm: Helm, api: Api) -> None:
    jobs = api.resource("batch/v1", "Job")
    helm.install(VALUES)
    before = [each["metadata"]["uid"] for each in api.list_all(jobs)]
    assert helm.upgrade(VALUES | {"routers": 2}).returncode == 0
    assert [each["metadata"]["uid"] for each in api.list_all(jobs)] == before


def test_what_is_switched_off_goes(helm: Helm, api: Api) -> None:
    helm.install(VALUES)
    assert helm.upgrade(VALUES | {"ingress": {"enabled": False}, "dashboards": {"enabled": False}}).returncode == 0
    assert not {each for each in _objects(api) if each.startswith(("Ingress/", "ConfigMap/"))}


def test_a_rollback_restores_what_there_was(helm: Helm, api: Api) -> None:
    helm.install(VALUES)
    before = _get(api, "RayService")["spec"]
    helm.upgrade(VALUES | {"image": {"tag": "next"}, "draft": {"enabled": False}})
    assert _get(api, "RayService")["spec"] != before
    assert helm("rollback", "demo", "1").returncode == 0
    assert _get(api, "RayService")["spec"] == before


def test_an_uninstall_leaves_the_models_alone(helm: Helm, api: Api) -> None:
    helm.install(VALUES)
    assert helm("uninstall", "demo").returncode == 0
    assert _objects(api) == {f"PersistentVolumeClaim/{NAME}-models"}


def test_an_uninstall_leaves_nothing_if_the_models_go_too(helm: Helm, api: Api) -> None:
    helm.install(VALUES | {"modelCache": {"enabled": True, "keep": False}})
    assert helm("uninstall", "demo").returncode == 0
    assert _objects(api) == set()


def test_models_that_were_left_are_taken_up_again(helm: Helm, api: Api) -> None:
    helm.install(VALUES)
    before = _get(api, "PersistentVolumeClaim", f"{NAME}-models")["metadata"]["uid"]
    helm("uninstall", "demo")
    assert helm.install(VALUES).returncode == 0
    assert _get(api, "PersistentVolumeClaim", f"{NAME}-models")["metadata"]["uid"] == before


def test_two_releases_live_in_one_namespace(helm: Helm, api: Api) -> None:
    assert [helm.install(VALUES, name).returncode for name in ("demo", "other")] == [0, 0]
    assert helm("uninstall", "other").returncode == 0
    wanted = {f"{each['kind']}/{each['metadata']['name']}" for each in _rendered(api, VALUES)}
    assert wanted <= _objects(api)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"target": {"replica": 2}}, "replica"),
        ({"config": {"target": {"engine": {"max_num_seq": 8}}}}, "max_num_seq"),
        ({"target": {"replicas": 9}}, "target.replicas"),
        ({"redis": {"install": True}}, "redis.existingSecret"),
        ({"httpRoute": {"enabled": True}}, "httpRoute.parentRefs"),
    ],
)
def test_wrong_values_are_named_and_nothing_is_made(values: dict[str, Any], named: str, helm: Helm, api: Api) -> None:
    told = helm.install(values)
    assert told.returncode != 0 and named in told.stderr
    assert _objects(api) == set()


def test_wrong_values_of_an_upgrade_change_nothing(helm: Helm, api: Api) -> None:
    helm.install(VALUES)
    before = _get(api, "RayService")["metadata"]["resourceVersion"]
    assert helm.upgrade(VALUES | {"model": ""}).returncode != 0
    assert _get(api, "RayService")["metadata"]["resourceVersion"] == before
