"""The other objects: ways in from outside, the budget, the account, telemetry, objects of one's own, and the notes."""

from __future__ import annotations

import re
from typing import Any

import helm_python
import pytest

from paceline.config import parse_settings
from tests.k8s.charts import CHART, args, find, rayservice, refusal, render
from tests.k8s.pods import ray_pods, selects

GATEWAY = [{"name": "public", "namespace": "gateways"}]
INCREMENTAL = {
    "autoscaling": {"enabled": True, "target": {"maxReplicas": 1}, "draft": {"maxReplicas": 1}},
    "upgrade": {"strategy": "NewClusterWithIncrementalUpgrade", "gatewayClassName": "istio"},
}
SERVICE = "demo-paceline-serve-svc"
"""As KubeRay names it."""


def _kinds(values: dict[str, Any] | None = None) -> set[str]:
    return {each["kind"] for each in render(values)}


def _notes(values: dict[str, Any]) -> str:
    with helm_python.Chart.load(CHART) as chart:
        files = chart.render(values, name="demo", namespace="serving")
    (notes,) = (text for path, text in files.items() if path.endswith("paceline/templates/NOTES.txt"))
    return notes


def test_by_default_nothing_stands_around_it_but_its_account_and_its_policy() -> None:
    assert _kinds() == {"RayService", "ServiceAccount", "NetworkPolicy"}


def test_an_ingress_leads_to_serve() -> None:
    ingress = find(render({"ingress": {"enabled": True, "hosts": ["a.example.org", "b.example.org"]}}), "Ingress")
    assert [rule["host"] for rule in ingress["spec"]["rules"]] == ["a.example.org", "b.example.org"]
    (path,) = ingress["spec"]["rules"][1]["http"]["paths"]
    assert path["backend"]["service"] == {"name": SERVICE, "port": {"number": 8000}}


def test_an_ingress_without_hosts_answers_to_any() -> None:
    (rule,) = find(render({"ingress": {"enabled": True}}), "Ingress")["spec"]["rules"]
    assert "host" not in rule and "http" in rule


def test_an_ingress_has_tls_for_its_hosts() -> None:
    values = {"enabled": True, "hosts": ["a.example.org"], "tlsSecret": "cert", "className": "nginx"}
    spec = find(render({"ingress": values}), "Ingress")["spec"]
    assert spec["tls"] == [{"secretName": "cert", "hosts": ["a.example.org"]}] and spec["ingressClassName"] == "nginx"


@pytest.mark.parametrize(("key", "kind", "port"), [("httpRoute", "HTTPRoute", 8000), ("grpcRoute", "GRPCRoute", 9000)])
def test_a_route_leads_from_the_gateway_to_serve(key: str, kind: str, port: int) -> None:
    route = find(render({key: {"enabled": True, "parentRefs": GATEWAY, "hostnames": ["llm.example.org"]}}), kind)
    assert route["apiVersion"] == "gateway.networking.k8s.io/v1"
    assert route["spec"] == {
        "parentRefs": GATEWAY,
        "hostnames": ["llm.example.org"],
        "rules": [{"backendRefs": [{"name": SERVICE, "port": port}]}],
    }


def test_a_route_may_end_streams() -> None:
    values = {"enabled": True, "parentRefs": GATEWAY, "requestTimeout": "600s"}
    (rule,) = find(render({"httpRoute": values}), "HTTPRoute")["spec"]["rules"]
    assert rule["timeouts"] == {"request": "600s"}


@pytest.mark.parametrize("key", ["httpRoute", "grpcRoute"])
def test_a_route_without_a_gateway_is_refused_by_name(key: str) -> None:
    assert f"{key}.parentRefs: " in refusal({key: {"enabled": True}})


@pytest.mark.parametrize(("http", "grpc"), [(["a"], ["a"]), ([], ["a"]), (["a"], [])])
def test_names_that_both_routes_would_have_are_refused(http: list[str], grpc: list[str]) -> None:
    routes = {
        "httpRoute": {"enabled": True, "parentRefs": GATEWAY, "hostnames": http},
        "grpcRoute": {"enabled": True, "parentRefs": GATEWAY, "hostnames": grpc},
    }
    assert "grpcRoute.hostnames: " in refusal(routes)


def test_two_routes_with_names_of_their_own_are_two() -> None:
    routes = {
        "httpRoute": {"enabled": True, "parentRefs": GATEWAY, "hostnames": ["http.example.org"]},
        "grpcRoute": {"enabled": True, "parentRefs": GATEWAY, "hostnames": ["grpc.example.org"]},
    }
    assert {"HTTPRoute", "GRPCRoute"} <= _kinds(routes)


@pytest.mark.parametrize("key", ["ingress", "httpRoute", "grpcRoute"])
def test_with_an_incremental_upgrade_kuberay_makes_the_way_in(key: str) -> None:
    assert f"{key}.enabled: " in refusal({**INCREMENTAL, key: {"enabled": True}})


def test_the_budget_holds_pods_with_targets_and_no_others() -> None:
    values = {"podDisruptionBudget": {"enabled": True}, "groups": {"both": {"role": "any"}}}
    objects = render(values)
    selector = find(objects, "PodDisruptionBudget")["spec"]["selector"]
    held = {name for name, pod in ray_pods(objects).items() if selects(selector, pod.labels)}
    assert held == {"target", "both"}


def test_the_budget_of_another_release_holds_none_of_ours() -> None:
    selector = find(render({"podDisruptionBudget": {"enabled": True}}, name="other"), "PodDisruptionBudget")
    assert not any(selects(selector["spec"]["selector"], pod.labels) for pod in ray_pods(render()).values())


def test_the_budget_is_a_number() -> None:
    """KubeRay's clusters have no scale that Kubernetes could take a share of."""
    budget = {"enabled": True, "minAvailable": 2}
    assert find(render({"podDisruptionBudget": budget}), "PodDisruptionBudget")["spec"]["minAvailable"] == 2
    assert "minAvailable" in refusal({"podDisruptionBudget": {"enabled": True, "minAvailable": "50%"}})


def test_the_account_has_no_token_and_what_a_cloud_wants_to_read() -> None:
    account = find(render({"serviceAccount": {"annotations": {"role": "models"}}}), "ServiceAccount")
    assert account["metadata"]["annotations"] == {"role": "models"}
    assert account["automountServiceAccountToken"] is False


def test_an_account_that_exists_is_not_made() -> None:
    assert "ServiceAccount" not in _kinds({"serviceAccount": {"create": False, "name": "theirs"}})


def test_telemetry_reaches_paceline() -> None:
    values = {
        "otlpEndpoint": "http://collector:4317",
        "traceSampleRatio": 0.25,
        "logFormat": "json",
        "logRequests": True,
    }
    settings = parse_settings(args(rayservice({"telemetry": values}))).telemetry
    assert settings.model_dump() == {
        "otlp_endpoint": "http://collector:4317",
        "trace_sample_ratio": 0.25,
        "log_format": "json",
        "log_requests": True,
    }


def test_no_telemetry_is_the_default() -> None:
    assert parse_settings(args(rayservice())).telemetry == parse_settings({}).telemetry


def test_more_objects_may_hold_expressions_as_mappings_and_as_text() -> None:
    mapping = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "{{ .Release.Name }}-a"}}
    text = 'apiVersion: v1\nkind: Secret\nmetadata:\n  name: {{ include "paceline.fullname" . }}-b\n'
    objects = render({"extraObjects": [mapping, text]})
    assert [find(objects, kind)["metadata"]["name"] for kind in ("ConfigMap", "Secret")] == [
        "demo-a",
        "demo-paceline-b",
    ]


def test_the_notes_say_how_to_wait_and_how_to_ask() -> None:
    notes = _notes({})
    assert "kubectl -n serving wait --for=condition=Ready --timeout=1h rayservice/demo-paceline" in notes
    assert f"kubectl -n serving port-forward service/{SERVICE} 8000 9000" in notes
    assert "paceline chat --url http://localhost:8000" in notes


@pytest.mark.parametrize(
    ("values", "warned"),
    [({}, True), ({"apiKeys": {"existingSecret": "keys"}}, False)],
)
def test_the_notes_warn_of_open_doors(values: dict[str, Any], warned: bool) -> None:
    assert ("There are no API keys" in _notes(values)) is warned


@pytest.mark.parametrize(
    ("values", "warned"),
    [({}, True), ({"redis": {"enabled": True, "host": "r"}}, False)],
)
def test_the_notes_warn_of_sessions_that_end(values: dict[str, Any], warned: bool) -> None:
    assert ("Sessions end" in _notes(values)) is warned


def test_the_commands_of_ours_in_the_notes_are_taken_by_the_command_line() -> None:
    from typer.main import get_command

    from paceline.cli.app import app

    (named,) = re.findall(r"`paceline (.+?)`", _notes({}))
    words = named.split()
    group, name, arguments = words[0], words[1], words[2:]
    command = get_command(app).commands[group].commands[name]  # type: ignore[attr-defined]
    taken = command.make_context(name, arguments).params
    assert (taken["name"], taken["namespace"]) == ("demo", "serving")


def test_the_notes_name_the_gateway_of_an_incremental_upgrade() -> None:
    notes = _notes(INCREMENTAL)
    assert "get gateway demo-paceline-gateway" in notes and SERVICE not in notes
