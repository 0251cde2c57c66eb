"""The chart as `paceline k8s` renders it: no cluster, no extra beyond Helm's SDK."""

from __future__ import annotations

import builtins
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from paceline.errors import ConfigError
from paceline.k8s import chart
from paceline.k8s.connect import connect
from paceline.k8s.kinds import Obj, guessed, labels_of
from paceline.k8s.release import in_order, kept, kinds_of, noted_kinds, with_kinds
from paceline.k8s.role import Right, needed, roles, subject_of
from tests.cli.conftest import Run, run  # noqa: F401


def rendered(**values: Any) -> list[Obj]:
    return chart.render(values, name="paceline", namespace="llm")


def test_every_object_is_labelled_as_ours() -> None:
    for obj in rendered(modelCache={"enabled": True}):
        assert labels_of(obj)["app.kubernetes.io/managed-by"] == "paceline"
        assert labels_of(obj)["app.kubernetes.io/instance"] == "paceline"


def test_rendering_again_gives_the_same() -> None:
    assert rendered() == rendered()


def test_what_is_printed_reads_back_as_it_was() -> None:
    objects = rendered()
    assert list(yaml.safe_load_all(chart.as_yaml(objects))) == objects


def test_serves_config_is_printed_as_lines() -> None:
    assert "\n  serveConfigV2: |\n    proxy_location: EveryNode\n" in chart.as_yaml(rendered())


def test_later_values_win(tmp_path: Path) -> None:
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("model: a\ntarget: {replicas: 1, numCpus: 4}\n")
    second.write_text("target: {replicas: 2}\n")
    found = chart.gather_values(None, [first, second], ["target.numCpus=8"])
    assert found == {"model": "a", "target": {"replicas": 2, "numCpus": 8}}


@pytest.mark.parametrize("preset", chart.presets())
def test_every_preset_renders_a_ray_service(preset: str) -> None:
    objects = chart.render(chart.gather_values(preset, [], []), name="paceline", namespace="llm")
    assert [obj["kind"] for obj in objects].count("RayService") == 1


REFUSED = {
    "an unknown value": (["--set", "taret.replicas=2"], "additional properties 'taret' not allowed"),
    "a wrong type": (["--set", "target.replicas=many"], "/target/replicas"),
    "an unknown setting": (["--set", "config.target.engine.max_num_seq=2"], "max_num_seq"),
    "no key": (["--set", "replicas"], "--set: 'replicas'"),
    "an unknown preset": (["--preset", "tpu"], "--preset: tpu: there is cpu, gpu, xeon"),
    "no file": (["-f", "/absent.yaml"], "--values: /absent.yaml: No such file"),
}


@pytest.mark.parametrize(("arguments", "told"), REFUSED.values(), ids=REFUSED)
def test_wrong_values_are_refused_in_one_line_by_name(run: Run, arguments: list[str], told: str) -> None:  # noqa: F811
    found = run("k8s", "render", *arguments)
    assert (found.code, found.out, len(found.err.splitlines())) == (1, "", 1)
    assert told in found.err


def test_a_file_that_is_no_tree_is_refused(run: Run, tmp_path: Path) -> None:  # noqa: F811
    (tmp_path / "v.yaml").write_text("- a\n")
    assert "a tree of values is wanted" in run("k8s", "render", "-f", str(tmp_path / "v.yaml")).err


@pytest.mark.parametrize("package", ["kubernetes", "helm_python"])
def test_without_the_extra_one_line_names_it(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    real = builtins.__import__

    def absent(name: str, *rest: Any) -> Any:
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"pip install paceline\[k8s\]"):
        connect() if package == "kubernetes" else rendered()


def test_a_kubeconfig_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:  # noqa: F811
    found = run("k8s", "status", "--kubeconfig", str(tmp_path / "none"))
    assert found.err == f"error: --kubeconfig: {tmp_path / 'none'}: there is no such file\n"


def test_a_context_that_is_not_there_is_named(run: Run, tmp_path: Path) -> None:  # noqa: F811
    config = tmp_path / "config"
    config.write_text(
        "apiVersion: v1\nkind: Config\ncurrent-context: a\nclusters: [{name: c, cluster: {server: https://127.0.0.1:1}}]\n"
        "users: [{name: u, user: {token: t}}]\ncontexts: [{name: a, context: {cluster: c, user: u}}]\n"
    )
    found = run("k8s", "status", "--kubeconfig", str(config), "--context", "b")
    assert (found.code, len(found.err.splitlines()), "b" in found.err) == (1, 1, True)


def test_the_wheel_carries_the_chart() -> None:
    project = tomllib.loads((chart.CHECKOUT.parents[1] / "pyproject.toml").read_text())
    included = project["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    assert included == {"helm/paceline": "paceline/k8s/chart"}


# the order and the note of kinds


def obj(kind: str, name: str = "x", **metadata: Any) -> Obj:
    return {"apiVersion": "v1", "kind": kind, "metadata": {"name": name, **metadata}}


def test_what_pods_mount_comes_before_them_and_routes_after() -> None:
    mixed = [obj(kind) for kind in ("HTTPRoute", "RayService", "Job", "NetworkPolicy", "Secret", "ServiceAccount")]
    assert [each["kind"] for each in in_order(mixed)] == [
        "ServiceAccount",
        "Secret",
        "NetworkPolicy",
        "Job",
        "RayService",
        "HTTPRoute",
    ]


def test_the_ray_service_notes_the_kinds_of_its_release() -> None:
    objects = [obj("RayService"), obj("Secret")]
    noting = with_kinds(objects, kinds_of(objects))
    assert (noted_kinds(noting[0]), noted_kinds(objects[0])) == ({"v1/RayService", "v1/Secret"}, set())


def test_volumes_and_what_is_marked_so_outlive_the_release() -> None:
    marked = obj("Secret", annotations={"helm.sh/resource-policy": "keep"})
    assert [kept(each) for each in (obj("PersistentVolumeClaim"), marked, obj("Secret"))] == [True, True, False]


# the Role


@pytest.mark.parametrize(
    ("kind", "plural"),
    [
        ("RayService", "rayservices"),
        ("NetworkPolicy", "networkpolicies"),
        ("Ingress", "ingresses"),
        ("Gateway", "gateways"),
        ("PersistentVolumeClaim", "persistentvolumeclaims"),
    ],
)
def test_a_kinds_plural_is_found_without_a_server(kind: str, plural: str) -> None:
    assert guessed("v1", kind).plural == plural


def test_a_role_of_these_values_has_nothing_of_kinds_they_do_not_render() -> None:
    resources = [guessed(each["apiVersion"], each["kind"]) for each in rendered()]
    held = needed(resources)
    assert Right("", "secrets", "create") not in held
    assert Right("networking.k8s.io", "networkpolicies", "create") in held


def test_no_role_has_a_wildcard() -> None:
    printed = roles(needed([guessed("ray.io/v1", "RayService")]), name="r", namespace="n")
    assert "*" not in str(printed)


def test_a_service_account_is_bound_in_its_namespace() -> None:
    bindings = [
        each
        for each in roles({Right("", "pods", "list")}, name="r", namespace="n", subject=subject_of(None, "ci", "n"))
        if each["kind"] == "RoleBinding"
    ]
    assert bindings[0]["subjects"] == [{"kind": "ServiceAccount", "name": "ci", "namespace": "n"}]
    assert bindings[0]["roleRef"]["name"] == "r"
